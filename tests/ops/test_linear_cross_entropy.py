"""The frozen-head cross-entropy against plain torch: value, gradient, edges, memory, isolation."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmtune.ops import linear_cross_entropy as op
from llmtune.ops.linear_cross_entropy import linear_cross_entropy, select_labelled

WIDTH, VOCAB = 16, 97
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"logit_softcap": 3.0},
    "scale": {"logit_scale": 0.25},
    "bias": {"bias_V": True},
    "everything": {"logit_softcap": 2.0, "logit_scale": 0.5, "bias_V": True},
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def make_inputs(num_tokens: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, WIDTH, generator=generator, dtype=torch.float64)
    head = torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCAB, (num_tokens,), generator=generator)
    weights = torch.rand(num_tokens, generator=generator, dtype=torch.float64)
    return hidden.to(dtype).requires_grad_(), head.to(dtype), labels, weights


def make_options(name: str, dtype: torch.dtype) -> dict:
    options = dict(HEADS[name])
    if "bias_V" in options:
        generator = torch.Generator().manual_seed(1)
        bias = torch.randn(VOCAB, generator=generator, dtype=torch.float64)
        options["bias_V"] = bias.to(dtype)
    return options


def plain_loss(
    hidden, head, labels, weights=None, *, bias_V=None, logit_softcap=None, logit_scale=1.0
) -> Tensor:
    """What transformers computes: the model's own product, then a float32 cross-entropy."""
    logits = F.linear(hidden, head, bias_V)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = logits * logit_scale
    if logit_softcap is not None:
        logits = torch.tanh(logits / logit_softcap) * logit_softcap
    losses = F.cross_entropy(logits, labels, reduction="none")
    return (losses if weights is None else losses * weights.to(losses.dtype)).sum()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("is_weighted", [False, True])
def test_value_and_gradient_equal_plain_torch(name, is_weighted, dtype):
    hidden, head, labels, weights = make_inputs(23, dtype)
    weights = weights if is_weighted else None
    options = make_options(name, dtype)
    loss = linear_cross_entropy(hidden, head, labels, weights_T=weights, chunk_size=7, **options)
    expected = plain_loss(hidden, head, labels, weights, **options)
    (gradient,) = torch.autograd.grad(3.0 * loss, hidden)
    (expected_gradient,) = torch.autograd.grad(3.0 * expected, hidden)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient, expected_gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", HEADS)
def test_bfloat16_gradient_is_as_close_to_the_truth_as_plain_torch(name):
    hidden, head, labels, weights = make_inputs(64, torch.bfloat16)
    options = make_options(name, torch.bfloat16)
    exact_options = {k: v.double() if torch.is_tensor(v) else v for k, v in options.items()}
    weights = weights / len(weights)  # the mean folded in, as a training step does it
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = plain_loss(exact_hidden, head.double(), labels, weights, **exact_options)
    (truth,) = torch.autograd.grad(exact, exact_hidden)

    def error(loss: Tensor) -> float:
        (gradient,) = torch.autograd.grad(loss, hidden)
        return float((gradient.double() - truth).norm() / truth.norm())

    loss = linear_cross_entropy(hidden, head, labels, weights_T=weights, chunk_size=9, **options)
    assert loss.dtype == torch.float32
    assert abs(float(loss.detach()) - float(exact.detach())) < 0.02 * float(exact.detach())
    stock = error(plain_loss(hidden, head, labels, weights, **options))
    assert error(loss) <= 1.25 * stock


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 22, 23, 24, 1000])
def test_chunk_size_changes_nothing(chunk_size):
    hidden, head, labels, _ = make_inputs(23, torch.float64)
    loss = linear_cross_entropy(hidden, head, labels, chunk_size=chunk_size)
    torch.testing.assert_close(loss, plain_loss(hidden, head, labels), rtol=1e-12, atol=1e-12)


def test_tiles_within_a_chunk_change_nothing(monkeypatch):
    hidden, head, labels, weights = make_inputs(23, torch.float64)
    whole = linear_cross_entropy(hidden, head, labels, weights_T=weights)
    (whole_gradient,) = torch.autograd.grad(whole, hidden)
    monkeypatch.setattr(op, "CPU_TILE_BYTES", 3 * VOCAB * 8 * 2)  # three rows of two buffers
    tiled = linear_cross_entropy(hidden, head, labels, weights_T=weights)
    (tiled_gradient,) = torch.autograd.grad(tiled, hidden)
    torch.testing.assert_close(tiled, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tiled_gradient, whole_gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_tokens", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_empty_and_single_token_batches(num_tokens, dtype):
    hidden, head, labels, _ = make_inputs(num_tokens, dtype)
    loss = linear_cross_entropy(hidden, head, labels)
    torch.testing.assert_close(loss, plain_loss(hidden, head, labels), rtol=1e-2, atol=1e-6)
    loss.backward()
    assert hidden.grad.shape == hidden.shape
    assert hidden.grad.isfinite().all()


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[300.0], [-300.0]], requires_grad=True)
    head = torch.tensor([[1.0], [-1.0], [0.5]])
    loss = linear_cross_entropy(hidden, head, torch.tensor([1, 1]))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(600.0)
    assert hidden.grad.isfinite().all()


