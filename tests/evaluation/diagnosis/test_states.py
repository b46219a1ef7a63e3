"""Pooled states equal transformers' own hidden states, whatever the batches."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from llmtune.evaluation.diagnosis.states import (
    decoder_layers,
    fit_standardizer,
    quarter_layers,
    read_states,
)
from tests.tiny import FAMILIES, make_model

SEQUENCES = [[5, 6, 7, 8, 9], [10], [20, 21] * 4, [30, 31, 32]]


def reference(model, ids, layer):
    """Return transformers' states after `layer` layers, float32 [T, H], before the final norm."""
    with torch.no_grad():
        states = model(torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    return states.hidden_states[layer][0].float().numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_pooled_states_and_losses_equal_the_plain_ones(family):
    model = make_model(family)
    found = read_states(model, SEQUENCES, (1,), token_budget=9, with_losses=True)
    for row, ids in enumerate(SEQUENCES):
        states = reference(model, ids, 1)
        assert found.last[1][row] == pytest.approx(states[-1], abs=1e-4)
        mean = states[1:].mean(0) if len(ids) > 1 else states[0]
        assert found.mean[1][row] == pytest.approx(mean, abs=1e-4)
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, :-1]
        targets = torch.tensor(ids[1:], dtype=torch.long)
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        assert found.losses[row] == pytest.approx(loss.item() if len(ids) > 1 else 0.0, abs=1e-3)


def test_the_adapter_is_off_and_no_hook_stays():
    plain = read_states(make_model("llama"), SEQUENCES, (1, 2), token_budget=100)
    lora = LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear")
    model = get_peft_model(make_model("llama"), lora)
    found = read_states(model, SEQUENCES, (1, 2), token_budget=100)
    for layer in (1, 2):
        assert np.allclose(found.mean[layer], plain.mean[layer], atol=1e-5)
    assert found.losses is None
    assert not any(module._forward_hooks for module in model.modules())


def test_the_quarters_of_a_model_are_layers_counted_from_one():
    assert quarter_layers(make_model("llama", num_hidden_layers=8)) == (2, 4, 6, 8)
    assert quarter_layers(make_model("llama")) == (1, 2)


def test_a_massive_channel_and_a_constant_one_rule_nothing():
    random = np.random.default_rng(0)
    states = random.normal(size=(200, 3)).astype(np.float32)
    states[:, 0] = 3e4 + 2e4 * states[:, 0]
    states[0, 0] = 1e7
    states[:, 2] = 7.0
    scaled = fit_standardizer(states).apply(states)
    assert np.abs(scaled).max() <= 5.0
    assert scaled[:, 1].std() == pytest.approx(1.0, rel=0.05)
    assert (scaled[:, 2] == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_all_texts_begin_with_runs_once_and_changes_no_state(family):
    model = make_model(family)
    sequences = [[*range(40, 52), *ids] for ids in SEQUENCES]
    found = read_states(model, sequences, (1,), token_budget=60)
    for row, ids in enumerate(sequences):
        states = reference(model, ids, 1)
        assert found.last[1][row] == pytest.approx(states[-1], abs=1e-4)
        assert found.mean[1][row] == pytest.approx(states[1:].mean(0), abs=1e-4)


def test_nothing_above_the_last_layer_asked_for_runs():
    model = make_model("llama", num_hidden_layers=4)
    ran = []
    for number, layer in enumerate(decoder_layers(model), start=1):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    read_states(model, SEQUENCES, (1, 2), token_budget=100)
    assert set(ran) == {1, 2}
