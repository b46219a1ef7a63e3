"""Causal attention over a padding-free batch in small tiles of plain matrix products.

On a CPU torch's flash attention spends most of a short row's time outside the matrix products,
and its backward pass more still. Here a tile is a run of neighboring queries with all the keys
they may see: consecutive short rows share a tile under a block-diagonal mask, a long row is cut
into several. Tiles of about one size are computed together, padded to the largest of them: fewer
calls, and work that divides evenly among the cores.
Only query, key and value are kept for the backward pass, which computes the probabilities again.

The values may be of a width of their own, and so is the output then.

Shape suffixes: H query heads, G key/value heads (groups), R = H / G heads of a group, T tokens of
the batch, D head width, S = G * tiles of a stack, Q = R * queries of a tile, K keys of a tile.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

# Samples are merged up to this many queries and cut above it. Measured on AVX-512 cores (9 heads in
# 3 groups of width 64, bf16, forward and backward) as a share of the time of one
# `scaled_dot_product_attention` a sample: 0.46 on rows of 30-100 tokens, 0.57 at 170, 0.57 at 480,
# 0.79 at 950, 0.93 at 2048. Tiles of 64 or 192 are level or slower, 256 loses up to 70 % to 128.
TILE_QUERIES = 128
# Tiles are computed together while the smallest has this share of the largest one's keys and a
# float32 copy of all scores stays below these bytes. Two or three short tiles are 4-9 % of a whole
# step faster than one at a time on two cores; stacks of 4 MB and more fall out of the inner cache
# and are up to 40 % slower.
STACK_SHARE = 0.7
STACK_BYTES = 3 << 19


class Tile(NamedTuple):
    """Queries and keys as token ranges of the batch; both end at the same token.

    `beginning` is the part of a shared beginning that the queries see before the other keys.
    """

    queries: slice
    keys: slice
    # Added to the scores of the last `mask.shape[1]` keys (0 or -inf); all earlier keys are seen.
    mask: Tensor
    beginning: slice = slice(0, 0)

    @property
    def num_queries(self) -> int:
        """Return the number of queries."""
        return int(self.queries.stop - self.queries.start)

    @property
    def num_keys(self) -> int:
        """Return the number of keys, those of the shared beginning included."""
        return self.num_shared + int(self.keys.stop - self.keys.start)

    @property
    def num_shared(self) -> int:
        """Return how many keys belong to the shared beginning."""
        return int(self.beginning.stop - self.beginning.start)


class Stack(NamedTuple):
    """Tiles computed together, each padded at its end to the largest one."""

    tiles: tuple[Tile, ...]
    num_queries: int
    num_keys: int
    # Added to the scores of the last `mask.shape[2]` keys: [tiles, queries, masked keys].
    mask: Tensor

    @property
    def is_even(self) -> bool:
        """Whether no tile is padded."""
        return all(
            tile.num_queries == self.num_queries and tile.num_keys == self.num_keys
            for tile in self.tiles
        )


class ScoreRule(NamedTuple):
    """Who sees whom and how strongly: `cap(scale * q @ k.T)`, over the window's keys.

    If `has_beginning`, the first sample is what all others begin with: they see it, too, and their
    own tokens follow it.
    """

    scale: float
    sliding_window: int | None = None
    softcap: float | None = None
    has_beginning: bool = False


def tiled_attention(
    query_1HTD: Tensor,
    key_1GTD: Tensor,
    value_1GTD: Tensor,
    lengths: tuple[int, ...],
    rule: ScoreRule,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Causal attention within each of the consecutive samples whose `lengths` are given.

    Shapes and semantics are those of `varlen_attention`. Scores and softmax are float32 (float64
    for float64 inputs), the products with the probabilities run in the inputs' dtype, gradients
    of keys and values are summed over tiles in float32. Works on any device, is made for CPUs.
    """
    return _TiledAttention.apply(query_1HTD, key_1GTD, value_1GTD, lengths, rule, sinks_H)


@lru_cache(maxsize=8)  # every layer asks for the same one or two plans, forward and backward
def plan_tiles(
    lengths: tuple[int, ...], sliding_window: int | None, *, has_beginning: bool = False
) -> tuple[Tile, ...]:
    """Cut a packed batch into tiles: short neighbors merged, long samples split evenly."""
    if has_beginning:
        shared, *own = lengths
        first = plan_tiles((shared,), sliding_window)
        return (*first, *_plan_samples(own, sliding_window, shared=shared))
    return tuple(_plan_samples(lengths, sliding_window, shared=0))


