"""RMS normalization against plain torch: value, gradient, and what is kept."""

import pytest
import torch
from torch import Tensor

from llmtune.ops.rms_norm import rms_norm

EPS = 1e-5
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def plain_norm(inputs: Tensor, weight: Tensor) -> Tensor:
    """Llama's layer in the inputs' own precision, at least float32 inside."""
    wide = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(inputs.dtype)


def make_inputs(shape, dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs, upstream = (torch.randn(shape, generator=generator).to(dtype) * 3 for _ in range(2))
    weight = torch.randn(shape[-1], generator=generator).to(dtype)
    return inputs.requires_grad_(), weight, upstream


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(1, 7, 24), (1, 1, 24), (2, 3, 4, 8), (1, 0, 24)])
def test_value_and_gradient_are_those_of_the_plain_layer(shape, dtype):
    inputs, weight, upstream = make_inputs(shape, dtype)
    expected = plain_norm(inputs, weight)
    (expected_grad,) = torch.autograd.grad(expected, inputs, upstream)
    output = rms_norm(inputs, weight, EPS)
    (grad,) = torch.autograd.grad(output, inputs, upstream)
    assert output.dtype == grad.dtype == dtype
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(grad, expected_grad, rtol=tolerance, atol=tolerance)


def test_gradient_is_the_numeric_one():
    inputs, weight, _ = make_inputs((3, 8), torch.float64)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight, EPS), inputs)


def test_rows_of_zeros_give_zeros_and_finite_gradients():
    inputs = torch.zeros(2, 8, dtype=torch.bfloat16, requires_grad=True)
    output = rms_norm(inputs, torch.ones(8, dtype=torch.bfloat16), EPS)
    output.sum().backward()
    assert not output.any() and inputs.grad.isfinite().all()


def test_only_the_input_and_a_number_a_token_are_kept():
    inputs, weight, _ = make_inputs((1, 7, 24), torch.bfloat16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rms_norm(inputs, weight, EPS)
    assert sorted(tensor.numel() for tensor in kept) == [7, 7 * 24]
    assert any(tensor.data_ptr() == inputs.data_ptr() for tensor in kept)


def test_a_trainable_weight_is_refused():
    inputs, weight, _ = make_inputs((1, 7, 24), torch.float32)
    with pytest.raises(ValueError, match="no gradient for its weight"):
        rms_norm(inputs, weight.requires_grad_(), EPS)
