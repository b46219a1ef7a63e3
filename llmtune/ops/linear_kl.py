"""KL divergence between two models' next-token distributions through one frozen LM head.

Only a chunk of positions has logits at a time, and the gradient of the tuned model's hidden states
is known as soon as a chunk's logits are, so the forward pass computes it and the backward pass
merely scales it (as in `linear_cross_entropy`).

Shape suffixes: T positions, C positions of a chunk, R positions of a tile, D hidden width,
V vocabulary.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from llmtune.ops.linear_cross_entropy import (
    FrozenHead,
    accumulation_dtype,
    count_tile_rows,
    scale_rows,
    shape_logits_,
)

CHUNK_BYTES = 64 << 20
"""Bytes of one float32 copy of a chunk's logits. Beside both models' in the head's dtype, four such
copies exist at a time; on a CPU only of the rows of a tile."""
SCALED_ROWS = 1024
"""Rows of a float16 gradient that exist in float32 at a time."""


def linear_kl_divergence(
    hidden_TD: Tensor, reference_TD: Tensor, head: FrozenHead, *, chunk_size: int | None = None
) -> Tensor:
    """Sum over positions of KL(reference || hidden) in nats, over the whole vocabulary.

    At one position sum_v p0(v) * (log p0(v) - log p1(v)), with p0 from `reference_TD` and p1 from
    `hidden_TD`; with z1 the logits of p1 the gradient is dKL/dz1 = p1 - p0. Products run in the
    head's dtype, distributions and sum in float32 (float64 for float64 inputs).

    Args:
        hidden_TD: last hidden states of the tuned model; gets a gradient.
        reference_TD: those of the base on the same positions; gets none.
        head: the frozen head both go through.
        chunk_size: positions whose logits exist at a time; None bounds them by `CHUNK_BYTES`.

    Raises:
        ValueError: the head is trainable, or the shapes disagree.
    """
    if head.weight_VD.requires_grad or (head.bias_V is not None and head.bias_V.requires_grad):
        raise ValueError("the LM head is trainable, and its gradient is not computed here")
    if hidden_TD.shape != reference_TD.shape or hidden_TD.ndim != 2:
        raise ValueError(
            f"expected two [T, D] tensors of one shape, got {tuple(hidden_TD.shape)} and "
            f"{tuple(reference_TD.shape)}"
        )
    if chunk_size is None:
        chunk_size = max(CHUNK_BYTES // (4 * head.weight_VD.shape[0]), 1)
    return _FrozenHeadKl.apply(hidden_TD, reference_TD.detach(), head, chunk_size)


class _FrozenHeadKl(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden_TD: Tensor, reference_TD: Tensor, head: FrozenHead, chunk: int
    ) -> Tensor:
        dtype = accumulation_dtype(hidden_TD.dtype)
        total = torch.zeros((), dtype=dtype, device=hidden_TD.device)
        needs_gradient = ctx.needs_input_grad[0]
        gradient_TD = torch.zeros_like(hidden_TD) if needs_gradient else None
        weight_VD = head.weight_VD
        size = min(chunk, len(hidden_TD))
        # All chunks and tiles reuse the same memory: new memory of this size costs more than the
        # arithmetic.
        raw_CV, base_CV = weight_VD.new_empty(2, size, len(weight_VD))
        tile_rows = max(count_tile_rows(raw_CV, dtype, num_buffers=4), 1)
        buffers_4RV = raw_CV.new_empty(4, tile_rows, len(weight_VD), dtype=dtype)
        with torch.autocast(hidden_TD.device.type, enabled=False):
            for start in range(0, len(hidden_TD), chunk):
                part = slice(start, start + chunk)
                logits_CV, reference_CV = (
                    torch.mm(states_TD[part].to(weight_VD.dtype), weight_VD.t(), out=out_CV)
                    for states_TD, out_CV in (
                        (hidden_TD, raw_CV[: len(hidden_TD[part])]),
                        (reference_TD, base_CV[: len(hidden_TD[part])]),
                    )
                )
                for first in range(0, len(logits_CV), tile_rows):
                    tile = slice(first, first + tile_rows)
                    total += _reduce_tile(logits_CV[tile], reference_CV[tile], buffers_4RV, head)
                if gradient_TD is not None:  # the logits are their gradient by now
                    gradient_TD[part] = logits_CV @ weight_VD
        ctx.save_for_backward(*(() if gradient_TD is None else (gradient_TD,)))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, outer: Tensor) -> tuple[Tensor | None, None, None, None]:
        (gradient_TD,) = ctx.saved_tensors
        if gradient_TD.dtype == torch.float16:  # a gradient scaler's factor may be beyond its range
            return scale_rows(gradient_TD, None, outer, SCALED_ROWS), None, None, None
        return gradient_TD * outer.to(gradient_TD.dtype), None, None, None


def _reduce_tile(
    raw_RV: Tensor, reference_RV: Tensor, buffers_4RV: Tensor, head: FrozenHead
) -> Tensor:
    """Return the KL of a tile of raw logits, and overwrite `raw_RV` with their gradient."""
    z1_RV, z0_RV, p1_RV, p0_RV = buffers_4RV[:, : len(raw_RV)]
    slope_RV = shape_logits_(z1_RV.copy_(raw_RV), head)
    shape_logits_(z0_RV.copy_(reference_RV), head)
    torch.softmax(z1_RV, dim=-1, out=p1_RV)
    torch.softmax(z0_RV, dim=-1, out=p0_RV)
    # log sum(exp(z)) = max(z) - log(max(p)): the largest probability is never 0
    sum1_R1, sum0_R1 = (
        z_RV.amax(-1, keepdim=True) - p_RV.amax(-1, keepdim=True).log()
        for z_RV, p_RV in ((z1_RV, p1_RV), (z0_RV, p0_RV))
    )
    log_ratio_RV = z0_RV.sub_(z1_RV).sub_(sum0_R1 - sum1_R1)
    divergence = log_ratio_RV.mul_(p0_RV).sum()
    gradient_RV = p1_RV.sub_(p0_RV)
    if slope_RV is not None:
        gradient_RV.mul_(slope_RV)
    if head.logit_scale != 1.0:
        gradient_RV.mul_(head.logit_scale)
    raw_RV.copy_(gradient_RV)
    return divergence
