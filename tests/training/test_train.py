"""Training gives the same weights however a step is split, and leaves the model as it came."""

import json
import shutil
import socket
from contextlib import nullcontext
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llmtune.adapters.inject import inject_adapter
from llmtune.adapters.lora import LoraAdapter
from llmtune.data.example import Example, ExampleTableBuilder
from llmtune.errors import LlmtuneError
from llmtune.training.batch import StepCollator
from llmtune.training.fused.packing import packed_attention
from llmtune.training.loss import choose_loss_path, summed_loss
from llmtune.training.memory.arithmetic import BatchLimits
from llmtune.training.rows import EpochSampler, find_untrained, hash_epochs
from llmtune.training.train import train_adapter
from llmtune.training.trainer import AdapterTrainer
from tests.tiny import FAMILIES, make_model
from tests.training.tiny_runs import (
    adapter_weights,
    add_lora,
    largest_difference,
    make_adapter,
    make_config,
    make_request,
    make_rows,
)
from tests.versions import IS_CURRENT


def train(run, *, family="llama", model=None, packing="auto", rows=None, evaluation=(), **knobs):
    model = model or make_adapter(family)
    request = make_request(
        model, run, packing=packing, train=rows or make_rows(20), evaluation=list(evaluation)
    )
    return train_adapter(make_config(**knobs), request), model


def read_metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_split_of_a_step_changes_nothing(tmp_path):
    # 20 rows in steps of 8: the third step holds 4, and its split differs most.
    weights = {}
    for size in (8, 4, 1, "auto"):
        _, model = train(tmp_path / str(size), micro_batch_size=size, max_steps=4)
        weights[size] = adapter_weights(model)
    for size in (4, 1, "auto"):
        assert largest_difference(weights[8], weights[size]) < 1e-4


def test_packed_and_padded_losses_agree(tmp_path):
    losses = {}
    for packing in ("on", "off"):
        train(tmp_path / packing, packing=packing)
        losses[packing] = [line["loss"] for line in read_metrics(tmp_path / packing)]
    assert losses["on"] == pytest.approx(losses["off"], abs=1e-5)


def plain_losses(model, row):
    """Return the losses of a row's trained tokens by the library's own forward pass."""
    ids, labels = torch.tensor([row.input_ids]), torch.tensor(row.labels[1:])
    logits = model(input_ids=ids).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")[labels != -100]


def test_the_loss_of_a_step_is_the_mean_over_its_trained_tokens(tmp_path):
    rows = make_rows(8)
    model = make_adapter()
    with torch.no_grad():
        mean = torch.cat([plain_losses(model, row) for row in rows]).mean().item()
    train(tmp_path, model=model, rows=rows, max_steps=1)
    assert read_metrics(tmp_path)[0]["loss"] == pytest.approx(mean, abs=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_weights_of_rows_reach_value_and_gradient_as_in_plain_torch(packed):
    weights = (0.5, 1.0, 3.0, 0.25)
    rows = [
        Example(row.input_ids, row.labels, "f", row.line, weight)
        for row, weight in zip(make_rows(4), weights, strict=True)
    ]
    model = make_adapter().eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.1)
    losses = [plain_losses(model, row) for row in rows]
    total = sum(weight * len(one) for weight, one in zip(weights, losses, strict=True))
    plain = sum(weight * one.sum() for weight, one in zip(weights, losses, strict=True)) / total
    plain.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    collator = StepCollator(rows, BatchLimits(2, 10**9), packed=packed, pad_token_id=0)
    choice = choose_loss_path(model)
    ours = 0.0
    with packed_attention(model) if packed else nullcontext():
        for micro_batch in collator.collate(range(4))["micro_batches"]:
            loss = summed_loss(model, micro_batch, choice)
            loss.backward()
            ours += loss.item()
    assert ours == pytest.approx(plain.item(), abs=1e-5)
    for name, gradient in expected.items():
        actual = model.get_parameter(name).grad
        assert torch.allclose(actual, gradient, atol=1e-6, rtol=1e-3), name


