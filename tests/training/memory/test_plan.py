"""Micro-batches fill the memory that is there; layers are recomputed only when they must be."""

import gc
from dataclasses import replace

import pytest
import torch

from llmtune.errors import LlmtuneError
from llmtune.training.batch import StepCollator
from llmtune.training.memory import dry_run
from llmtune.training.memory.arithmetic import (
    UNLIMITED_TOKENS,
    ActivationCost,
    BatchLimits,
    RowSizes,
    plan_memory,
)
from llmtune.training.memory.dry_run import (
    Trial,
    dry_run_save,
    dry_run_step,
    recomputable_layers,
    recomputing,
)
from llmtune.training.memory.measure import measure_activations
from llmtune.training.train import train_adapter
from tests.training.tiny_runs import make_adapter, make_config, make_request, make_rows

COST = ActivationCost(layers=10, layer_bytes=1000, recomputed_layer_bytes=100, other_bytes=0)


def plan(available, *, micro_batch_size="auto", checkpointing="auto"):
    return plan_memory(
        COST,
        available,
        RowSizes(longest=500, step=8000),
        useful_tokens=4096,
        micro_batch_size=micro_batch_size,
        checkpointing=checkpointing,
    )


def test_with_memory_to_spare_nothing_is_recomputed():
    roomy = plan(1e12)
    assert roomy.recomputed_layers == 0
    assert roomy.limits == BatchLimits(None, 4096)


def test_micro_batches_shrink_before_layers_are_recomputed():
    tight = plan(2000 * COST.bytes_a_token(0))
    assert tight.recomputed_layers == 0
    assert 1990 <= tight.limits.tokens <= 2000


def test_as_few_layers_as_needed_are_recomputed():
    tighter = plan(1024 * COST.bytes_a_token(4))
    assert tighter.recomputed_layers == 4
    assert tighter.needed_bytes <= 1024 * COST.bytes_a_token(4)


def test_what_never_fits_is_left_to_the_dry_run():
    hopeless = plan(1)
    assert hopeless.recomputed_layers == 10
    assert hopeless.limits.tokens == 500


def test_explicit_settings_are_followed():
    explicit = plan(1e12, micro_batch_size=3, checkpointing=True)
    assert explicit.limits == BatchLimits(3, UNLIMITED_TOKENS)
    assert explicit.recomputed_layers == 10
    assert plan(1, checkpointing=False).recomputed_layers == 0


def forward(model):
    ids = torch.arange(4, 68)[None]
    return model.get_base_model().base_model(input_ids=ids, use_cache=False).last_hidden_state


def test_the_measured_cost_is_what_recomputation_saves():
    model = make_adapter().train()
    layers = recomputable_layers(model)
    cost = measure_activations(model, layers, lambda: forward(model), 64)
    assert cost.layers == 2
    with recomputing(model, 2):
        kept = measure_activations(model, layers, lambda: forward(model), 64)
    saved = kept.layer_bytes * 2 + kept.other_bytes
    predicted = 2 * cost.recomputed_layer_bytes + cost.other_bytes
    # The cosines of the rotary embedding are shared inputs that recomputation keeps too.
    assert predicted <= saved <= 1.5 * predicted
    assert cost.layer_bytes > 10 * cost.recomputed_layer_bytes


def count_tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_measuring_keeps_no_activation():
    model = make_adapter().train()
    forward(model)
    before = count_tensors()
    measure_activations(model, recomputable_layers(model), lambda: forward(model), 64)
    assert count_tensors() <= before


def test_out_of_memory_names_the_length_and_two_settings(tmp_path):
    def run_out():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(LlmtuneError, match="500 tokens.*max_length=250.*micro_batch_size=1"):
        dry_run_step(run_out, longest=500, plan=plan(1))