def _plan_samples(
    lengths: Sequence[int], sliding_window: int | None, *, shared: int
) -> Iterator[Tile]:
    """Yield the tiles of samples that follow `shared` tokens, which they all begin with."""
    merged: list[int] = []
    start = shared  # of the next tile
    for length in lengths:
        if merged and sum(merged) + length > TILE_QUERIES:
            yield _merged_tile(start, merged, sliding_window, shared)
            start, merged = start + sum(merged), []
        if length <= TILE_QUERIES:
            merged.append(length)
        else:
            yield from _iter_cut_tiles(start, length, sliding_window, shared)
            start += length
    if merged:
        yield _merged_tile(start, merged, sliding_window, shared)


def _merged_tile(start: int, lengths: list[int], sliding_window: int | None, shared: int) -> Tile:
    tokens = slice(start, start + sum(lengths))
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.arange(len(sample))
    is_seen = _is_in_reach(position, position, sliding_window) & (sample[:, None] == sample)
    beginning = _in_reach_of(0, sliding_window, shared)
    if sliding_window is not None and shared:
        row_position = shared + torch.cat([torch.arange(length) for length in lengths])
        before = torch.arange(beginning.start, shared)
        is_seen = torch.cat([_is_in_reach(row_position, before, sliding_window), is_seen], 1)
    return Tile(tokens, tokens, _additive(is_seen), beginning)