def test_a_row_of_double_weight_counts_like_two_rows(tmp_path):
    rows = make_rows(4)
    heavy = [Example(rows[0].input_ids, rows[0].labels, "f", 1, weight=2.0), *rows[1:]]
    _, weighted = train(tmp_path / "w", rows=heavy, max_steps=2, batch_size=4)
    _, doubled = train(tmp_path / "d", rows=[rows[0], *rows], max_steps=2, batch_size=5)
    assert largest_difference(adapter_weights(weighted), adapter_weights(doubled)) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_a_pattern(family, tmp_path):
    rows = make_rows(8)
    _, model = train(tmp_path, family=family, rows=rows, max_steps=12, learning_rate=2e-2)
    lines = read_metrics(tmp_path)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.2
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_model_comes_back_as_it_was_except_its_weights(tmp_path):
    model = make_adapter("mixtral")
    base = model.get_base_model()
    before = (
        base.config.to_dict(),
        base.generation_config.to_dict(),
        set(base.__dict__),
        set(model.__dict__),
        base.config._attn_implementation,
        model.training,
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
    )
    train(tmp_path, model=model, neftune_alpha=5, gradient_checkpointing=True)
    after = (
        base.config.to_dict(),
        base.generation_config.to_dict(),
        set(base.__dict__),
        set(model.__dict__),
        base.config._attn_implementation,
        model.training,
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
    )
    assert after == before
    switch = "activation" if IS_CURRENT else "gradient"
    assert not getattr(base, f"is_{switch}_checkpointing")


def test_recomputing_activations_changes_nothing(tmp_path):
    _, kept = train(tmp_path / "kept", gradient_checkpointing=False)
    _, recomputed = train(tmp_path / "recomputed", gradient_checkpointing=True)
    assert largest_difference(adapter_weights(kept), adapter_weights(recomputed)) < 1e-6


def test_metrics_have_a_line_for_every_step_and_evaluation(tmp_path):
    result, _ = train(tmp_path, evaluation=make_rows(5, seed=7), eval_every=2)
    lines = read_metrics(tmp_path)
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4]
    last = [line for line in lines if "loss" in line][-1]
    assert last["tokens"] == result.tokens
    assert last["trained_tokens"] == result.trained_tokens
    for name in ("epoch", "learning_rate", "grad_norm", "tokens_per_second", "peak_bytes"):
        assert name in last


def test_several_sources_are_evaluated_apart_and_together(tmp_path):
    rows = [
        Example(row.input_ids, row.labels, f"{name}.jsonl", row.line, source_index=index)
        for index, name in enumerate(("a", "b"))
        for row in make_rows(4, seed=index)
    ]
    train(tmp_path / "both", evaluation=rows, learning_rate=1e-12)
    line = read_metrics(tmp_path / "both")[-1]
    sums = 0.0
    for name, part in (("a", rows[:4]), ("b", rows[4:])):
        train(tmp_path / name, evaluation=part, learning_rate=1e-12)
        alone = read_metrics(tmp_path / name)[-1]
        assert line[f"eval_loss/{name}.jsonl"] == pytest.approx(alone["eval_loss"], abs=1e-5)
        sums += alone["eval_loss"] * alone["eval_tokens"]
    assert line["eval_loss"] == pytest.approx(sums / line["eval_tokens"], abs=1e-5)


@pytest.mark.parametrize("frozen_head", [True, False])
def test_the_training_loss_of_every_source_is_logged(tmp_path, frozen_head):
    rows = [
        Example(row.input_ids, row.labels, f"{name}.jsonl", row.line, 1.0 + index, index)
        for index, name in enumerate(("a", "b"))
        for row in make_rows(4, seed=index)
    ]
    model = make_adapter()
    expected, weights = {}, {}
    for name, part in (("a", rows[:4]), ("b", rows[4:])):
        losses = torch.cat([plain_losses(model, row) for row in part])
        expected[name], weights[name] = losses.mean().item(), part[0].weight * len(losses)
    without = frozenset() if frozen_head else frozenset({"frozen_head"})
    request = make_request(model, tmp_path, train=rows, without=without)
    train_adapter(make_config(max_steps=3, learning_rate=1e-12, log_every=2), request)
    for line in read_metrics(tmp_path):
        for name, loss in expected.items():
            assert line[f"loss/{name}.jsonl"] == pytest.approx(loss, abs=1e-5)
        together = sum(expected[name] * weights[name] for name in expected)
        assert line["loss"] == pytest.approx(together / sum(weights.values()), abs=1e-5)


