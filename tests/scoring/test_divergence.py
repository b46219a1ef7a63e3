"""KL to the base against scipy-free hand sums, and its fixed points."""

import math

import pytest
import torch

from llmtune.errors import LlmtuneError
from llmtune.scoring.divergence import compare_distributions, measure_divergence

SEQUENCES = [[5, 6, 7, 8, 9], [10, 11, 12], [20] * 9]


def test_kl_and_agreement_match_a_hand_computed_case():
    base = torch.tensor([[[0.5, 0.25, 0.25], [0.9, 0.05, 0.05]]]).log()
    tuned = torch.tensor([[[0.25, 0.5, 0.25], [0.9, 0.05, 0.05]]]).log()
    kl, agreements, tokens = compare_distributions(base, tuned, torch.ones(1, 2).bool())
    assert kl == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2), rel=1e-5)
    assert (agreements, tokens) == (1, 2)


def test_masked_positions_do_not_count():
    base, tuned = torch.randn(2, 200, 16), torch.randn(2, 200, 16)
    mask = torch.zeros(2, 200).bool()
    mask[0, :150] = True
    found = compare_distributions(base, tuned, mask)
    expected = compare_distributions(base[:1, :150], tuned[:1, :150], torch.ones(1, 150).bool())
    assert found == expected and found[2] == 150


def test_an_adapter_that_does_nothing_has_no_divergence(adapted):
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    found = measure_divergence(adapted, SEQUENCES, token_budget=20)
    assert found.kl == pytest.approx(0.0, abs=1e-6)
    assert found.top1_agreement == 1.0 and found.num_tokens == 17


@pytest.mark.parametrize("token_budget", [1, 1000])
def test_divergence_equals_the_definition_whatever_the_batches(adapted, token_budget):
    total = 0.0
    for ids in SEQUENCES:
        with torch.no_grad():
            tuned = adapted(torch.tensor([ids])).logits.log_softmax(-1)
            with adapted.disable_adapter():
                base = adapted(torch.tensor([ids])).logits.log_softmax(-1)
        total += (base.exp() * (base - tuned)).sum().item()
    found = measure_divergence(adapted, SEQUENCES, token_budget=token_budget)
    assert found.kl == pytest.approx(total / 17, rel=1e-4) and found.kl > 1e-3


def test_a_model_without_adapter_is_refused(llama):
    with pytest.raises(LlmtuneError, match="adapter"):
        measure_divergence(llama, SEQUENCES, token_budget=20)


def test_an_adapter_that_rewrote_the_base_is_refused(adapted):
    adapted.peft_config["default"].init_lora_weights = "pissa"
    with pytest.raises(LlmtuneError, match="pissa"):
        measure_divergence(adapted, SEQUENCES, token_budget=20)
