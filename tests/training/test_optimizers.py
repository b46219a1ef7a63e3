"""Every optimizer trains, keeps the state that the plan counts, and continues where it stopped."""

from typing import get_args

import pytest
import torch

from llmtune.errors import LlmtuneError
from llmtune.training.config import OptimizerName
from llmtune.training.optimizers import OPTIMIZERS, group_parameters
from llmtune.training.train import train_adapter
from tests.training.tiny_runs import (
    adapter_weights,
    largest_difference,
    make_adapter,
    make_config,
    make_request,
)

NAMES = ["m.q_proj.lora_A", "m.q_proj.lora_B", "m.norm.weight", "lm_head.weight"]


def train(path, **knobs):
    model = make_adapter()
    train_adapter(make_config(**knobs), make_request(model, path))
    return adapter_weights(model)


def tensors_in(state):
    if torch.is_tensor(state):
        return [state]
    return [v for child in state.values() for v in tensors_in(child)] if type(state) is dict else []


@pytest.mark.parametrize("optimizer", sorted(set(get_args(OptimizerName)) - {"paged_adamw_8bit"}))
def test_every_optimizer_moves_the_weights_and_resumes_exactly(tmp_path, optimizer):
    knobs = {"optimizer": optimizer, "save_every": 2}
    before = adapter_weights(make_adapter())
    straight = train(tmp_path / "straight", max_steps=4, **knobs)
    assert largest_difference(before, straight) > 0

    for checkpoint in (tmp_path / "straight" / "checkpoints").glob("*4"):
        checkpoint.rename(tmp_path / "later")
    state = torch.load(
        next((tmp_path / "straight" / "checkpoints").glob("*2")) / "optimizer.pt", weights_only=True
    )
    per_weight = OPTIMIZERS[optimizer].state_bytes
    kept = [value.nbytes for value in tensors_in(state["state"]) if value.numel() > 1]
    if "8bit" not in optimizer and optimizer != "adafactor":  # small tensors keep 32 bits there
        assert sum(kept) == per_weight * sum(value.numel() for value in straight.values())
    resumed = train(tmp_path / "straight", max_steps=4, **knobs)
    assert largest_difference(straight, resumed) == 0


def test_paged_memory_without_a_gpu_is_refused(tmp_path):
    with pytest.raises(LlmtuneError, match="adamw_8bit keeps the same state"):
        train(tmp_path, optimizer="paged_adamw_8bit", max_steps=1)


def test_a_learning_rate_of_its_own_goes_to_the_longest_key_that_fits():
    config = make_config(
        learning_rate=1e-4, weight_decay=0.1, learning_rates={"lora_B": 1e-3, "lm_head": 1e-5}
    )
    groups = group_parameters(NAMES, [name for name in NAMES if "norm" not in name], config)
    assert {name: group.learning_rate for group in groups for name in group.names} == {
        "m.q_proj.lora_A": 1e-4,
        "m.q_proj.lora_B": 1e-3,
        "m.norm.weight": 1e-4,
        "lm_head.weight": 1e-5,
    }
    assert [group.weight_decay for group in groups if "m.norm.weight" in group.names] == [0.0]


def test_a_key_without_a_parameter_is_refused():
    with pytest.raises(LlmtuneError, match="lora_C is in no trained parameter's name"):
        group_parameters(NAMES, NAMES, make_config(learning_rates={"lora_C": 1e-3}))


def test_parameters_move_by_their_own_learning_rate(tmp_path):
    knobs = {"max_steps": 1, "warmup_ratio": 0, "learning_rate": 1e-4}
    before = adapter_weights(make_adapter())
    plain = train(tmp_path / "plain", **knobs)
    faster = train(tmp_path / "faster", learning_rates={"lora_B": 1.6e-3}, **knobs)
    for name, start in before.items():
        factor = 16 if "lora_B" in name else 1
        torch.testing.assert_close(
            faster[name] - start, factor * (plain[name] - start), rtol=1e-3, atol=1e-8
        )
