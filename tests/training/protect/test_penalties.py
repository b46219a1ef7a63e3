"""Penalties hold the adapter near its base, with the gradients of plain torch."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from llmtune.data.config import DataConfig
from llmtune.errors import LlmtuneError
from llmtune.scoring.divergence import measure_divergence
from llmtune.training.batch import StepCollator
from llmtune.training.fused.packing import packed_attention
from llmtune.training.loss import choose_loss_path, decoder_hidden
from llmtune.training.memory.arithmetic import UNLIMITED
from llmtune.training.protect import penalties
from llmtune.training.protect.config import (
    KEPT_BYTES,
    KEPT_ROWS,
    KlToBaseConfig,
    ProtectConfig,
    add_replay,
)
from llmtune.training.protect.penalties import (
    BaseProbe,
    Protection,
    ProtectionRequest,
    probe_base,
    squared_update_norm,
)
from llmtune.training.protect.prepare import as_example, rows_for_share, write_own_text
from llmtune.training.train import train_adapter
from tests.tiny import make_model
from tests.training.tiny_runs import (
    adapter_weights,
    add_lora,
    largest_difference,
    make_adapter,
    make_config,
    make_request,
    make_rows,
    shared_tokenizer,
)

KL = {"kl_to_base": {"weight": 2.0, "rows": 3, "max_length": 32}}


def general_rows(count=6):
    return [as_example(row.input_ids, "general", row.line) for row in make_rows(count, seed=9)]


def shake(model):
    """Give B random values, so that the adapter has an effect."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def make_protection(model, knobs, rows=None, probe=None):
    rows = general_rows() if rows is None else rows
    request = ProtectionRequest(ProtectConfig.model_validate(knobs), rows, probe)
    collator = StepCollator(rows, UNLIMITED, packed=False, pad_token_id=0)
    return Protection(model, request, choose_loss_path(model), collator.build, seed=0)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_the_kl_gradient_is_that_of_plain_torch(family):
    model = shake(make_adapter(family)).train()
    rows = general_rows(3)
    protection = make_protection(model, KL, rows)
    protection.add_gradients(0, nullcontext)
    ours = gradients(model)
    model.zero_grad(set_to_none=True)

    parts, tokens = [], 0
    for row in rows:
        ids = torch.tensor([row.input_ids])
        tuned = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        with torch.no_grad(), model.disable_adapter():
            base = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        parts.append((base.exp() * (base - tuned)).sum())
        tokens += len(row.input_ids) - 1
    kl = torch.stack(parts).sum() / tokens
    (2.0 * kl).backward()
    assert protection.take()["kl_to_base"] == pytest.approx(kl.item(), rel=1e-4)
    theirs = gradients(model)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert torch.allclose(ours[name], gradient, rtol=1e-3, atol=1e-6), name


def test_the_update_norm_and_its_gradient_are_those_of_the_product():
    model = shake(make_adapter()).train()
    protection = make_protection(model, {"l2": 0.3}, rows=[])
    protection.add_gradients(0, nullcontext)
    ours = gradients(model)
    model.zero_grad(set_to_none=True)
    norms = [
        (2.0 * module.lora_B["default"].weight @ module.lora_A["default"].weight).square().sum()
        for module in model.modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    ]
    (0.3 * torch.stack(norms).sum()).backward()
    assert protection.take()["update_norm"] == pytest.approx(sum(norms).item(), rel=1e-5)
    for name, gradient in gradients(model).items():
        assert torch.allclose(ours[name], gradient, rtol=1e-4, atol=1e-7), name


def test_an_unused_adapter_has_no_divergence_even_with_dropout():
    model = make_adapter(dropout=0.5).train()
    protection = make_protection(model, KL)
    protection.add_gradients(0, nullcontext)
    assert protection.take() == {"kl_to_base": 0.0}
    assert model.training


def test_every_row_takes_its_turn_and_a_step_has_the_same_rows_after_a_resume():
    model = shake(make_adapter())
    seen = []
    protection = make_protection(model, KL)
    build = protection._build
    protection._build = lambda rows: seen.append([row.line for row in rows]) or build(rows)
    for step in (0, 1, 5):
        protection.add_gradients(step, nullcontext)
    assert sorted(seen[0] + seen[1]) == [1, 2, 3, 4, 5, 6]
    assert seen[2] == seen[1]


