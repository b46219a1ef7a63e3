"""Fused LoRA linears against plain torch, stock PEFT and bitsandbytes: value, gradient, memory."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from llmtune.ops.lora_linear import (
    AdapterCopies,
    LoraLinear,
    lora_linear,
    lora_linears,
    stack_adapters,
)

WIDTH = 24
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def make_linear(outputs, rank, *, scaling=2.0, bias=False, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * WIDTH**-0.5

    master = torch.float64 if dtype == torch.float64 else torch.float32
    return LoraLinear(
        draw(outputs, WIDTH).to(dtype),
        draw(rank, WIDTH).to(master).requires_grad_(),
        draw(outputs, rank).to(master).requires_grad_(),
        scaling,
        draw(outputs).to(dtype) if bias else None,
    )


def make_group(dtype=torch.float64) -> list[LoraLinear]:
    """Different widths, ranks and scalings, one with a bias, as grouped-query attention has it."""
    return [
        make_linear(16, 4, scaling=2.0, dtype=dtype, seed=1),
        make_linear(8, 1, scaling=0.5, bias=True, dtype=dtype, seed=2),
        make_linear(8, 3, scaling=1.0, dtype=dtype, seed=3),
    ]


def make_input(shape=(2, 5, WIDTH), dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return values.to(dtype).requires_grad_()


def plain_lora(inputs: Tensor, linear: LoraLinear) -> Tensor:
    adapted = F.linear(F.linear(inputs, linear.lora_A_RI), linear.lora_B_OR)
    return F.linear(inputs, linear.weight_OI, linear.bias_O) + linear.scaling * adapted


def masters_of(linears) -> list[Tensor]:
    return [master for linear in linears for master in (linear.lora_A_RI, linear.lora_B_OR)]


def gradients(outputs, inputs, linears) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    upstream = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    upstream = [grad.to(output.dtype) for grad, output in zip(upstream, outputs, strict=True)]
    return list(torch.autograd.grad(outputs, [inputs, *masters_of(linears)], upstream))


def assert_all_close(results, expected, tolerance: float) -> None:
    for result, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("group_size", [1, 2, 3])
def test_group_equals_plain_lora_one_by_one(group_size, dtype):
    linears = make_group(dtype)[:group_size]
    inputs = make_input(dtype=dtype)
    outputs = lora_linears(inputs, linears, stack_adapters(linears, dtype))
    expected = [plain_lora(inputs, linear) for linear in linears]
    assert_all_close(outputs, expected, TOLERANCE[dtype])
    assert_all_close(
        gradients(outputs, inputs, linears),
        gradients(expected, inputs, linears),
        TOLERANCE[dtype],
    )


@pytest.mark.parametrize("num_tokens", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_empty_and_single_token_inputs(num_tokens, dtype):
    linears = make_group(dtype)
    inputs = make_input((num_tokens, WIDTH), dtype)
    outputs = lora_linears(inputs, linears, stack_adapters(linears, dtype))
    assert [tuple(output.shape) for output in outputs] == [(num_tokens, n) for n in (16, 8, 8)]
    for gradient in gradients(outputs, inputs, linears):
        assert gradient.isfinite().all()
        assert num_tokens > 0 or not gradient.any()


def test_transposed_weight_is_passed_as_a_view():
    linear = make_linear(16, 4)
    stored = linear.weight_OI.T.contiguous()  # [I, O], as Conv1D keeps it
    inputs = make_input()
    adapter = stack_adapters([linear], torch.float64)
    output = lora_linear(inputs, linear._replace(weight_OI=stored.T), adapter)
    expected = plain_lora(inputs, linear)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    assert_all_close(
        gradients([output], inputs, [linear]), gradients([expected], inputs, [linear]), 1e-12
    )


def test_a_weight_made_on_demand_is_made_once_forward_and_once_backward():
    linear = make_linear(16, 4)
    calls = []
    lazy = linear._replace(weight_OI=lambda: calls.append(1) or linear.weight_OI)
    inputs = make_input()
    output = lora_linear(inputs, lazy, stack_adapters([lazy], torch.float64))
    assert len(calls) == 1
    expected = gradients([plain_lora(inputs, linear)], inputs, [linear])
    assert_all_close(gradients([output], inputs, [lazy]), expected, 1e-12)
    assert len(calls) == 2


def test_only_the_input_and_the_thin_product_are_kept():
    linears = make_group(torch.bfloat16)
    lazy = [linear._replace(weight_OI=linear.weight_OI.clone) for linear in linears]
    inputs = make_input((10, WIDTH), torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linears(inputs, lazy, stack_adapters(lazy, torch.bfloat16))
    assert [tuple(tensor.shape) for tensor in saved] == [(10, WIDTH), (10, 4 + 1 + 3)]
    assert saved[0].data_ptr() == inputs.data_ptr()


def test_gradients_add_up_over_micro_batches_in_float32():
    linears = make_group(torch.bfloat16)
    adapters = stack_adapters(linears, torch.bfloat16)
    inputs = make_input(dtype=torch.bfloat16)
    for _ in range(3):
        sum(output.float().sum() for output in lora_linears(inputs, linears, adapters)).backward()
    three = [master.grad.clone() for master in masters_of(linears)]
    for master in masters_of(linears):
        master.grad = None
    sum(output.float().sum() for output in lora_linears(inputs, linears, adapters)).backward()
    for summed, master in zip(three, masters_of(linears), strict=True):
        assert summed.dtype == torch.float32
        torch.testing.assert_close(summed, master.grad * 3, rtol=1e-6, atol=1e-6)


def test_no_input_gradient_is_computed_for_an_input_that_needs_none():
    linear = make_linear(16, 4)
    calls = []
    lazy = linear._replace(weight_OI=lambda: calls.append(1) or linear.weight_OI)
    inputs = make_input().detach()
    lora_linear(inputs, lazy, stack_adapters([lazy], torch.float64)).sum().backward()
    assert len(calls) == 1  # forward only
    assert linear.lora_B_OR.grad is not None


def test_a_frozen_adapter_gets_no_gradient():
    linear = make_linear(16, 4)
    linear.lora_A_RI.requires_grad_(False)
    lora_linear(make_input(), linear, stack_adapters([linear], torch.float64)).sum().backward()
    assert linear.lora_A_RI.grad is None
    assert linear.lora_B_OR.grad is not None


def test_an_unused_output_contributes_nothing():
    linears = make_group()
    inputs = make_input()
    outputs = lora_linears(inputs, linears, stack_adapters(linears, torch.float64))
    (gradient,) = torch.autograd.grad(outputs[1].sum(), inputs)
    (expected,) = torch.autograd.grad(plain_lora(inputs, linears[1]).sum(), inputs)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_autocast_changes_nothing():
    linear = make_linear(16, 4, dtype=torch.float32)
    inputs = make_input(dtype=torch.float32)
    adapter = stack_adapters([linear], torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = lora_linear(inputs, linear, adapter)
    torch.testing.assert_close(output, plain_lora(inputs, linear), rtol=1e-5, atol=1e-5)


def test_copies_are_made_anew_exactly_when_a_master_changes():
    linears = make_group(torch.bfloat16)
    copies = AdapterCopies()
    first = copies.read(linears, torch.bfloat16)
    assert copies.read(linears, torch.bfloat16) is first
    for master in masters_of(linears):
        master.grad = torch.ones_like(master)
    torch.optim.AdamW(masters_of(linears), lr=0.1).step()
    second = copies.read(linears, torch.bfloat16)
    assert second is not first
    assert torch.equal(second.lora_A_SI[:4], linears[0].lora_A_RI.bfloat16())
    assert torch.equal(second.scaled_B_ORs[1], (0.5 * linears[1].lora_B_OR).bfloat16())
    assert copies.read(linears, torch.float32).lora_A_SI.dtype == torch.float32
    rescaled = [linear._replace(scaling=7.0) for linear in linears]
    assert copies.read(rescaled, torch.float32) is not copies.read(linears, torch.float32)


def test_a_backward_pass_uses_the_copies_of_its_own_forward_pass():
    linear = make_linear(16, 4)
    copies = AdapterCopies()
    inputs = make_input()
    expected = torch.autograd.grad(plain_lora(inputs, linear).sum(), inputs)
    output = lora_linear(inputs, linear, copies.read([linear], torch.float64))
    with torch.no_grad():
        linear.lora_B_OR.mul_(5)
    copies.read([linear], torch.float64)
    assert_all_close(torch.autograd.grad(output.sum(), inputs), expected, 1e-12)


def test_checkpointing_gives_the_same_gradients():
    linears = make_group()
    adapters = stack_adapters(linears, torch.float64)
    inputs = make_input()

    def run(x: Tensor) -> tuple[Tensor, ...]:
        return lora_linears(x, linears, adapters)

    expected = gradients(run(inputs), inputs, linears)
    outputs = checkpoint(run, inputs, use_reentrant=False)
    assert_all_close(gradients(outputs, inputs, linears), expected, 1e-12)


def test_trainable_base_weights_are_refused():
    linear = make_linear(16, 4)
    adapter = stack_adapters([linear], torch.float64)
    trainable = linear._replace(weight_OI=linear.weight_OI.clone().requires_grad_())
    with pytest.raises(ValueError, match="freeze it"):
        lora_linear(make_input(), trainable, adapter)


def test_copies_of_another_group_are_refused():
    linears = make_group()
    with pytest.raises(ValueError, match="stacked rank"):
        lora_linears(make_input(), linears, stack_adapters(linears[:2], torch.float64))


class Host(nn.Module):
    """One layer for PEFT to wrap."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs)