def _iter_cut_tiles(
    start: int, length: int, sliding_window: int | None, shared: int
) -> Iterator[Tile]:
    num_tiles = -(-length // TILE_QUERIES)
    bounds = [start + length * i // num_tiles for i in range(num_tiles + 1)]
    for first, stop in pairwise(bounds):
        first_key = start if sliding_window is None else max(start, first - sliding_window + 1)
        beginning = _in_reach_of(first - start, sliding_window, shared)
        # Within the first window, every query of the tile sees all keys before the tile.
        sees_all_before = sliding_window is None or stop - start + shared <= sliding_window
        num_shared = beginning.stop - beginning.start
        num_before = 0 if sees_all_before else num_shared + first - first_key
        mask = _cut_mask(stop - first, num_before, sliding_window)
        yield Tile(slice(first, stop), slice(first_key, stop), mask, beginning)


def _in_reach_of(own_position: int, sliding_window: int | None, shared: int) -> slice:
    """Return what of the shared beginning the token at a sample's `own_position` sees."""
    if sliding_window is None:
        return slice(0, shared)
    return slice(min(shared, max(0, shared + own_position - sliding_window + 1)), shared)


@lru_cache(maxsize=8)  # one long sample has two sizes of tiles, and their masks are large
def _cut_mask(num_queries: int, num_before: int, sliding_window: int | None) -> Tensor:
    """Return the mask of a tile whose queries follow `num_before` masked keys; do not change it."""
    keys = torch.arange(num_before + num_queries)
    return _additive(_is_in_reach(keys[num_before:], keys, sliding_window))


def _is_in_reach(queries: Tensor, keys: Tensor, sliding_window: int | None) -> Tensor:
    distance = queries[:, None] - keys
    is_seen = distance >= 0
    return is_seen if sliding_window is None else is_seen & (distance < sliding_window)


def _additive(is_seen: Tensor) -> Tensor:
    return torch.zeros(is_seen.shape).masked_fill_(~is_seen, -torch.inf)


@lru_cache(maxsize=8)
def plan_stacks(
    lengths: tuple[int, ...],
    sliding_window: int | None,
    num_heads: int,
    *,
    has_beginning: bool = False,
) -> tuple[Stack, ...]:
    """Put tiles with about as many keys together; every tile is in exactly one stack."""
    stacks: list[list[Tile]] = []
    tiles = plan_tiles(lengths, sliding_window, has_beginning=has_beginning)
    for tile in sorted(tiles, key=lambda tile: -tile.num_keys):
        largest = stacks[-1][0] if stacks else None
        if largest is not None and tile.num_keys >= STACK_SHARE * largest.num_keys:
            num_queries = max(one.num_queries for one in (*stacks[-1], tile))
            scores = (len(stacks[-1]) + 1) * num_heads * num_queries * largest.num_keys
            if scores * torch.float32.itemsize <= STACK_BYTES:
                stacks[-1].append(tile)
                continue
        stacks.append([tile])
    return tuple(_stack(tiles) for tiles in stacks)


def _stack(tiles: list[Tile]) -> Stack:
    num_queries = max(tile.num_queries for tile in tiles)
    num_keys = max(tile.num_keys for tile in tiles)
    if len(tiles) == 1:
        return Stack(tuple(tiles), num_queries, num_keys, tiles[0].mask[None])
    first_masked = min(tile.num_keys - tile.mask.shape[1] for tile in tiles)
    mask = torch.zeros(len(tiles), num_queries, num_keys - first_masked)
    for mask_of_one, tile in zip(mask, tiles, strict=True):
        mask_of_one[:, tile.num_keys - first_masked :] = -torch.inf  # padding
        start = tile.num_keys - tile.mask.shape[1] - first_masked
        mask_of_one[: tile.num_queries, start : tile.num_keys - first_masked] = tile.mask
    return Stack(tuple(tiles), num_queries, num_keys, mask)


class _TiledAttention(torch.autograd.Function):
    """Forward keeps its inputs; backward walks the same stacks again."""

    @staticmethod
    def forward(  # noqa: PLR0913
        ctx: FunctionCtx,
        query_1HTD: Tensor,
        key_1GTD: Tensor,
        value_1GTD: Tensor,
        lengths: tuple[int, ...],
        rule: ScoreRule,
        sinks_H: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(query_1HTD, key_1GTD, value_1GTD)
        ctx.lengths, ctx.rule, ctx.sinks = lengths, rule, sinks_H
        query_GRTD = _group_heads(query_1HTD, key_1GTD.shape[1])
        output_GRTD, output_1HTD = _empty_heads(query_GRTD, value_1GTD.shape[-1])
        with torch.autocast(query_1HTD.device.type, enabled=False):
            for stack in _stacks(lengths, rule, query_1HTD):
                query_SQD = _read_queries(query_GRTD, stack)
                key_SKD, value_SKD = (_read_keys(part[0], stack) for part in (key_1GTD, value_1GTD))
                probs_SQK, _ = _probabilities(query_SQD, key_SKD, stack, rule, sinks_H)
                _write_queries(output_GRTD, stack, probs_SQK.to(value_SKD.dtype) @ value_SKD)
        return output_1HTD

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output_1HTD: Tensor) -> tuple[Tensor | None, ...]:
        query_1HTD, key_1GTD, value_1GTD = ctx.saved_tensors
        rule: ScoreRule = ctx.rule
        dtype = query_1HTD.dtype
        query_GRTD = _group_heads(query_1HTD, key_1GTD.shape[1])
        grad_output_GRTD = _group_heads(grad_output_1HTD, key_1GTD.shape[1])
        grad_query_GRTD, grad_query_1HTD = _empty_heads(query_GRTD, query_1HTD.shape[-1])
        grad_key_GTD, grad_value_GTD = _zero_sums(key_1GTD), _zero_sums(value_1GTD)
        for stack in _stacks(ctx.lengths, rule, query_1HTD):
            query_SQD, grad_SQD = (
                _read_queries(heads, stack) for heads in (query_GRTD, grad_output_GRTD)
            )
            key_SKD, value_SKD = (_read_keys(part[0], stack) for part in (key_1GTD, value_1GTD))
            probs_SQK, slope_SQK = _probabilities(query_SQD, key_SKD, stack, rule, ctx.sinks)
            grad_probs_SQK = (grad_SQD @ value_SKD.mT).to(probs_SQK.dtype)
            _add_keys(grad_value_GTD, stack, probs_SQK.to(dtype).mT @ grad_SQD)
            grad_scores_SQK = torch._softmax_backward_data(
                grad_probs_SQK, probs_SQK, -1, probs_SQK.dtype
            )
            if slope_SQK is not None:
                grad_scores_SQK.mul_(slope_SQK)
            grad_scores_SQK = grad_scores_SQK.mul_(rule.scale).to(dtype)
            _write_queries(grad_query_GRTD, stack, grad_scores_SQK @ key_SKD)
            _add_keys(grad_key_GTD, stack, grad_scores_SQK.mT @ query_SQD)
        return (
            grad_query_1HTD,
            grad_key_GTD[None].to(dtype),
            grad_value_GTD[None].to(dtype),
            None,
            None,
            None,
        )


def _stacks(lengths: tuple[int, ...], rule: ScoreRule, query_1HTD: Tensor) -> tuple[Stack, ...]:
    num_heads = query_1HTD.shape[1]
    return plan_stacks(lengths, rule.sliding_window, num_heads, has_beginning=rule.has_beginning)


def _probabilities(
    query_SQD: Tensor, key_SKD: Tensor, stack: Stack, rule: ScoreRule, sinks_H: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Attention probabilities, and the slope of the soft cap (None without one)."""
    dtype = torch.promote_types(query_SQD.dtype, torch.float32)
    scores_SQK = (query_SQD.to(dtype) * rule.scale) @ key_SKD.to(dtype).mT
    slope_SQK = None
    if rule.softcap is not None:
        tanh_SQK = scores_SQK.div_(rule.softcap).tanh_()
        slope_SQK = 1 - tanh_SQK.square()
        scores_SQK = tanh_SQK.mul_(rule.softcap)
    num_tiles, num_queries, num_masked = stack.mask.shape
    # Every head of a tile has the same mask.
    scores = scores_SQK.view(num_tiles, -1, num_queries, stack.num_keys)
    scores[..., stack.num_keys - num_masked :] += stack.mask[:, None].to(scores.device)
    if sinks_H is None:
        return torch.softmax(scores_SQK, dim=-1), slope_SQK
    # A sink is one more score of its head, whose probability goes nowhere.
    groups = len(query_SQD) // num_tiles
    sinks_GQ = sinks_H.to(dtype).view(groups, -1).repeat_interleave(num_queries, dim=1)
    sums_SQ1 = torch.logsumexp(scores_SQK, dim=-1, keepdim=True)
    sums_SQ1 = torch.logaddexp(sums_SQ1, sinks_GQ.repeat(num_tiles, 1)[..., None])
    return scores_SQK.sub_(sums_SQ1).exp_(), slope_SQK


def _group_heads(heads_1HTD: Tensor, num_groups: int) -> Tensor:
    """View `[1, H, T, D]` as `[G, R, T, D]`: the heads of a group are neighbors."""
    return heads_1HTD[0].unflatten(0, (num_groups, -1))


def _empty_heads(like_GRTD: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """New memory ordered `[T, H, width]`, what the next projection reads, in both views."""
    groups, heads, tokens, _ = like_GRTD.shape
    memory_TGRD = like_GRTD.new_empty(tokens, groups, heads, width)
    return memory_TGRD.permute(1, 2, 0, 3), memory_TGRD.flatten(1, 2).transpose(0, 1)[None]


def _zero_sums(heads_1GTD: Tensor) -> Tensor:
    """Float32 sums `[G, T, D]` over memory ordered `[T, G, D]`."""
    dtype = torch.promote_types(heads_1GTD.dtype, torch.float32)
    _, groups, tokens, width = heads_1GTD.shape
    return heads_1GTD.new_zeros(tokens, groups, width, dtype=dtype).transpose(0, 1)


def _read_queries(heads_GRTD: Tensor, stack: Stack) -> Tensor:
    """Copy the tiles' queries; padding is zero, and so are its gradients."""
    groups, heads, _, width = heads_GRTD.shape
    make = heads_GRTD.new_empty if stack.is_even else heads_GRTD.new_zeros
    copies = make(len(stack.tiles), groups, heads, stack.num_queries, width)
    for copy, tile in zip(copies.unbind(), stack.tiles, strict=True):
        copy[:, :, : tile.num_queries].copy_(heads_GRTD[:, :, tile.queries])
    return copies.view(-1, heads * stack.num_queries, width)


def _write_queries(heads_GRTD: Tensor, stack: Stack, rows_SQD: Tensor) -> None:
    groups, heads, _, width = heads_GRTD.shape
    rows = rows_SQD.view(len(stack.tiles), groups, heads, stack.num_queries, width)
    for row, tile in zip(rows.unbind(), stack.tiles, strict=True):
        heads_GRTD[:, :, tile.queries].copy_(row[:, :, : tile.num_queries])


def _read_keys(heads_GTD: Tensor, stack: Stack) -> Tensor:
    """Copy the tiles' keys or values; padding is zero."""
    groups, _, width = heads_GTD.shape
    make = heads_GTD.new_empty if stack.is_even else heads_GTD.new_zeros
    copies = make(len(stack.tiles), groups, stack.num_keys, width)
    for copy, tile in zip(copies.unbind(), stack.tiles, strict=True):
        if tile.num_shared:
            copy[:, : tile.num_shared].copy_(heads_GTD[:, tile.beginning])
        copy[:, tile.num_shared : tile.num_keys].copy_(heads_GTD[:, tile.keys])
    return copies.view(-1, stack.num_keys, width)


def _add_keys(sums_GTD: Tensor, stack: Stack, rows_SKD: Tensor) -> None:
    """Add the tiles' gradients where they belong; those of a sample or a beginning share keys."""
    groups, _, width = sums_GTD.shape
    rows = rows_SKD.view(len(stack.tiles), groups, stack.num_keys, width)
    for row, tile in zip(rows.unbind(), stack.tiles, strict=True):
        if tile.num_shared:
            sums_GTD[:, tile.beginning] += row[:, : tile.num_shared]
        sums_GTD[:, tile.keys] += row[:, tile.num_shared : tile.num_keys]