def test_a_kl_of_every_third_step_counts_for_three_and_takes_the_rows_in_the_same_turns():
    model = shake(make_adapter())
    found = []
    for every, steps in ((1, [1]), (3, [3, 4, 5])):
        knobs = {"kl_to_base": {**KL["kl_to_base"], "every": every}}
        protection = make_protection(model, knobs)
        model.zero_grad(set_to_none=True)
        for step in steps:
            protection.add_gradients(step, nullcontext)
        found.append((protection.take(), gradients(model)))
    (kl, each), (same_kl, third) = found
    assert kl == same_kl and kl["kl_to_base"] > 0
    for name, gradient in each.items():
        assert torch.allclose(3 * gradient, third[name], rtol=1e-4, atol=1e-7), name


def test_the_base_runs_once_for_rows_that_come_together_again(monkeypatch):
    model = shake(make_adapter()).train()
    runs, real = [], decoder_hidden

    def count(model, micro_batch):
        with_adapter = not model.get_base_model().model.layers[0].mlp.up_proj.disable_adapters
        runs.append(with_adapter)
        return real(model, micro_batch)

    monkeypatch.setattr(penalties, "decoder_hidden", count)
    found = []
    for kept_bytes in (KEPT_BYTES, 0):
        monkeypatch.setattr(penalties, "KEPT_BYTES", kept_bytes)
        protection = make_protection(model, KL)
        model.zero_grad(set_to_none=True)
        for step in range(4):  # six rows, three in a step
            protection.add_gradients(step, nullcontext)
        found.append((protection.take(), gradients(model)))
        kept_states = sum(each.nbytes for each in protection._references.values())
        assert kept_states <= kept_bytes
    assert runs.count(True) == 8
    assert runs.count(False) == 2 + 4
    (kl, kept), (same_kl, anew) = found
    assert kl == same_kl
    assert all(torch.equal(kept[name], anew[name]) for name in anew)


def test_what_is_kept_of_the_base_is_what_the_planner_counts():
    model = shake(make_adapter()).train()
    rows = [as_example(range(5, 37), "general", line) for line in range(1, KEPT_ROWS + 1)]
    penalty = KlToBaseConfig(rows=24, max_length=32)
    protection = make_protection(model, {"kl_to_base": penalty}, rows)
    for steps in (1, 3, 8, 9):  # 64 rows, 24 at a time, come together as before after 8 steps
        for step in range(steps):
            protection.add_gradients(step, nullcontext)
        kept = sum(each.nbytes for each in protection._references.values())
        assert kept == penalty.kept_bytes(width=64, element_bytes=4, steps=steps)
    assert penalty.kept_bytes(width=64, element_bytes=4, steps=None) == KEPT_BYTES


@pytest.mark.parametrize("packing", ["on", "off"])
def test_a_held_run_forgets_less_and_logs_how_much(tmp_path, packing):
    rows, divergences = general_rows(), {}
    for name, knobs in {"plain": {}, "held": KL, "small": {"l2": 0.5}}.items():
        model = make_adapter()
        config = ProtectConfig.model_validate(knobs)
        request = make_request(model, tmp_path / name, packing=packing)
        held = ProtectionRequest(config, rows, probe_base(make_model("llama"), rows[0]))
        train_adapter(make_config(max_steps=12), replace(request, protection=held))
        sequences = [row.input_ids for row in rows]
        [measured] = measure_divergence(model, sequences, token_budget=512).values()
        divergences[name] = measured.kl
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        logged = [json.loads(line) for line in lines]
        assert ("kl_to_base" in logged[-1]) == (name == "held")
        assert ("update_norm" in logged[-1]) == (name == "small")
        if name == "held":
            assert logged[0]["kl_to_base"] == pytest.approx(0, abs=1e-6)
            assert logged[-1]["kl_to_base"] > 0
    assert divergences["held"] < 0.5 * divergences["plain"]
    assert divergences["small"] < 0.5 * divergences["plain"]


