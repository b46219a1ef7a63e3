"""Cross-entropy through a frozen LM head that never holds the logits of more than one chunk.

Because the head is frozen, the only gradient needed is that of the hidden states, and it is
known as soon as a chunk's logits are: the forward pass computes it chunk by chunk and the
backward pass merely scales it. Two matrix products a chunk, nothing recomputed, and memory
bounded by `chunk_size * vocabulary`, whatever the number of tokens.

Shape suffixes: B batch, S positions, T labelled tokens, C tokens of a chunk, R rows of a tile,
D hidden width, V vocabulary.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

# On a CPU the float32 copy of the logits is made in tiles that stay in the cache (measured on a
# 49k vocabulary, 256-row chunks: 0.77 of the time of one float32 copy of the whole chunk).
CPU_TILE_BYTES = 16 << 20
"""Of all float32 buffers of a tile together."""


class FrozenHead(NamedTuple):
    """The map from hidden states to logits: `cap(scale * (hidden @ weight.T + bias))`."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    logit_softcap: float | None = None
    logit_scale: float = 1.0


def linear_cross_entropy(  # noqa: PLR0913 - keyword-only options, like torch.nn.functional
    hidden_TD: Tensor,
    head_weight_VD: Tensor,
    labels_T: Tensor,
    *,
    weights_T: Tensor | None = None,
    bias_V: Tensor | None = None,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_size: int = 256,
    losses_out_T: Tensor | None = None,
) -> Tensor:
    """Sum of `weights_T * -log softmax(logits)[labels]` over the tokens given.

    Only positions that carry a label belong in here (`select_labelled`).
    The logits are `cap(logit_scale * (hidden @ head.T + bias))` with
    `cap(x) = softcap * tanh(x / softcap)`, the order Gemma and Cohere use. The products run in
    the head's dtype (autocast does not apply), the softmax and the sum in float32.
    Fold the division by the number of trained tokens into `weights_T` where you can: the
    gradient is then rounded to the hidden states' dtype once instead of twice. In float16, whose
    range such weights would leave, the gradient is kept unweighted until the backward pass, and
    weighted there together with a gradient scaler's factor.

    Args:
        hidden_TD: last hidden states of the labelled positions, already shifted.
        head_weight_VD: the LM head (or the tied embedding), frozen.
        labels_T: token ids in [0, V), int64.
        weights_T: loss weight of each token; 1 if None. Gets no gradient.
        bias_V: the head's bias, frozen.
        logit_softcap: Gemma 2's `final_logit_softcapping`.
        logit_scale: a factor on the logits before the soft cap.
        chunk_size: tokens whose logits exist at the same time.
        losses_out_T: filled with each token's loss, unweighted, if given.

    Returns:
        A float32 scalar (float64 for float64 inputs); 0 for an empty batch.

    Raises:
        ValueError: if the head is trainable (its gradient is not computed here), if shapes
            disagree, or if `chunk_size` is not positive.
    """
    head = FrozenHead(head_weight_VD, bias_V, logit_softcap, logit_scale)
    _check_arguments(hidden_TD, head, (labels_T, weights_T, losses_out_T), chunk_size)
    if not torch.is_grad_enabled():
        hidden_TD = hidden_TD.detach()  # an evaluation: forward then computes no gradient
    labelled = (labels_T, weights_T, losses_out_T)
    return _FrozenHeadCrossEntropy.apply(hidden_TD, head, labelled, chunk_size)


def select_labelled(hidden_BSD: Tensor, positions_T: Tensor) -> Tensor:
    """The hidden states `[T, D]` at places of the flattened batch, differentiably, without sync."""
    return hidden_BSD.flatten(0, 1).index_select(0, positions_T)


