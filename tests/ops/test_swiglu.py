"""The gated down projection against plain torch: value, gradient, and what is kept."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llmtune.ops.lora_linear import LoraLinear, stack_adapters
from llmtune.ops.swiglu import swiglu_lora_linear
from tests.ops.test_lora_linear import WIDTH, make_linear

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}


def make_parts(shape, dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    gate, up = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return gate.requires_grad_(), up.requires_grad_()


def plain(gate: Tensor, up: Tensor, linear: LoraLinear) -> Tensor:
    inner = F.silu(gate) * up
    dtype = gate.dtype
    thin = inner @ linear.lora_A_RI.to(dtype).T
    adapted = thin @ (linear.lora_B_OR * linear.scaling).to(dtype).T
    return F.linear(inner, linear.weight_OI, linear.bias_O) + adapted


def gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(6)
    upstream = torch.randn(output.shape, generator=generator).to(output.dtype)
    return list(torch.autograd.grad(output, inputs, upstream))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(2, 5, WIDTH), (1, 1, WIDTH), (1, 0, WIDTH)])
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradients_are_those_of_plain_layers(shape, dtype, bias):
    linear = make_linear(10, 3, bias=bias, dtype=dtype)
    gate, up = make_parts(shape, dtype)
    leaves = [gate, up, linear.lora_A_RI, linear.lora_B_OR]
    expected = plain(gate, up, linear)
    output = swiglu_lora_linear(gate, up, linear, stack_adapters([linear], dtype))
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(gradients(output, leaves), gradients(expected, leaves), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_gradients_are_the_numeric_ones_and_weights_may_be_made_on_demand():
    linear = make_linear(6, 2)
    on_demand = linear._replace(weight_OI=lambda: linear.weight_OI)
    gate, up = make_parts((4, WIDTH), torch.float64)

    def run(gate: Tensor, up: Tensor, *_masters: Tensor) -> Tensor:
        return swiglu_lora_linear(gate, up, on_demand, stack_adapters([linear], torch.float64))

    # lora_A and lora_B are read through the copies, so only gate and up can be varied here
    assert torch.autograd.gradcheck(run, (gate, up))


def test_only_gate_up_and_the_thin_product_are_kept():
    linear = make_linear(6, 2)
    gate, up = make_parts((4, WIDTH), torch.float64)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        swiglu_lora_linear(gate, up, linear, stack_adapters([linear], torch.float64))
    assert sorted(tensor.numel() for tensor in kept) == [4 * 2, 4 * WIDTH, 4 * WIDTH]


def test_recomputing_it_gives_the_same_gradients():
    linear = make_linear(6, 2)
    gate, up = make_parts((4, WIDTH), torch.float64)
    adapter = stack_adapters([linear], torch.float64)
    leaves = [gate, up, linear.lora_A_RI, linear.lora_B_OR]
    whole = gradients(swiglu_lora_linear(gate, up, linear, adapter), leaves)
    again = checkpoint(swiglu_lora_linear, gate, up, linear, adapter, use_reentrant=False)
    for one, other in zip(whole, gradients(again, leaves), strict=True):
        assert torch.equal(one, other)


def test_a_trainable_base_is_refused():
    linear = make_linear(6, 2)
    linear.weight_OI.requires_grad_()
    gate, up = make_parts((4, WIDTH), torch.float64)
    with pytest.raises(ValueError, match="no gradient for the base weight"):
        swiglu_lora_linear(gate, up, linear, stack_adapters([linear], torch.float64))