def wrap_with_peft(layer: nn.Module, *, fan_in_fan_out: bool = False) -> nn.Module:
    config = LoraConfig(r=8, lora_alpha=20, target_modules=["layer"], fan_in_fan_out=fan_in_fan_out)
    torch.manual_seed(0)
    wrapped = get_peft_model(Host(layer), config).base_model.model.layer
    nn.init.normal_(wrapped.lora_B["default"].weight, std=0.05)
    return wrapped


def read_peft_layer(layer: nn.Module, weight) -> LoraLinear:
    return LoraLinear(
        weight,
        layer.lora_A["default"].weight,
        layer.lora_B["default"].weight,
        layer.scaling["default"],
        layer.get_base_layer().bias,
    )


def test_float32_equals_the_stock_peft_linear():
    stock = wrap_with_peft(nn.Linear(64, 96))
    linear = read_peft_layer(stock, stock.get_base_layer().weight)
    inputs = make_input((3, 7, 64), torch.float32)
    output = lora_linear(inputs, linear, stack_adapters([linear], torch.float32))
    expected = stock(inputs)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert_all_close(
        gradients([output], inputs, [linear]), gradients([expected], inputs, [linear]), 1e-4
    )


def test_conv1d_equals_the_stock_peft_linear():
    stock = wrap_with_peft(Conv1D(96, 64), fan_in_fan_out=True)
    linear = read_peft_layer(stock, stock.get_base_layer().weight.T)
    inputs = make_input((3, 7, 64), torch.float32)
    output = lora_linear(inputs, linear, stack_adapters([linear], torch.float32))
    expected = stock(inputs)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert_all_close(
        gradients([output], inputs, [linear]), gradients([expected], inputs, [linear]), 1e-4
    )