class _FrozenHeadCrossEntropy(torch.autograd.Function):
    """Loss forward; the hidden states' gradient is ready when forward returns."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden_TD: Tensor,
        head: FrozenHead,
        labelled: tuple[Tensor, Tensor | None, Tensor | None],
        chunk_size: int,
    ) -> Tensor:
        labels_T, weights_T, losses_out_T = labelled
        needs_gradient = ctx.needs_input_grad[0]
        loss = hidden_TD.new_zeros((), dtype=accumulation_dtype(hidden_TD.dtype))
        grad_hidden_TD = torch.empty_like(hidden_TD) if needs_gradient else None
        is_weighted_late = torch.float16 in (hidden_TD.dtype, head.weight_VD.dtype)
        with torch.autocast(hidden_TD.device.type, enabled=False):
            for start, logits_CV in _iter_logits(hidden_TD, head.weight_VD, chunk_size):
                chunk = slice(start, start + len(logits_CV))
                weights_C = None if weights_T is None else weights_T[chunk]
                losses_C = None if losses_out_T is None else losses_out_T[chunk]
                labelled_C = (labels_T[chunk], weights_C, losses_C)
                loss += _reduce_chunk(
                    logits_CV, head, labelled_C, needs_gradient, is_weighted_late=is_weighted_late
                )
                if grad_hidden_TD is not None:  # the chunk now holds the logits' gradient
                    grad_hidden_TD[chunk] = logits_CV @ head.weight_VD
        ctx.save_for_backward(grad_hidden_TD, weights_T if is_weighted_late else None)
        ctx.is_weighted_late, ctx.chunk_size = is_weighted_late, chunk_size
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_TD, weights_T = ctx.saved_tensors
        if not ctx.is_weighted_late:
            return grad_hidden_TD * grad_loss, None, None, None
        return scale_rows(grad_hidden_TD, weights_T, grad_loss, ctx.chunk_size), None, None, None


def scale_rows(
    rows_TD: Tensor, weights_T: Tensor | None, factor: Tensor, chunk_size: int
) -> Tensor:
    """Return `rows * weights * factor` in the rows' dtype, multiplied in float32, in chunks.

    In float16 a scaler's factor alone would be infinite, and a weight of one in many tokens
    would be rounded away.
    """
    scaled_TD = torch.empty_like(rows_TD)
    factors_T = factor.expand(len(rows_TD)) if weights_T is None else weights_T * factor
    for start in range(0, len(rows_TD), chunk_size):
        chunk = slice(start, start + chunk_size)
        scaled_TD[chunk] = rows_TD[chunk].float() * factors_T[chunk, None].float()
    return scaled_TD


def _iter_logits(
    hidden_TD: Tensor, weight_VD: Tensor, chunk_size: int
) -> Iterator[tuple[int, Tensor]]:
    """Yield `(first token, raw logits_CV)`; every chunk is written into the same memory."""
    num_tokens = len(hidden_TD)
    workspace_CV = weight_VD.new_empty(min(chunk_size, num_tokens), len(weight_VD))
    for start in range(0, num_tokens, chunk_size):
        hidden_CD = hidden_TD[start : start + chunk_size].to(weight_VD.dtype)
        logits_CV = workspace_CV[: len(hidden_CD)]
        yield start, torch.mm(hidden_CD, weight_VD.t(), out=logits_CV)


def _reduce_chunk(
    logits_CV: Tensor,
    head: FrozenHead,
    labelled_C: tuple[Tensor, Tensor | None, Tensor | None],
    needs_gradient: bool,
    *,
    is_weighted_late: bool,
) -> Tensor:
    """Return the chunk's loss and, if asked, overwrite its raw logits with their gradient.

    `labelled_C` are labels, weights, and where each token's loss goes; with `is_weighted_late`
    the gradient is that of the unweighted loss.
    """
    labels_C, weights_C, losses_C = labelled_C
    dtype = accumulation_dtype(logits_CV.dtype)
    tile_rows = count_tile_rows(logits_CV, dtype, 2)
    # Both are reused by every tile: new memory of this size costs more than the arithmetic.
    wide_RV, probs_RV = logits_CV.new_empty(2, tile_rows, logits_CV.shape[1], dtype=dtype)
    loss = logits_CV.new_zeros((), dtype=dtype)
    for start in range(0, len(logits_CV), tile_rows):
        tile = slice(start, start + tile_rows)
        raw_RV, labels_R1 = logits_CV[tile], labels_C[tile, None]
        logits_RV = wide_RV[: len(raw_RV)].copy_(raw_RV)
        slope_RV = shape_logits_(logits_RV, head)
        grad_RV = probs_RV[: len(raw_RV)]
        torch.softmax(logits_RV, dim=-1, out=grad_RV)
        # The largest probability is 1 / sum(exp(logit - largest)): its logarithm is always finite.
        lead_R1 = logits_RV.amax(-1, keepdim=True) - logits_RV.gather(1, labels_R1)
        losses_R1 = lead_R1 - grad_RV.amax(-1, keepdim=True).log()
        if losses_C is not None:
            losses_C[tile] = losses_R1[:, 0]
        weights_R1 = None if weights_C is None else weights_C[tile, None].to(dtype)
        loss += (losses_R1 if weights_R1 is None else losses_R1 * weights_R1).sum()
        if needs_gradient:  # d loss / d logits = weight * (softmax - one_hot(label))
            grad_RV.scatter_add_(1, labels_R1, grad_RV.new_full((1, 1), -1).expand_as(labels_R1))
            for factor in (None if is_weighted_late else weights_R1, slope_RV):
                if factor is not None:
                    grad_RV.mul_(factor)
            if head.logit_scale != 1.0:
                grad_RV.mul_(head.logit_scale)
            raw_RV.copy_(grad_RV)
    return loss


def shape_logits_(logits_RV: Tensor, head: FrozenHead) -> Tensor | None:
    """Bias, scale and soft cap in place; returns the slope of the cap, None without one."""
    if head.bias_V is not None:
        logits_RV.add_(head.bias_V)
    if head.logit_scale != 1.0:
        logits_RV.mul_(head.logit_scale)
    if head.logit_softcap is None:
        return None
    tanh_RV = logits_RV.div_(head.logit_softcap).tanh_()
    slope_RV = 1 - tanh_RV.square()
    tanh_RV.mul_(head.logit_softcap)
    return slope_RV


def count_tile_rows(logits_CV: Tensor, dtype: torch.dtype, num_buffers: int) -> int:
    """Return the rows converted at a time: on a CPU what its cache holds, elsewhere all."""
    if logits_CV.device.type != "cpu":
        return len(logits_CV)
    row_bytes = logits_CV.shape[1] * dtype.itemsize * num_buffers
    return min(len(logits_CV), max(1, int(CPU_TILE_BYTES // row_bytes)))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what losses of such states are summed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_arguments(
    hidden_TD: Tensor,
    head: FrozenHead,
    labelled: tuple[Tensor, Tensor | None, Tensor | None],
    chunk_size: int,
) -> None:
    labels_T, weights_T, losses_out_T = labelled
    if any(p is not None and p.requires_grad for p in (head.weight_VD, head.bias_V)):
        raise ValueError(
            "linear_cross_entropy computes no gradient for the LM head, but the head requires one; "
            "use the model's own loss, or freeze the head"
        )
    num_tokens, width = hidden_TD.shape
    expected = {
        "head_weight_VD": (head.weight_VD, (len(head.weight_VD), width)),
        "labels_T": (labels_T, (num_tokens,)),
        "weights_T": (weights_T, (num_tokens,)),
        "losses_out_T": (losses_out_T, (num_tokens,)),
        "bias_V": (head.bias_V, (len(head.weight_VD),)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, expected at least 1")