def test_a_resumed_run_ends_where_the_straight_one_did(tmp_path):
    protection = ProtectionRequest(ProtectConfig.model_validate(KL), general_rows())
    ends = {}
    for name in ("straight", "resumed"):
        model = make_adapter()
        request = make_request(model, tmp_path / name, protection=protection)
        if name == "resumed":
            train_adapter(make_config(max_steps=6, save_every=3), request)
            for path in (tmp_path / name / "checkpoints").glob("*6"):
                path.rename(tmp_path / "gone")
            model = make_adapter()
            request = replace(request, model=model)
        train_adapter(make_config(max_steps=6, save_every=3), request)
        ends[name] = adapter_weights(model)
    assert largest_difference(ends["straight"], ends["resumed"]) == 0


def test_a_different_base_under_the_adapter_is_refused():
    rows = general_rows()
    probe = probe_base(make_model("llama"), rows[0])
    make_protection(make_adapter(), KL, probe=probe)
    with pytest.raises(LlmtuneError, match="switched off is not the base"):
        make_protection(make_adapter(), KL, probe=BaseProbe(probe.input_ids, -probe.hidden))


@pytest.mark.parametrize(("noise", "is_the_base"), [(0.016, True), (0.095, False)])
def test_what_kernels_differ_by_is_still_the_base(noise, is_the_base):
    rows = general_rows()
    probe = probe_base(make_model("llama"), rows[0])
    direction = torch.randn(probe.hidden.shape, generator=torch.Generator().manual_seed(3))
    off = probe.hidden + direction * (noise * probe.hidden.norm() / direction.norm())
    expectation = nullcontext() if is_the_base else pytest.raises(LlmtuneError, match="9.5%")
    with expectation:
        make_protection(make_adapter(), KL, probe=BaseProbe(probe.input_ids, off))


def test_what_cannot_be_held_is_refused():
    trained_head = add_lora(make_model("llama"), modules_to_save=["lm_head"])
    with pytest.raises(LlmtuneError, match="kl_to_base needs a frozen linear LM head"):
        make_protection(trained_head, KL)
    with pytest.raises(LlmtuneError, match="plain LoRA"):
        make_protection(add_lora(make_model("llama"), use_dora=True), {"l2": 0.1})


def test_the_base_writes_the_same_rows_for_the_same_seed():
    model, tokenizer = make_model("llama"), shared_tokenizer()
    knobs = {"num_rows": 5, "num_tokens": 24}
    rows = write_own_text(model, tokenizer, seed=1, **knobs)
    assert rows == write_own_text(model, tokenizer, seed=1, **knobs)
    assert rows != write_own_text(model, tokenizer, seed=2, **knobs)
    assert all(row.labels == row.input_ids for row in rows)


def test_a_share_counts_the_rows_it_adds():
    assert rows_for_share(95, 0.05) == 5
    assert rows_for_share(10, 0.5) == 10


def test_a_replay_file_becomes_a_train_source_with_its_share():
    data = DataConfig.model_validate({"train": [{"path": "a.jsonl"}]})
    protect = ProtectConfig.model_validate({"replay": {"source": "prose.txt", "share": 0.2}})
    mixed = add_replay(data, protect)
    assert [(source.path, source.replay) for source in mixed.train] == [
        ("a.jsonl", False),
        ("prose.txt", True),
    ]
    assert mixed.mixture.replay_share == 0.2
    assert add_replay(data, ProtectConfig()) is data
    with pytest.raises(LlmtuneError, match="the same thing"):
        add_replay(mixed, protect)


def test_own_text_is_no_file():
    own = ProtectConfig.model_validate({"replay": {"source": "self"}})
    assert own.needs_own_text and not own.needs_penalty
    assert not ProtectConfig.model_validate({"replay": {"source": "./self"}}).needs_own_text


def test_norms_of_other_scalings_add_up():
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])
    assert squared_update_norm([(a, b, 0.5), (a, b, 2.0)]).item() == pytest.approx(45 * 4.25)


def test_packed_rows_are_compared_one_by_one():
    model = shake(make_adapter()).train()
    rows = general_rows(3)
    values, head = {}, choose_loss_path(model)
    for packed in (False, True):
        collator = StepCollator(rows, UNLIMITED, packed=packed, pad_token_id=0)
        request = ProtectionRequest(ProtectConfig.model_validate(KL), rows)
        with packed_attention(model) if packed else nullcontext():
            protection = Protection(model, request, head, collator.build, seed=0)
            protection.add_gradients(0, nullcontext)
        values[packed] = protection.take()["kl_to_base"]
    assert values[True] == pytest.approx(values[False], rel=1e-5)
