"""RMS normalization that keeps its 16-bit input for the backward pass, and nothing in float32.

    y = w * round(x * r)        r = (mean(x^2) + eps)^(-1/2)      (Zhang and Sennrich 2019, eq. 4)

`round` is the rounding to the input's dtype before the weight, as Llama's layers do it. With
g = w * dy and n = x * r:    dx = r * (g - n * mean(g * n)).    The weight is frozen.

Shape suffixes: N tokens, D width.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def rms_norm(inputs: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Return `inputs` `[..., D]` normalized over the last dimension and scaled by `weight_D`.

    The mean is taken in float32 (float64 for float64 inputs).

    Raises:
        ValueError: the weight is trainable (it gets no gradient here).
    """
    if weight_D.requires_grad:
        raise ValueError("rms_norm computes no gradient for its weight, but it requires one")
    return _RmsNorm.apply(inputs, weight_D, eps)


class _RmsNorm(torch.autograd.Function):
    """Keeps the input and one number a token."""

    @staticmethod
    def forward(ctx: FunctionCtx, inputs: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        wide = inputs.to(_wide_dtype(inputs))
        scale_N1 = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(inputs, scale_N1)
        ctx.weight_D = weight_D
        return weight_D * (wide * scale_N1).to(inputs.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        inputs, scale_N1 = ctx.saved_tensors
        grad = (grad_output * ctx.weight_D).to(scale_N1.dtype)
        normal = inputs * scale_N1
        mean_N1 = (grad * normal).mean(-1, keepdim=True)
        grad_input = grad.sub_(normal.mul_(mean_N1)).mul_(scale_N1)
        return grad_input.to(inputs.dtype), None, None


def _wide_dtype(inputs: Tensor) -> torch.dtype:
    return torch.promote_types(inputs.dtype, torch.float32)
