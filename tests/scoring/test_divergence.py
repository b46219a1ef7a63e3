"""KL to the base against hand sums, and its fixed points."""

import contextlib
import math
from functools import partial

import pytest
import torch

from llmtune.errors import LlmtuneError
from llmtune.scoring.divergence import compare_distributions, measure_divergence

SEQUENCES = [[5, 6, 7, 8, 9], [10, 11, 12], [20] * 9]


def test_kl_and_flips_match_a_hand_computed_case():
    base = torch.tensor([[0.5, 0.25, 0.25], [0.9, 0.05, 0.05]]).log()
    tuned = torch.tensor([[0.25, 0.5, 0.25], [0.9, 0.05, 0.05]]).log()
    kl, flipped = compare_distributions(base, tuned)
    assert kl[0] == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2), rel=1e-5)
    assert kl[1] == pytest.approx(0.0, abs=1e-6)
    assert flipped.tolist() == [True, False]


def test_positions_beyond_one_chunk_count():
    torch.manual_seed(0)
    base, tuned = torch.randn(300, 16), torch.randn(300, 16)
    kl, flipped = compare_distributions(base, tuned)
    log_base, log_tuned = base.log_softmax(-1), tuned.log_softmax(-1)
    whole = (log_base.exp() * (log_base - log_tuned)).sum(-1)
    assert kl == pytest.approx(whole.double().numpy(), rel=1e-4)
    assert flipped.tolist() == (base.argmax(-1) != tuned.argmax(-1)).tolist()


def test_an_adapter_that_does_nothing_has_no_divergence(adapted):
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    found = measure_divergence(adapted, SEQUENCES, token_budget=20)["tuned"]
    assert found.kl == pytest.approx(0.0, abs=1e-6)
    assert found.top1_flips == 0.0 and found.num_tokens.sum() == 17


@pytest.mark.parametrize("token_budget", [1, 1000])
def test_divergence_equals_the_definition_whatever_the_batches(adapted, token_budget):
    totals, flips = [], []
    for ids in SEQUENCES:
        with torch.no_grad():
            tuned = adapted(torch.tensor([ids])).logits.log_softmax(-1)
            with adapted.disable_adapter():
                base = adapted(torch.tensor([ids])).logits.log_softmax(-1)
        totals.append((base.exp() * (base - tuned)).sum().item())
        flips.append(int((base.argmax(-1) != tuned.argmax(-1)).sum()))
    found = measure_divergence(adapted, SEQUENCES, token_budget=token_budget)["tuned"]
    assert found.kl_sums == pytest.approx(totals, rel=1e-4)
    assert found.flips.tolist() == flips and sum(flips) > 0
    assert found.num_tokens.tolist() == [5, 3, 9]
    assert found.kl == pytest.approx(sum(totals) / 17, rel=1e-4) and found.kl > 1e-3


def test_every_variant_is_measured_within_its_own_block(adapted):
    layers = [m for m in adapted.modules() if isinstance(getattr(m, "scaling", None), dict)]

    @contextlib.contextmanager
    def at(strength):
        for layer in layers:
            layer.scaling["default"] *= strength
        yield
        for layer in layers:
            layer.scaling["default"] /= strength

    variants = {str(strength): partial(at, strength) for strength in (1.0, 0.5, 0.25)}
    found = measure_divergence(adapted, SEQUENCES, token_budget=20, variants=variants)
    alone = measure_divergence(adapted, SEQUENCES, token_budget=20)["tuned"]
    assert found["1.0"].kl_sums == pytest.approx(alone.kl_sums, rel=1e-5)
    assert found["1.0"].kl > found["0.5"].kl > found["0.25"].kl > 0


def test_no_sequences_have_no_divergence(adapted):
    found = measure_divergence(adapted, [], token_budget=20)["tuned"]
    assert (found.kl, found.top1_flips) == (0.0, 0.0)


def test_a_model_without_adapter_is_refused(llama):
    with pytest.raises(LlmtuneError, match="adapter"):
        measure_divergence(llama, SEQUENCES, token_budget=20)


def test_an_adapter_that_rewrote_the_base_is_refused(adapted):
    adapted.peft_config["default"].init_lora_weights = "pissa"
    with pytest.raises(LlmtuneError, match="pissa"):
        measure_divergence(adapted, SEQUENCES, token_budget=20)
