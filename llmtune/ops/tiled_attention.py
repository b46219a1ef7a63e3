"""Causal attention over a padding-free batch in small tiles of plain matrix products.

On a CPU torch's flash attention spends most of a short row's time outside the matrix products,
and its backward pass more still. Here a tile is a run of neighbouring queries with all the keys
they may see: consecutive short rows share a tile under a block-diagonal mask, a long row is cut
into several, so every intermediate stays in the cache and nothing is padded, gathered or repeated.
Only query, key and value are kept for the backward pass, which computes the probabilities again.

Shape suffixes: H query heads, G key/value heads (groups), R = H / G heads of a group, T tokens of
the batch, D head width, Q = R * queries of a tile, K keys of a tile.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

# Samples are merged up to this many queries and cut above it. Measured on AVX-512 cores (9 heads in
# 3 groups of width 64, bf16, forward and backward) as a share of the time of one
# `scaled_dot_product_attention` a sample: 0.46 on rows of 30-100 tokens, 0.57 at 170, 0.57 at 480,
# 0.79 at 950, 0.93 at 2048. Tiles of 64 or 192 are level or slower, 256 loses up to 70 % to 128.
TILE_QUERIES = 128


class Tile(NamedTuple):
    """Queries and keys as token ranges of the batch; both end at the same token."""

    queries: slice
    keys: slice
    # Added to the scores of the last `mask.shape[1]` keys (0 or -inf); all earlier keys are seen.
    mask: Tensor


class ScoreRule(NamedTuple):
    """Who sees whom and how strongly: `cap(scale * q @ k.T)`, over the window's keys."""

    scale: float
    sliding_window: int | None = None
    softcap: float | None = None


def tiled_attention(
    query_1HTD: Tensor,
    key_1GTD: Tensor,
    value_1GTD: Tensor,
    lengths: tuple[int, ...],
    rule: ScoreRule,
) -> Tensor:
    """Causal attention within each of the consecutive samples whose `lengths` are given.

    Shapes and semantics are those of `varlen_attention`. Scores and softmax are float32 (float64
    for float64 inputs), the products with the probabilities run in the inputs' dtype, gradients
    of keys and values are summed over tiles in float32. Works on any device, is made for CPUs.
    """
    return _TiledAttention.apply(query_1HTD, key_1GTD, value_1GTD, lengths, rule)


@lru_cache(maxsize=8)  # every layer asks for the same one or two plans, forward and backward
def plan_tiles(lengths: tuple[int, ...], sliding_window: int | None) -> tuple[Tile, ...]:
    """Cut a packed batch into tiles: short neighbours merged, long samples split evenly."""
    tiles: list[Tile] = []
    merged: list[int] = []
    start = 0  # of the next tile
    for length in lengths:
        if merged and sum(merged) + length > TILE_QUERIES:
            tiles.append(_merged_tile(start, merged, sliding_window))
            start, merged = tiles[-1].queries.stop, []
        if length <= TILE_QUERIES:
            merged.append(length)
        else:
            tiles.extend(_iter_cut_tiles(start, length, sliding_window))
            start += length
    if merged:
        tiles.append(_merged_tile(start, merged, sliding_window))
    return tuple(tiles)


def _merged_tile(start: int, lengths: list[int], sliding_window: int | None) -> Tile:
    tokens = slice(start, start + sum(lengths))
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.arange(len(sample))
    is_seen = _is_in_reach(position, position, sliding_window) & (sample[:, None] == sample)
    return Tile(tokens, tokens, _additive(is_seen))


