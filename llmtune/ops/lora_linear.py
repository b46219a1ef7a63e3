"""Linears with LoRA adapters on one shared input, as a single autograd function.

    y_i = x W_i^T + b_i + s_i (x A_i^T) B_i^T            (LoRA, Hu et al. 2021, section 4.1)

Kept for the backward pass: x, once for all linears of the group, and the thin product
u = x [A_1; A_2; ..]^T. The base weights are frozen and only referred to, or made on demand by a
function (dequantization), forward and again backward. With g_i = dy_i (s_i B_i):

    dx = sum_i dy_i W_i + [g_1 g_2 ..] A      dA = [g_1 g_2 ..]^T x      dB_i = s_i dy_i^T u_i

The adapters' master weights stay float32; the products read copies in the compute dtype, made once
an optimizer step (`AdapterCopies`). Gradients reach the masters in their own dtype.

Shape suffixes: N tokens, I input features, O output features, R rank of one adapter, S sum of the
ranks of the group.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


class LoraLinear(NamedTuple):
    """One frozen linear with its trainable adapter.

    `weight_OI` is the dense weight, or a function that makes it (NF4, FP4, int8). Conv1D, which
    stores the transpose, passes `weight.T`.
    """

    weight_OI: Tensor | Callable[[], Tensor]
    lora_A_RI: Tensor
    lora_B_OR: Tensor
    scaling: float
    bias_O: Tensor | None = None


class StackedAdapters(NamedTuple):
    """A group's adapters in the compute dtype: every A in one matrix, each B times its scaling."""

    lora_A_SI: Tensor
    scaled_B_ORs: tuple[Tensor, ...]


class AdapterCopies:
    """The `StackedAdapters` of one group, made again only when a master weight has changed.

    A change is seen by the version counter that torch keeps with every tensor: optimizers and
    `load_state_dict` advance it. Writing through `parameter.data` does not; call `forget` then.
    """

    def __init__(self) -> None:
        self._copies: StackedAdapters | None = None
        self._made_from: object = None

    def read(self, linears: Sequence[LoraLinear], dtype: torch.dtype) -> StackedAdapters:
        """The group's adapters in `dtype`; the same tensors until an adapter changes."""
        made_from = (
            dtype,
            [linear.scaling for linear in linears],
            [(id(m), m.data_ptr(), m._version) for m in _masters(linears)],
        )
        if self._copies is None or self._made_from != made_from:
            self._copies = stack_adapters(linears, dtype)
            self._made_from = made_from
        return self._copies

    def forget(self) -> None:
        """Make the copies again at the next `read`."""
        self._copies = None


@torch.no_grad()
def stack_adapters(linears: Sequence[LoraLinear], dtype: torch.dtype) -> StackedAdapters:
    """Copy a group's adapters to `dtype`; each value is rounded once, after scaling."""
    lora_A_SI = torch.cat([linear.lora_A_RI.to(dtype) for linear in linears])
    scaled_B_ORs = tuple((linear.lora_B_OR * linear.scaling).to(dtype) for linear in linears)
    return StackedAdapters(lora_A_SI, scaled_B_ORs)


def lora_linears(
    inputs: Tensor, linears: Sequence[LoraLinear], adapters: StackedAdapters
) -> tuple[Tensor, ...]:
    """Outputs of several adapted linears that read the same input (q, k, v; gate, up).

    Runs in the adapters' dtype, whatever autocast says; the input is cast to it if it differs.

    Args:
        inputs: `[..., I]`.
        linears: the group, in the order of `adapters`.
        adapters: the group's copies, from `AdapterCopies.read` or `stack_adapters`.

    Returns:
        One `[..., O]` tensor for each linear, in the adapters' dtype.

    Raises:
        ValueError: if a base weight or bias is trainable (it gets no gradient here), or if the
            copies are not those of this group.
    """
    _check_group(linears, adapters)
    inputs = inputs.to(adapters.lora_A_SI.dtype)
    input_NI = inputs.reshape(-1, inputs.shape[-1])
    outputs = _LoraLinears.apply(input_NI, tuple(linears), adapters, *_masters(linears))
    return tuple(output_NO.view(*inputs.shape[:-1], output_NO.shape[1]) for output_NO in outputs)


def lora_linear(inputs: Tensor, linear: LoraLinear, adapter: StackedAdapters) -> Tensor:
    """Output `[..., O]` of one adapted linear; `lora_linears` with a group of one."""
    (output,) = lora_linears(inputs, (linear,), adapter)
    return output