def test_a_token_of_weight_zero_has_no_influence():
    hidden, head, labels, _ = make_inputs(4, torch.float64)
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0])
    loss = linear_cross_entropy(hidden, head, labels, weights_T=weights)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert gradient[1].abs().max() == 0.0
    assert gradient[0].abs().max() > 0.0


def test_evaluation_computes_the_same_loss_without_a_gradient():
    hidden, head, labels, _ = make_inputs(23, torch.float32)
    trained = linear_cross_entropy(hidden, head, labels, chunk_size=5)
    with torch.no_grad():
        evaluated = linear_cross_entropy(hidden, head, labels, chunk_size=5)
    assert evaluated.grad_fn is None
    assert torch.equal(trained, evaluated)


def test_backward_twice_gives_the_same_gradient():
    hidden, head, labels, _ = make_inputs(5, torch.float64)
    loss = linear_cross_entropy(hidden, head, labels)
    (first,) = torch.autograd.grad(2 * loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(2 * loss, hidden)
    assert torch.equal(first, second)


def test_only_the_hidden_gradient_is_kept_for_backward():
    hidden, head, labels, _ = make_inputs(50, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear_cross_entropy(hidden, head, labels, chunk_size=8)
    assert [tuple(tensor.shape) for tensor in saved] == [tuple(hidden.shape)]


def test_a_trainable_head_is_refused():
    hidden, head, labels, _ = make_inputs(3, torch.float32)
    with pytest.raises(ValueError, match="freeze the head"):
        linear_cross_entropy(hidden, head.requires_grad_(), labels)


def test_wrong_shapes_are_named():
    hidden, head, labels, _ = make_inputs(3, torch.float32)
    with pytest.raises(ValueError, match=r"labels_T has shape \(2,\), expected \(3,\)"):
        linear_cross_entropy(hidden, head, labels[:2])


def test_selected_positions_give_the_usual_shifted_loss():
    torch.manual_seed(0)
    hidden = torch.randn(2, 6, WIDTH, dtype=torch.float64)
    head = torch.randn(VOCAB, WIDTH, dtype=torch.float64)
    labels = torch.randint(VOCAB, (2, 6))
    labels[0, :3] = -100
    labels[1, 4:] = -100
    positions = torch.tensor([2, 3, 4, 6, 7, 8])  # each one before a label
    loss = linear_cross_entropy(
        select_labelled(hidden, positions), head, labels.flatten()[positions + 1]
    )
    shifted = F.cross_entropy(
        (hidden[:, :-1] @ head.T).flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    torch.testing.assert_close(loss, shifted)


def test_no_position_trains_nothing():
    nothing = torch.empty(0, dtype=torch.int64)
    hidden = torch.randn(2, 5, WIDTH, requires_grad=True)
    loss = linear_cross_entropy(
        select_labelled(hidden, nothing), torch.randn(VOCAB, WIDTH), nothing
    )
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert hidden.grad.abs().max() == 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_label_whose_probability_underflows_has_its_true_loss(dtype):
    """Logits of 500 apart: exp(-500) is zero in float32."""
    hidden = torch.eye(2, WIDTH, dtype=dtype).requires_grad_()
    head = torch.zeros(VOCAB, WIDTH, dtype=dtype)
    head[3, 0], head[5, 1] = 500.0, -500.0
    labels = torch.tensor([7, 5])
    loss = linear_cross_entropy(hidden, head, labels)
    expected = plain_loss(hidden, head, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(loss, hidden)
    (wanted,) = torch.autograd.grad(expected, hidden)
    torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_tokens", [1, 2_000, 65_000])
@pytest.mark.parametrize("scale", [1024.0, 65536.0])
def test_float16_gradients_are_weighted_with_the_scalers_factor(num_tokens, scale):
    """A weight of one in 65,000 alone, or a factor of 65,536 alone, is beyond float16."""
    exact, head, labels, _ = make_inputs(num_tokens, torch.float64)
    weights = torch.full((num_tokens,), 1 / num_tokens, dtype=torch.float32)
    hidden = exact.detach().half().requires_grad_()
    head, bias = head.half(), make_options("bias", torch.float16)["bias_V"]
    loss = linear_cross_entropy(hidden, head, labels, weights_T=weights, bias_V=bias)
    factor = scale / 64 if num_tokens == 1 else scale  # one token's own gradient must fit
    (loss * factor).backward()
    exact = hidden.detach().double().requires_grad_()
    truth = plain_loss(exact, head.double(), labels, weights.double(), bias_V=bias.double())
    (truth * factor).backward()
    assert hidden.grad.isfinite().all()
    error = (hidden.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < 2e-3


def test_a_float16_factor_beyond_its_range_is_no_infinity():
    hidden, head, labels, _ = make_inputs(64, torch.float16)
    weights = torch.full((64,), 1e-5)
    (linear_cross_entropy(hidden, head, labels, weights_T=weights) * 2.0**20).backward()
    assert hidden.grad.isfinite().all() and hidden.grad.abs().max() > 0