def _iter_cut_tiles(start: int, length: int, sliding_window: int | None) -> Iterator[Tile]:
    num_tiles = -(-length // TILE_QUERIES)
    bounds = [start + length * i // num_tiles for i in range(num_tiles + 1)]
    for first, stop in zip(bounds, bounds[1:], strict=False):
        first_key = start if sliding_window is None else max(start, first - sliding_window + 1)
        # Without a window, every query of the tile sees all keys before the tile.
        first_masked = first if first_key == start and sliding_window is None else first_key
        is_seen = _is_in_reach(
            torch.arange(first, stop), torch.arange(first_masked, stop), sliding_window
        )
        yield Tile(slice(first, stop), slice(first_key, stop), _additive(is_seen))


def _is_in_reach(queries: Tensor, keys: Tensor, sliding_window: int | None) -> Tensor:
    distance = queries[:, None] - keys
    is_seen = distance >= 0
    return is_seen if sliding_window is None else is_seen & (distance < sliding_window)


def _additive(is_seen: Tensor) -> Tensor:
    return torch.zeros(is_seen.shape).masked_fill_(~is_seen, -torch.inf)


class _TiledAttention(torch.autograd.Function):
    """Forward keeps its inputs; backward walks the same tiles again."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        query_1HTD: Tensor,
        key_1GTD: Tensor,
        value_1GTD: Tensor,
        lengths: tuple[int, ...],
        rule: ScoreRule,
    ) -> Tensor:
        ctx.save_for_backward(query_1HTD, key_1GTD, value_1GTD)
        ctx.lengths, ctx.rule = lengths, rule
        query_GRTD = _group_heads(query_1HTD, key_1GTD.shape[1])
        output_GRTD, output_1HTD = _empty_heads(query_GRTD)
        for tile in plan_tiles(lengths, rule.sliding_window):
            query_GQD = _read_queries(query_GRTD, tile)
            probs_GQK, _ = _probabilities(query_GQD, key_1GTD[0, :, tile.keys], tile, rule)
            output_GQD = probs_GQK.to(value_1GTD.dtype) @ value_1GTD[0, :, tile.keys]
            _write_queries(output_GRTD, tile, output_GQD)
        return output_1HTD

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output_1HTD: Tensor) -> tuple[Tensor | None, ...]:
        query_1HTD, key_1GTD, value_1GTD = ctx.saved_tensors
        rule: ScoreRule = ctx.rule
        dtype = query_1HTD.dtype
        query_GRTD = _group_heads(query_1HTD, key_1GTD.shape[1])
        grad_output_GRTD = _group_heads(grad_output_1HTD, key_1GTD.shape[1])
        grad_query_GRTD, grad_query_1HTD = _empty_heads(query_GRTD)
        grad_key_GTD, grad_value_GTD = _zero_sums(key_1GTD), _zero_sums(value_1GTD)
        for tile in plan_tiles(ctx.lengths, rule.sliding_window):
            query_GQD, grad_GQD = (
                _read_queries(query_GRTD, tile),
                _read_queries(grad_output_GRTD, tile),
            )
            key_GKD, value_GKD = key_1GTD[0, :, tile.keys], value_1GTD[0, :, tile.keys]
            probs_GQK, slope_GQK = _probabilities(query_GQD, key_GKD, tile, rule)
            grad_probs_GQK = (grad_GQD @ value_GKD.mT).to(probs_GQK.dtype)
            grad_value_GTD[:, tile.keys] += probs_GQK.to(dtype).mT @ grad_GQD
            grad_scores_GQK = torch._softmax_backward_data(
                grad_probs_GQK, probs_GQK, -1, probs_GQK.dtype
            )
            if slope_GQK is not None:
                grad_scores_GQK.mul_(slope_GQK)
            grad_scores_GQK = grad_scores_GQK.mul_(rule.scale).to(dtype)
            _write_queries(grad_query_GRTD, tile, grad_scores_GQK @ key_GKD)
            grad_key_GTD[:, tile.keys] += grad_scores_GQK.mT @ query_GQD
        return (
            grad_query_1HTD,
            grad_key_GTD[None].to(dtype),
            grad_value_GTD[None].to(dtype),
            None,
            None,
        )


def _probabilities(
    query_GQD: Tensor, key_GKD: Tensor, tile: Tile, rule: ScoreRule
) -> tuple[Tensor, Tensor | None]:
    """Attention probabilities, and the slope of the soft cap (None without one)."""
    dtype = torch.promote_types(query_GQD.dtype, torch.float32)
    scores_GQK = (query_GQD.to(dtype) * rule.scale) @ key_GKD.to(dtype).mT
    slope_GQK = None
    if rule.softcap is not None:
        tanh_GQK = scores_GQK.div_(rule.softcap).tanh_()
        slope_GQK = 1 - tanh_GQK.square()
        scores_GQK = tanh_GQK.mul_(rule.softcap)
    num_queries, num_masked = tile.mask.shape
    scores_GRQK = scores_GQK.unflatten(1, (-1, num_queries))
    scores_GRQK[..., -num_masked:] += tile.mask.to(scores_GQK.device)
    return torch.softmax(scores_GQK, dim=-1), slope_GQK


def _group_heads(heads_1HTD: Tensor, num_groups: int) -> Tensor:
    """View `[1, H, T, D]` as `[G, R, T, D]`: the heads of a group are neighbours."""
    return heads_1HTD[0].unflatten(0, (num_groups, -1))


def _empty_heads(like_GRTD: Tensor) -> tuple[Tensor, Tensor]:
    """New memory ordered `[T, H, D]`, what the next projection reads, in both views."""
    groups, heads, tokens, width = like_GRTD.shape
    memory_TGRD = like_GRTD.new_empty(tokens, groups, heads, width)
    return memory_TGRD.permute(1, 2, 0, 3), memory_TGRD.flatten(1, 2).transpose(0, 1)[None]


def _zero_sums(heads_1GTD: Tensor) -> Tensor:
    """Float32 sums `[G, T, D]` over memory ordered `[T, G, D]`."""
    dtype = torch.promote_types(heads_1GTD.dtype, torch.float32)
    _, groups, tokens, width = heads_1GTD.shape
    return heads_1GTD.new_zeros(tokens, groups, width, dtype=dtype).transpose(0, 1)


def _read_queries(heads_GRTD: Tensor, tile: Tile) -> Tensor:
    return heads_GRTD[:, :, tile.queries].flatten(1, 2)


def _write_queries(heads_GRTD: Tensor, tile: Tile, rows_GQD: Tensor) -> None:
    target = heads_GRTD[:, :, tile.queries]
    target.copy_(rows_GQD.view(target.shape))
