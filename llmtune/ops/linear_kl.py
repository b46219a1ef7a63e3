"""KL divergence between two models' next-token distributions through one frozen LM head.

Only a chunk of positions has logits at a time, and the gradient of the tuned model's hidden states
is known as soon as a chunk's logits are, so the forward pass computes it and the backward pass
merely scales it (as in `linear_cross_entropy`).

Shape suffixes: T positions, C positions of a chunk, D hidden width, V vocabulary.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from llmtune.ops.linear_cross_entropy import FrozenHead, scale_rows

CHUNK_BYTES = 64 << 20
"""Bytes of one float32 copy of a chunk's logits; about four exist at a time."""
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
        exact = torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=exact, device=hidden_TD.device)
        needs_gradient = ctx.needs_input_grad[0]
        gradient_TD = torch.zeros_like(hidden_TD) if needs_gradient else None
        for start in range(0, len(hidden_TD), chunk):
            part = slice(start, start + chunk)
            logits_CV = _logits(hidden_TD[part], head, exact)
            log_p1 = logits_CV.log_softmax(-1)
            log_p0 = _logits(reference_TD[part], head, exact).log_softmax(-1)
            p0 = log_p0.exp()
            total += (p0 * (log_p0 - log_p1)).sum()
            if gradient_TD is not None:
                slope_CV = log_p1.exp_().sub_(p0)
                if head.logit_softcap is not None:
                    slope_CV *= 1 - (logits_CV / head.logit_softcap) ** 2
                slope_CV *= head.logit_scale
                gradient_TD[part] = slope_CV.to(head.weight_VD.dtype) @ head.weight_VD
        ctx.save_for_backward(*(() if gradient_TD is None else (gradient_TD,)))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, outer: Tensor) -> tuple[Tensor | None, None, None, None]:
        (gradient_TD,) = ctx.saved_tensors
        if gradient_TD.dtype == torch.float16:  # a gradient scaler's factor may be beyond its range
            return scale_rows(gradient_TD, None, outer, SCALED_ROWS), None, None, None
        return gradient_TD * outer.to(gradient_TD.dtype), None, None, None


def _logits(hidden_CD: Tensor, head: FrozenHead, exact: torch.dtype) -> Tensor:
    with torch.autocast(hidden_CD.device.type, enabled=False):
        logits_CV = hidden_CD.to(head.weight_VD.dtype) @ head.weight_VD.T
    if head.bias_V is not None:
        logits_CV = logits_CV + head.bias_V
    logits_CV = logits_CV.to(exact) * head.logit_scale
    if head.logit_softcap is not None:
        logits_CV = torch.tanh(logits_CV / head.logit_softcap) * head.logit_softcap
    return logits_CV
