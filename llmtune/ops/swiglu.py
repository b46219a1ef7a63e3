"""The gated half of an MLP: y = h W^T + s (h A^T) B^T with h = silu(gate) * up.

A plain graph keeps gate, up, silu(gate) and h for the backward pass; here gate and up are kept and
the rest is computed again, two passes over memory that save half of what an MLP holds. (SwiGLU,
Shazeer 2020, eq. 6; the adapter is LoRA's, see `lora_linear`.)

Shape suffixes: N tokens, I inner width, O output features, R rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from llmtune.ops.lora_linear import (
    LoraLinear,
    StackedAdapters,
    accurate_product,
    adapted_output,
    read_weight,
)


def swiglu_lora_linear(
    gate: Tensor, up: Tensor, linear: LoraLinear, adapter: StackedAdapters
) -> Tensor:
    """Return the down projection `[..., O]` of `silu(gate) * up`, both `[..., I]`.

    Runs in the adapter's dtype, whatever autocast says.

    Args:
        gate: input of the activation.
        up: what it is multiplied by.
        linear: the frozen projection with its trainable adapter.
        adapter: its copies, from `AdapterCopies.read` with a group of one.

    Raises:
        ValueError: the projection's weight or bias is trainable.
    """
    frozen = (linear.weight_OI, linear.bias_O)
    if any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in frozen):
        raise ValueError("swiglu_lora_linear computes no gradient for the base weight; freeze it")
    dtype = adapter.lora_A_SI.dtype
    gate_NI, up_NI = (part.to(dtype).reshape(-1, part.shape[-1]) for part in (gate, up))
    output_NO = _SwigluLoraLinear.apply(
        gate_NI, up_NI, linear, adapter, linear.lora_A_RI, linear.lora_B_OR
    )
    return output_NO.view(*gate.shape[:-1], output_NO.shape[1])


class _SwigluLoraLinear(torch.autograd.Function):
    """The module docstring's formula. The masters are arguments only to receive gradients."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        gate_NI: Tensor,
        up_NI: Tensor,
        linear: LoraLinear,
        adapter: StackedAdapters,
        *masters: Tensor,
    ) -> Tensor:
        with torch.autocast(gate_NI.device.type, enabled=False):
            inner_NI = F.silu(gate_NI).mul_(up_NI)
            thin_NR = inner_NI @ adapter.lora_A_SI.t()
            output_NO = adapted_output(inner_NI, thin_NR, linear, adapter.scaled_B_ORs[0])
        ctx.save_for_backward(gate_NI, up_NI, thin_NR)
        ctx.linear, ctx.adapter = linear, adapter
        return output_NO

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        gate_NI, up_NI, thin_NR = ctx.saved_tensors
        linear, adapter = ctx.linear, ctx.adapter
        needs_gate, needs_up, _, _, needs_A, needs_B = ctx.needs_input_grad
        with torch.autocast(grad_NO.device.type, enabled=False):
            active_NI = F.silu(gate_NI)
            grad_thin_NR = grad_NO @ adapter.scaled_B_ORs[0]
            grad_A = accurate_product(grad_thin_NR.t(), active_NI * up_NI) if needs_A else None
            grad_B = accurate_product(thin_NR.t(), grad_NO).t() if needs_B else None
            grad_gate_NI = grad_up_NI = None
            if needs_gate or needs_up:
                grad_inner_NI = grad_thin_NR @ adapter.lora_A_SI
                grad_inner_NI.addmm_(grad_NO, read_weight(linear, grad_NO.dtype))
                grad_up_NI = active_NI.mul_(grad_inner_NI)
                grad_gate_NI = torch.ops.aten.silu_backward(grad_inner_NI.mul_(up_NI), gate_NI)
        if grad_A is not None:
            grad_A = grad_A.to(linear.lora_A_RI.dtype)
        if grad_B is not None:
            grad_B = (grad_B * linear.scaling).to(linear.lora_B_OR.dtype)
        return grad_gate_NI, grad_up_NI, None, None, grad_A, grad_B