def test_a_part_of_the_base_that_leaves_no_room_asks_for_what_sharding_takes(monkeypatch):
    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(dry_run, "measure_activations", run_out)
    collator = StepCollator(make_rows(4), BatchLimits(None, 512), packed=True, pad_token_id=0)
    trial = Trial(make_adapter(), collator, lambda _: None, is_joint=True)
    with pytest.raises(LlmtuneError, match=r"more processes.*data\.max_length"):
        trial.measure()


def run_out_above(model, tokens):
    """Let the model's first layer fail like a full GPU when it gets more than `tokens` tokens."""

    def fail(_module, inputs, output):
        if inputs[0].shape[0] * inputs[0].shape[1] > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.get_base_model().model.layers[0].register_forward_hook(fail)


def test_micro_batches_are_halved_until_the_dry_run_fits(tmp_path):
    model = make_adapter()
    run_out_above(model, 300)
    request = make_request(model, tmp_path, train=make_rows(20, longest=60))
    result = train_adapter(make_config(batch_size=16), request)
    tokens = int(result.choices["micro-batch"].split()[2])
    assert 60 <= tokens <= 300


def test_a_first_row_too_long_for_the_measurement_does_not_end_the_run(tmp_path):
    model = make_adapter()
    layer = model.get_base_model().model.layers[0]
    failed = []

    def fail_once(_module, inputs, _output):
        if inputs[0].shape[0] * inputs[0].shape[1] > 150 and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory")

    layer.register_forward_hook(fail_once)
    long = replace(make_rows(1)[0], input_ids=[5] * 200, labels=[5] * 200)
    request = make_request(model, tmp_path, train=[long, *make_rows(8)])
    assert train_adapter(make_config(max_steps=1), request).steps == 1
    assert failed


def test_recomputation_that_is_asked_for_and_not_offered_is_refused(tmp_path, monkeypatch):
    model = make_adapter()
    monkeypatch.setattr(type(model.get_base_model()), "supports_gradient_checkpointing", False)
    config = make_config(gradient_checkpointing=True)
    with pytest.raises(LlmtuneError, match="no gradient checkpointing"):
        train_adapter(config, make_request(model, tmp_path))


def test_a_row_that_never_fits_is_an_error_before_step_one(tmp_path):
    model = make_adapter()
    run_out_above(model, 300)
    rows = make_rows(20, longest=40) + make_rows(20, longest=420)
    request = make_request(model, tmp_path, train=rows, packing="off")
    with pytest.raises(LlmtuneError, match=r"longest row has \d+ tokens.*max_length=\d+"):
        train_adapter(make_config(batch_size=2), request)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_other_errors_of_the_dry_run_are_not_hidden():
    def fail():
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        dry_run_step(fail, longest=5, plan=plan(1))


def test_a_cpu_that_cannot_allocate_is_out_of_memory():
    def allocate():
        torch.empty(2**60, dtype=torch.float32)

    with pytest.raises(LlmtuneError, match="does not fit the memory"):
        dry_run_step(allocate, longest=5, plan=plan(1))


def test_a_generation_config_that_cannot_be_saved_is_found_before_step_one(tmp_path):
    model = make_adapter()
    model.get_base_model().generation_config.do_sample = False
    model.get_base_model().generation_config.temperature = 0.3
    with pytest.raises(LlmtuneError, match="generation_config.json"):
        train_adapter(make_config(), make_request(model, tmp_path))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_directory_that_cannot_be_written_is_found_before_step_one(tmp_path):
    (tmp_path / "run").write_text("a file where the run should be")
    request = make_request(make_adapter(), tmp_path / "run")
    with pytest.raises(LlmtuneError, match="cannot write into"):
        dry_run_save(request.model, request.tokenizer, request.run)


def test_the_save_dry_run_leaves_nothing_behind(tmp_path):
    request = make_request(make_adapter(), tmp_path / "run")
    dry_run_save(request.model, request.tokenizer, request.run)
    assert list((tmp_path / "run").iterdir()) == []