def test_one_source_has_no_line_of_its_own(tmp_path):
    train(tmp_path, max_steps=1)
    assert not any(name.startswith("loss/") for name in read_metrics(tmp_path)[0])


def test_rows_are_seen_in_the_order_whose_hash_is_recorded(tmp_path, monkeypatch):
    seen = []
    step = AdapterTrainer.training_step

    def watched(self, model, inputs, *rest):
        seen.extend(sorted(row for one in inputs["rows"] for row in one))
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(AdapterTrainer, "training_step", watched)
    train(tmp_path, rows=make_rows(6), batch_size=1, max_steps=12)
    sampler = EpochSampler(6, seed=0)
    first = list(sampler)
    sampler.set_epoch(1)
    assert seen == first + list(sampler)
    assert hash_epochs(6, 0, 2) == sha256(np.array(seen, dtype="<i8").tobytes()).hexdigest()
    assert hash_epochs(6, 1, 2) != hash_epochs(6, 0, 2)


def test_rows_of_a_table_are_checked_like_rows_of_a_list():
    builder = ExampleTableBuilder()
    builder.add([1, 2, 3], [(2, 3)], origin=("f", 1))
    builder.add([1, 2, 3], [(0, 1)], origin=("f", 2))
    builder.add([4, 5], [], origin=("f", 3))
    table = builder.build()
    assert find_untrained(table) == find_untrained(list(table)) == [1, 2]


def test_the_last_step_and_evaluated_steps_are_logged_whatever_the_interval(tmp_path):
    result, _ = train(
        tmp_path, evaluation=make_rows(2), eval_every=3, log_every=100, save_every=100
    )
    assert [line["step"] for line in read_metrics(tmp_path) if "loss" in line] == [3, 4]
    assert result.final_loss == read_metrics(tmp_path)[-2]["loss"]


def test_evaluation_without_an_interval_happens_once_at_the_end(tmp_path):
    result, _ = train(tmp_path, evaluation=make_rows(5, seed=7))
    assert [line["step"] for line in read_metrics(tmp_path) if "eval_loss" in line] == [4]
    assert result.final_eval_loss > 0


def test_early_stopping_keeps_the_weights_of_the_best_evaluation(tmp_path):
    # Trained on one pattern at a wild rate, the loss on other rows soon rises.
    knobs = {"max_steps": 40, "eval_every": 2, "learning_rate": 0.3, "save_every": 40}
    stopping = {"patience": 2}
    evaluation = make_rows(6, seed=7)
    result, model = train(tmp_path, evaluation=evaluation, early_stopping=stopping, **knobs)
    evaluations = [line for line in read_metrics(tmp_path) if "eval_loss" in line]
    best = min(evaluations, key=lambda line: line["eval_loss"])
    assert result.stopped_by == "early_stopping"
    assert result.steps < 40
    assert result.best_checkpoint == f"checkpoints/checkpoint-{best['step']}"
    again, _ = train(
        tmp_path / "again", model=model, evaluation=evaluation, max_steps=1, learning_rate=1e-12
    )
    assert again.final_eval_loss == pytest.approx(best["eval_loss"], abs=1e-4)


def test_damaged_best_weights_are_not_kept(tmp_path):
    knobs: dict[str, Any] = {"max_steps": 6, "eval_every": 2, "learning_rate": 0.3}
    knobs |= {
        "save_every": 6,
        "evaluation": make_rows(6, seed=7),
        "early_stopping": {"patience": 9},
    }
    result, _ = train(tmp_path, **knobs)
    best = tmp_path / result.best_checkpoint
    assert best.name != "checkpoint-6"
    weights = best / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 64
    weights.write_bytes(content)
    with pytest.raises(LlmtuneError, match=f"{best.name} is damaged .*train again with --force"):
        train(tmp_path, **knobs)


