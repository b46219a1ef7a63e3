"""A run that learns nothing or breaks is stopped at once, with names."""

import pytest
import torch
from transformers import TrainerControl, TrainerState

from llmtune.errors import LlmtuneError
from llmtune.training import checkpoint as checkpoints
from llmtune.training.callbacks import BestCheckpoint
from llmtune.training.config import EarlyStopping
from llmtune.training.request import RunTotals
from llmtune.training.train import train_adapter
from tests.training.tiny_runs import adapted_layers, make_adapter, make_config, make_request


def test_a_cut_off_adapter_is_named_by_step_two(tmp_path):
    model = make_adapter()
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    # The layer's adapter still holds parameters, but its output no longer depends on them.
    layer.forward = layer.get_base_layer().forward
    with pytest.raises(LlmtuneError, match=r"no gradient by step 1.*layers.1.mlp.down_proj.lora_B"):
        train_adapter(make_config(), make_request(model, tmp_path))


def test_an_adapter_whose_first_half_is_detached_is_named_by_step_two(tmp_path):
    model = make_adapter()
    lora_a = adapted_layers(model)[0].lora_A["default"]
    lora_a.register_forward_hook(lambda _module, _inputs, output: output.detach())
    with pytest.raises(LlmtuneError, match=r"no gradient by step 2.*q_proj.lora_A"):
        train_adapter(make_config(), make_request(model, tmp_path))


def test_a_learning_rate_that_saturates_the_model_is_named(tmp_path):
    config = make_config(learning_rate=3e4, warmup_ratio=0, max_grad_norm=0)
    with pytest.raises(LlmtuneError, match=r"train\.learning_rate") as caught:
        train_adapter(config, make_request(make_adapter(), tmp_path))
    assert "target_modules" not in str(caught.value)


@pytest.mark.parametrize("losses", [[float("nan"), 2.0, 1.0], [2.0, float("nan"), 1.0]])
def test_an_evaluation_that_is_not_a_number_is_never_the_best(losses):
    totals = RunTotals()
    watch = BestCheckpoint(totals, EarlyStopping(patience=3))
    for step, loss in enumerate(losses, start=1):
        state, control = TrainerState(global_step=step), TrainerControl()
        watch.on_evaluate(None, state, control, {"eval_loss": loss})
    assert (totals.best_step, totals.best_eval_loss) == (3, 1.0)


@pytest.mark.parametrize("log_every", [1, 10])
def test_a_loss_that_is_not_finite_stops_within_three_steps_with_its_rows(log_every, tmp_path):
    model = make_adapter()
    steps = []

    def break_third_step(_module, _inputs, output):
        if model.training and torch.is_grad_enabled():
            steps.append(1)
            # Two passes before step 1: the measurement and the dry run.
            if len(steps) == 2 + 3:
                return output * float("inf")
        return output

    model.get_base_model().model.norm.register_forward_hook(break_third_step)
    config = make_config(max_steps=30, log_every=log_every, save_every=1)
    with pytest.raises(LlmtuneError, match=r"step [345] is not finite.*rows.jsonl:\d+"):
        train_adapter(config, make_request(model, tmp_path, packing="off"))
    for found in checkpoints.list_checkpoints(tmp_path / "checkpoints"):
        checkpoints.check_files(found)
        assert checkpoints.step_of(found) <= 3


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    model = make_adapter()
    with pytest.raises(LlmtuneError, match="not finite|NaN"):
        train_adapter(
            make_config(learning_rate=1e38, max_grad_norm=0, max_steps=30, save_every=1),
            make_request(model, tmp_path),
        )
    for found in checkpoints.list_checkpoints(tmp_path / "checkpoints"):
        from safetensors.torch import load_file

        state = load_file(found / "adapter_model.safetensors")
        assert all(tensor.isfinite().all() for tensor in state.values())