class _LoraLinears(torch.autograd.Function):
    """The module docstring's formulas. The masters are arguments only to receive gradients."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        input_NI: Tensor,
        linears: tuple[LoraLinear, ...],
        adapters: StackedAdapters,
        *masters: Tensor,
    ) -> tuple[Tensor, ...]:
        with torch.autocast(input_NI.device.type, enabled=False):
            thin_NS = input_NI @ adapters.lora_A_SI.t()
            outputs = tuple(
                adapted_output(input_NI, thin_NR, linear, scaled_B_OR)
                for linear, scaled_B_OR, thin_NR in zip(
                    linears, adapters.scaled_B_ORs, _split(thin_NS, linears), strict=True
                )
            )
        ctx.save_for_backward(input_NI, thin_NS)
        ctx.linears, ctx.adapters = linears, adapters
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        input_NI, thin_NS = ctx.saved_tensors  # once: checkpointing allows no second look
        linears, adapters = ctx.linears, ctx.adapters
        needs_input, _, _, *needs_masters = ctx.needs_input_grad
        with torch.autocast(input_NI.device.type, enabled=False):
            grad_thin_NRs = map(torch.mm, grad_outputs, adapters.scaled_B_ORs)
            grad_thin_NS = torch.cat(tuple(grad_thin_NRs), dim=1)
            grad_input_NI = None
            if needs_input:
                grad_input_NI = grad_thin_NS @ adapters.lora_A_SI
                for linear, grad_output_NO in zip(linears, grad_outputs, strict=True):
                    grad_input_NI.addmm_(grad_output_NO, read_weight(linear, input_NI.dtype))
            grad_A_SI = accurate_product(grad_thin_NS.t(), input_NI)
            # Thin side first: on a CPU up to 1.8 times as fast as the transposed product.
            grad_Bs = [
                accurate_product(thin_NR.t(), grad).t()
                for thin_NR, grad in zip(_split(thin_NS, linears), grad_outputs, strict=True)
            ]
            grad_masters: list[Tensor] = []
            for linear, grad_A, grad_B in zip(
                linears, grad_A_SI.split(_ranks(linears)), grad_Bs, strict=True
            ):
                grad_masters.append(grad_A.to(linear.lora_A_RI.dtype))
                grad_masters.append(grad_B.mul_(linear.scaling).to(linear.lora_B_OR.dtype))
        wanted = zip(grad_masters, needs_masters, strict=True)
        return grad_input_NI, None, None, *(grad if needed else None for grad, needed in wanted)


def adapted_output(
    input_NI: Tensor, thin_NR: Tensor, linear: LoraLinear, scaled_B_OR: Tensor
) -> Tensor:
    """Return the output of a linear layer and its adapter; `thin_NR` is the product with `A`."""
    weight_IO = read_weight(linear, input_NI.dtype).t()
    if linear.bias_O is None:
        output_NO = input_NI @ weight_IO
    else:
        output_NO = torch.addmm(linear.bias_O.to(input_NI.dtype), input_NI, weight_IO)
    return output_NO.addmm_(thin_NR, scaled_B_OR.t())


def read_weight(linear: LoraLinear, dtype: torch.dtype) -> Tensor:
    """Return a layer's weight in `dtype`, dequantized if it is stored quantized."""
    weight_OI = linear.weight_OI if isinstance(linear.weight_OI, Tensor) else linear.weight_OI()
    return weight_OI.to(dtype)


def accurate_product(left: Tensor, right: Tensor) -> Tensor:
    """A product in at least float32; a CPU rounds it to the inputs' dtype on the way."""
    if left.device.type == "cuda" and left.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).to(torch.promote_types(left.dtype, torch.float32))


def _masters(linears: Sequence[LoraLinear]) -> list[Tensor]:
    return [master for linear in linears for master in (linear.lora_A_RI, linear.lora_B_OR)]


def _split(thin_NS: Tensor, linears: Sequence[LoraLinear]) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = thin_NS.split(_ranks(linears), dim=1)
    return parts


def _ranks(linears: Sequence[LoraLinear]) -> list[int]:
    return [len(linear.lora_A_RI) for linear in linears]


def _check_group(linears: Sequence[LoraLinear], adapters: StackedAdapters) -> None:
    for linear in linears:
        if any(
            isinstance(p, Tensor) and p.requires_grad for p in (linear.weight_OI, linear.bias_O)
        ):
            raise ValueError(
                "lora_linears computes no gradient for base weights, but one requires it; "
                "freeze it, or keep the stock layer"
            )
    found = (len(adapters.lora_A_SI), [tuple(b.shape) for b in adapters.scaled_B_ORs])
    expected = (sum(_ranks(linears)), [tuple(linear.lora_B_OR.shape) for linear in linears])
    if found != expected:
        raise ValueError(
            f"the copies have a stacked rank and B shapes of {found}, the group has {expected}"
        )