def test_bfloat16_bases_train_float32_adapters(tmp_path):
    model = make_adapter(dtype=torch.bfloat16)
    train(tmp_path, model=model)
    assert {weight.dtype for weight in adapter_weights(model).values()} == {torch.float32}


@pytest.mark.parametrize("packing", ["on", "off"])
def test_a_head_that_is_trained_too_is_saved_and_continued(packing, tmp_path):
    def run(steps):
        model = add_lora(make_model("llama"), modules_to_save=["lm_head"])
        result, _ = train(tmp_path / packing, model=model, packing=packing, max_steps=steps)
        return result, adapter_weights(model)

    result, weights = run(4)
    assert "library" in result.choices["LM head"]
    head = next(name for name in weights if "lm_head" in name)
    start = adapter_weights(add_lora(make_model("llama"), modules_to_save=["lm_head"]))
    assert not torch.equal(weights[head], start[head])
    _, again = run(4)
    assert all(torch.equal(weights[name], again[name]) for name in weights)


WHOLE = LoraAdapter(rank=4, modules_to_save=["lm_head", "norm", "embed_tokens"])


def test_what_is_trained_whole_has_float32_weights_over_a_16_bit_base(tmp_path):
    """At a learning rate that suits whole modules, 16-bit weights lose most of the updates."""

    def updates(dtype, path):
        torch.manual_seed(0)
        base = make_model("llama").to(dtype)  # the same numbers for every version of torch
        model = inject_adapter(base, WHOLE).model
        start = adapter_weights(model)
        train(path, model=model, learning_rate=2e-5, warmup_ratio=0, max_steps=6, save_every=3)
        assert {name: p.dtype for name, p in adapter_weights(model).items()} == {
            name: p.dtype for name, p in start.items()
        }
        assert model(torch.arange(5, 9)[None]).logits.isfinite().all()  # as any other model
        saved = load_file(path / "checkpoints/checkpoint-6/adapter_model.safetensors")
        assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
        return {
            module: weight - start[f"base_model.model.{module}.modules_to_save.default.weight"]
            for module in ("lm_head", "model.norm", "model.embed_tokens")
            for name, weight in saved.items()
            if name == f"base_model.model.{module}.weight"
        }

    exact, found = updates(torch.float32, tmp_path / "32"), updates(torch.bfloat16, tmp_path / "16")
    for module, expected in exact.items():
        moved = expected != 0
        assert (found[module][moved] != 0).float().mean() > 0.95, module
        assert torch.cosine_similarity(found[module].flatten(), expected.flatten(), 0) > 0.9


def test_a_run_with_modules_trained_whole_continues_bit_for_bit(tmp_path):
    def run(steps, path):
        torch.manual_seed(0)
        model = inject_adapter(make_model("llama", dtype=torch.bfloat16), WHOLE).model
        train(path, model=model, max_steps=steps, save_every=2, keep_checkpoints=9)
        return adapter_weights(model)

    weights = run(4, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints/checkpoint-4")
    again = run(4, tmp_path)
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_nothing_reaches_for_the_network(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv("CI", raising=False)
    train(tmp_path, max_steps=2)


def test_no_rows_and_untrained_rows_are_refused_by_name(tmp_path):
    with pytest.raises(LlmtuneError, match="no training rows"):
        train_adapter(make_config(), make_request(make_adapter(), tmp_path, train=[]))
    bad = Example([5, 6, 7], [5, -100, -100], "rows.jsonl", 18)
    with pytest.raises(LlmtuneError, match="rows.jsonl:18"):
        train(tmp_path, rows=[*make_rows(3), bad])


def test_tensorboard_gets_the_metrics(tmp_path):
    pytest.importorskip("tensorboard")
    train(tmp_path, report_to=["tensorboard"])
    assert list((tmp_path / "tensorboard").iterdir())
