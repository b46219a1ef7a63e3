"""The chunked KL equals plain torch in value and gradient."""

import pytest
import torch

from llmtune.ops import linear_cross_entropy
from llmtune.ops.linear_cross_entropy import FrozenHead
from llmtune.ops.linear_kl import linear_kl_divergence

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2}


def plain_kl(hidden, reference, head):
    def distribution(states):
        logits = states.to(head.weight_VD.dtype) @ head.weight_VD.T
        logits = logits if head.bias_V is None else logits + head.bias_V
        logits = logits.double() * head.logit_scale
        if head.logit_softcap is not None:
            logits = torch.tanh(logits / head.logit_softcap) * head.logit_softcap
        return logits.log_softmax(-1)

    base, tuned = distribution(reference), distribution(hidden)
    return (base.exp() * (base - tuned)).sum()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("bias", "softcap", "scale"), [(False, None, 1.0), (True, 5.0, 0.5), (False, 2.0, 1.0)]
)
@pytest.mark.parametrize("chunk", [1, 3, 7, 64, None])
def test_value_and_gradient_are_those_of_plain_torch(dtype, bias, softcap, scale, chunk):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(23, 8, generator=generator).to(dtype)
    head = FrozenHead(
        weight, torch.randn(23, generator=generator).to(dtype) if bias else None, softcap, scale
    )
    reference = torch.randn(7, 8, generator=generator).to(dtype)
    hidden = torch.randn(7, 8, generator=generator).to(dtype).requires_grad_()
    ours = linear_kl_divergence(hidden, reference, head, chunk_size=chunk)
    (3 * ours).backward()
    found, hidden.grad = hidden.grad.clone(), None
    (3 * plain_kl(hidden, reference, head)).backward()
    close = TOLERANCES[dtype]
    assert ours.item() == pytest.approx(
        plain_kl(hidden, reference, head).item(), rel=close, abs=close
    )
    scale_of = hidden.grad.abs().max().clamp(min=1e-9)
    assert ((found - hidden.grad).abs().max() / scale_of).item() < close


def test_tiles_within_a_chunk_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    head = FrozenHead(torch.randn(23, 8, generator=generator).double(), None, 5.0, 0.5)
    reference, hidden = torch.randn(2, 7, 8, generator=generator).double()
    hidden.requires_grad_()
    whole = linear_kl_divergence(hidden, reference, head)
    (gradient,) = torch.autograd.grad(whole, hidden)
    monkeypatch.setattr(linear_cross_entropy, "CPU_TILE_BYTES", 3 * 23 * 8 * 4)  # three rows
    tiled = linear_kl_divergence(hidden, reference, head)
    torch.testing.assert_close(tiled, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(tiled, hidden)[0], gradient)


def test_equal_states_have_no_divergence_and_no_gradient():
    head = FrozenHead(torch.randn(11, 4))
    states = torch.randn(5, 4, requires_grad=True)
    value = linear_kl_divergence(states, states.detach(), head)
    value.backward()
    assert value.item() == 0
    assert states.grad.abs().max().item() == 0


def test_no_positions_are_no_divergence():
    head = FrozenHead(torch.randn(11, 4))
    states = torch.zeros(0, 4, requires_grad=True)
    value = linear_kl_divergence(states, torch.zeros(0, 4), head)
    value.backward()
    assert value.item() == 0


def test_a_trained_head_and_other_shapes_are_refused():
    with pytest.raises(ValueError, match="trainable"):
        head = FrozenHead(torch.randn(11, 4, requires_grad=True))
        linear_kl_divergence(torch.zeros(2, 4), torch.zeros(2, 4), head)
    with pytest.raises(ValueError, match="one shape"):
        linear_kl_divergence(torch.zeros(2, 4), torch.zeros(3, 4), FrozenHead(torch.randn(11, 4)))


def test_a_factor_beyond_float16_is_no_infinity():
    generator = torch.Generator().manual_seed(0)
    head = FrozenHead(torch.randn(23, 8, generator=generator).half())
    reference = torch.randn(7, 8, generator=generator).half()
    hidden = (reference + 0.01).requires_grad_()
    (linear_kl_divergence(hidden, reference, head) * 65536.0).backward()
    assert hidden.grad.isfinite().all() and hidden.grad.abs().max() > 0
