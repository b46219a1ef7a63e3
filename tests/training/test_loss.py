"""Our loss equals the library's, and where it would not the library's is taken."""

import pytest
import torch

from llmtune.training.batch import StepCollator, pad_rows
from llmtune.training.loss import LossPath, choose_loss_path, summed_loss
from llmtune.training.memory.arithmetic import UNLIMITED
from tests.tiny import FAMILIES, make_model
from tests.training.tiny_runs import add_lora, make_adapter, make_rows


@pytest.mark.parametrize("family", FAMILIES)
def test_the_frozen_path_equals_the_librarys_in_value_and_gradient(family):
    model = make_adapter(family).eval()
    choice = choose_loss_path(model)
    assert choice.is_frozen
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.1)
    collator = StepCollator(make_rows(4), UNLIMITED, packed=False, pad_token_id=0)
    (batch,) = collator.collate(range(4))["micro_batches"]
    losses, gradients = [], []
    for path in (choice, LossPath(False, "library")):
        loss = summed_loss(model, batch, path)
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6, rtol=1e-3)


def test_a_soft_cap_and_a_scale_are_read_from_the_config():
    capped = choose_loss_path(make_adapter("gemma2", final_logit_softcapping=3.0))
    assert (capped.is_frozen, capped.softcap) == (True, 3.0)
    granite = add_lora(make_model("llama").eval())
    assert choose_loss_path(granite).scale == 1.0


@pytest.mark.parametrize(
    ("family", "knob"), [("granite", {"logits_scaling": 4.0}), ("cohere", {"logit_scale": 0.25})]
)
def test_scaled_logits_use_the_frozen_path_with_their_scale(family, knob):
    choice = choose_loss_path(make_adapter(family, num_key_value_heads=2, **knob))
    assert choice.is_frozen
    assert choice.scale == 0.25


def test_a_trained_head_takes_the_librarys_path():
    model = add_lora(make_model("llama"), modules_to_save=["lm_head"])
    choice = choose_loss_path(model)
    assert not choice.is_frozen
    batch = pad_rows(make_rows(2), 0)
    loss = summed_loss(model, batch, choice)
    loss.backward()
    head = model.get_base_model().get_output_embeddings()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in head.parameters())


def test_a_head_that_does_something_unknown_takes_the_librarys_path():
    model = make_adapter()
    base = model.get_base_model()
    inner = base.forward

    def shifted(*inputs, **options):
        output = inner(*inputs, **options)
        output.logits = output.logits * 1.5
        return output

    base.forward = shifted
    choice = choose_loss_path(model)
    assert not choice.is_frozen
    assert "differ" in choice.reason