def relative_errors(results, truth) -> list[float]:
    pairs = zip(results, truth, strict=True)
    return [float((got.double() - want).norm() / want.norm()) for got, want in pairs]


def compare_with_truth(stock: nn.Module, weight_OI, dense_OI: Tensor):
    """Errors of value, dx, dA, dB against float64: ours, and those of stock under autocast."""
    linear = read_peft_layer(stock, weight_OI)
    inputs = make_input((4, 50, 64), torch.bfloat16)
    exact = LoraLinear(
        dense_OI.double(),
        linear.lora_A_RI.detach().double().requires_grad_(),
        linear.lora_B_OR.detach().double().requires_grad_(),
        linear.scaling,
    )
    exact_inputs = inputs.detach().double().requires_grad_()
    exact_output = plain_lora(exact_inputs, exact)
    truth = [exact_output.detach(), *gradients([exact_output], exact_inputs, [exact])]
    output = lora_linear(inputs, linear, stack_adapters([linear], torch.bfloat16))
    ours = [output.detach(), *gradients([output], inputs, [linear])]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock_output = stock(inputs)
    theirs = [stock_output.detach(), *gradients([stock_output], inputs, [linear])]
    assert output.dtype == stock_output.dtype == torch.bfloat16
    return relative_errors(ours, truth), relative_errors(theirs, truth)


def test_bfloat16_error_is_within_stock_peft_error():
    base = nn.Linear(64, 96, bias=False).bfloat16()
    stock = wrap_with_peft(base)
    ours, theirs = compare_with_truth(stock, base.weight, base.weight.detach())
    assert all(our <= 1.25 * their for our, their in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_four_bit_error_is_within_stock_peft_error(quant_type):
    import bitsandbytes as bnb

    base = bnb.nn.Linear4bit(
        64, 96, bias=False, quant_type=quant_type, compute_dtype=torch.bfloat16
    )
    base.load_state_dict({"weight": torch.randn(96, 64).bfloat16() * 0.1})
    base = base.to("cpu")
    stock = wrap_with_peft(base)

    def dequantize() -> Tensor:
        state = base.weight.quant_state
        return bnb.functional.dequantize_4bit(base.weight.data, state).to(torch.bfloat16)

    ours, theirs = compare_with_truth(stock, dequantize, dequantize())
    assert all(our <= 1.25 * their for our, their in zip(ours, theirs, strict=True))
