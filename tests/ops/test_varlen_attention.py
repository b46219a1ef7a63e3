"""Packed attention against plain torch: value, gradient, isolation, and which backend is chosen."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtune.ops import tiled_attention as tiled
from llmtune.ops.tiled_attention import plan_stacks, plan_tiles
from llmtune.ops.varlen_attention import (
    VARLEN_BACKENDS,
    choose_varlen_backend,
    varlen_attention,
)

WIDTH = 8
SCALE = WIDTH**-0.5
LENGTHS = (3, 1, 7, 2, 5, 1)
SHAPES: dict[str, dict[str, Any]] = {
    "causal": {},
    "window": {"sliding_window": 3},
    "window_of_one": {"sliding_window": 1},
    "softcap": {"softcap": 1.5},
    "window_and_softcap": {"sliding_window": 4, "softcap": 1.5},
}
SINKS: dict[str, Any] = {"sinks_H": torch.linspace(-2, 3, 6, dtype=torch.float64)}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


@pytest.fixture
def small_tiles(monkeypatch):
    """Rows of these tests are then both merged and cut."""
    monkeypatch.setattr(tiled, "TILE_QUERIES", 4)
    clear_plans()
    yield
    clear_plans()


def clear_plans() -> None:
    plan_tiles.cache_clear()
    plan_stacks.cache_clear()


Inputs = tuple[Tensor, Tensor, Tensor]


def make_inputs(lengths, dtype, *, heads=6, groups=2, seed=0) -> Inputs:
    """Strided as transformers makes them: memory ordered `[1, T, heads, D]`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, sum(lengths), count, WIDTH) for count in (heads, groups, groups)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    query, key, value = (
        tensor.to(dtype).transpose(1, 2).detach().requires_grad_() for tensor in tensors
    )
    return query, key, value


def detached(inputs: Inputs) -> Inputs:
    query, key, value = (tensor.detach() for tensor in inputs)
    return query, key, value


def plain_attention(
    query,
    key,
    value,
    lengths,
    *,
    scale,
    sliding_window=None,
    softcap=None,
    sinks_H=None,
    has_beginning=False,
):
    """Every score of the whole row, then one mask: nothing clever."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.cat([torch.arange(length) for length in lengths])
    position += lengths[0] * (sample > 0) if has_beginning else 0
    distance = position[:, None] - position
    is_seen = (sample[:, None] == sample) | (has_beginning & (sample == 0))
    is_seen &= distance >= 0
    if sliding_window is not None:
        is_seen &= distance < sliding_window
    scores = scores.masked_fill(~is_seen, -torch.inf)
    if sinks_H is not None:
        sinks = sinks_H.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1] @ value
    return torch.softmax(scores, -1) @ value


def value_and_gradients(attend, inputs, lengths, **options) -> list[Tensor]:
    output = attend(*inputs, lengths, scale=SCALE, **options)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream.to(output.dtype))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("name", [*SHAPES, "sinks"])
def test_tiled_equals_plain_attention(name, groups, dtype, small_tiles):
    inputs = make_inputs(LENGTHS, dtype, groups=groups)
    options = SHAPES.get(name, SINKS)
    results = value_and_gradients(varlen_attention, inputs, LENGTHS, **options)
    expected = value_and_gradients(plain_attention, inputs, LENGTHS, **options)
    for result, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ["tiled", "padded_sdpa"])
def test_values_of_a_smaller_width_give_outputs_of_theirs(backend):
    query, key, value = make_inputs(LENGTHS, torch.float64)
    inputs = (query, key, value[..., :5].detach().requires_grad_())
    results = value_and_gradients(varlen_attention, inputs, LENGTHS, backend=backend)
    expected = value_and_gradients(plain_attention, inputs, LENGTHS)
    for result, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=0, atol=1e-10)


def test_sinks_are_only_given_to_a_backend_that_has_them():
    assert choose_varlen_backend("cuda", has_sinks=True) == "tiled"
    with pytest.raises(ValueError, match="no attention sinks"):
        varlen_attention(
            *make_inputs(LENGTHS, torch.float64), LENGTHS, scale=1, backend="flex", **SINKS
        )


@pytest.mark.parametrize("shared", [1, 3, 9])
@pytest.mark.parametrize("backend", ["tiled", "flex"])
@pytest.mark.parametrize("name", SHAPES)
def test_samples_that_share_their_beginning_equal_plain_attention(
    name, backend, shared, small_tiles
):
    lengths, options = (shared, *LENGTHS), {**SHAPES[name], "has_beginning": True}
    inputs = make_inputs(lengths, torch.float64)
    expected = value_and_gradients(plain_attention, inputs, lengths, **options)
    if backend == "flex":  # has no backward pass on a CPU
        inputs, options = detached(inputs), {**options, "scale": SCALE}
        results = [varlen_attention(*inputs, lengths, backend=backend, **options)]
    else:
        results = value_and_gradients(varlen_attention, inputs, lengths, **options)
    for result, reference in zip(results, expected, strict=False):
        torch.testing.assert_close(result, reference, rtol=0, atol=1e-10)


def test_a_backend_without_shared_beginnings_says_so():
    with pytest.raises(ValueError, match="padded_sdpa attention has no shared beginning"):
        varlen_attention(
            *make_inputs(LENGTHS, torch.float32),
            LENGTHS,
            scale=SCALE,
            has_beginning=True,
            backend="padded_sdpa",
        )


@pytest.mark.parametrize("lengths", [(1,), (1, 1, 1), (128, 1), (129,), (60, 70, 400, 10, 193)])
def test_tiled_equals_plain_attention_at_its_real_tile_sizes(lengths):
    inputs = make_inputs(lengths, torch.float64, heads=2, groups=1)
    results = value_and_gradients(varlen_attention, inputs, lengths)
    expected = value_and_gradients(plain_attention, inputs, lengths)
    for result, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=0, atol=1e-10)


@pytest.mark.parametrize("window", [None, 1, 3, max(LENGTHS) - 1, max(LENGTHS), 100])
def test_padded_sdpa_equals_plain_attention(window):
    inputs = make_inputs(LENGTHS, torch.float64)
    options = {"sliding_window": window}
    results = value_and_gradients(
        varlen_attention, inputs, LENGTHS, backend="padded_sdpa", **options
    )
    expected = value_and_gradients(plain_attention, inputs, LENGTHS, **options)
    for result, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", SHAPES)
def test_flex_equals_plain_attention(name):
    inputs = detached(make_inputs(LENGTHS, torch.float32, groups=2))
    result = varlen_attention(*inputs, LENGTHS, scale=SCALE, backend="flex", **SHAPES[name])
    expected = plain_attention(*inputs, LENGTHS, scale=SCALE, **SHAPES[name])
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("lengths", [(30, 45, 100), (300,)])
def test_bfloat16_is_as_close_to_the_truth_as_torch_attention(lengths):
    inputs = make_inputs(lengths, torch.bfloat16)
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    truth = value_and_gradients(plain_attention, exact_inputs, lengths)
    ours = value_and_gradients(varlen_attention, inputs, lengths)
    stock = value_and_gradients(varlen_attention, inputs, lengths, backend="padded_sdpa")

    def total_error(results: list[Tensor]) -> float:
        pairs = zip(results, truth, strict=True)
        return sum(float((got.double() - want).norm() / want.norm()) for got, want in pairs)

    assert all(result.dtype == torch.bfloat16 for result in ours)
    assert total_error(ours) <= 1.1 * total_error(stock)


@pytest.mark.parametrize("backend", ["tiled", "padded_sdpa"])
def test_a_neighbor_has_no_influence_at_all(backend, small_tiles):
    inputs = make_inputs(LENGTHS, torch.float32)
    kept = slice(sum(LENGTHS[:2]), sum(LENGTHS[:3]))  # the third sample
    changed = []
    for tensor, other in zip(inputs, make_inputs(LENGTHS, torch.float32, seed=9), strict=True):
        mixed = 5 * other.detach().clone()
        mixed[:, :, kept] = tensor.detach()[:, :, kept]
        changed.append(mixed.requires_grad_())

    def kept_results(tensors: Sequence[Tensor]) -> list[Tensor]:
        query, key, value = tensors
        output = varlen_attention(query, key, value, LENGTHS, scale=SCALE, backend=backend)[
            :, :, kept
        ]
        gradients = torch.autograd.grad(output.square().sum(), tensors)
        foreign = torch.ones(sum(LENGTHS), dtype=torch.bool)
        foreign[kept] = False
        assert all(gradient[:, :, foreign].abs().max() == 0.0 for gradient in gradients)
        return [output.detach(), *(gradient[:, :, kept] for gradient in gradients)]

    for first, second in zip(kept_results(inputs), kept_results(changed), strict=True):
        assert (first - second).abs().max() == 0.0


@pytest.mark.parametrize("backend", ["tiled", "padded_sdpa", "flex"])
def test_the_next_projection_reads_the_result_without_a_copy(backend):
    inputs = detached(make_inputs(LENGTHS, torch.float32))
    output = varlen_attention(*inputs, LENGTHS, scale=SCALE, backend=backend)
    assert output.transpose(1, 2).is_contiguous()


def test_only_query_key_and_value_are_kept_for_backward():
    inputs = make_inputs((40, 90), torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        varlen_attention(*inputs, (40, 90), scale=SCALE)
    assert [tensor.data_ptr() for tensor in saved] == [tensor.data_ptr() for tensor in inputs]


def test_tiles_cover_every_query_once_and_stay_small():
    lengths = (5, 120, 8, 1, 128, 129, 1000, 3)
    tiles = plan_tiles(lengths, None)
    covered = [token for tile in tiles for token in range(tile.queries.start, tile.queries.stop)]
    assert covered == list(range(sum(lengths)))
    largest = max(tile.queries.stop - tile.queries.start for tile in tiles)
    assert largest <= tiled.TILE_QUERIES


def test_every_tile_is_in_one_stack_and_stacks_hold_tiles_of_about_one_size():
    lengths = (300, 250, 200, 120, 85, 60, 3)
    stacks = plan_stacks(lengths, None, 9)
    stacked = [tile for stack in stacks for tile in stack.tiles]
    assert sorted(tile.queries.start for tile in stacked) == [
        tile.queries.start for tile in plan_tiles(lengths, None)
    ]
    assert any(len(stack.tiles) > 1 for stack in stacks)
    for stack in stacks:
        fewest = min(tile.num_keys for tile in stack.tiles)
        assert fewest >= tiled.STACK_SHARE * stack.num_keys
        scores = len(stack.tiles) * 9 * stack.num_queries * stack.num_keys
        assert len(stack.tiles) == 1 or scores * 4 <= tiled.STACK_BYTES


@pytest.mark.parametrize("name", SHAPES)
def test_padded_tiles_of_a_stack_change_nothing(name, small_tiles, monkeypatch):
    monkeypatch.setattr(tiled, "STACK_SHARE", 0.0)  # everything in one stack, much of it padding
    inputs = make_inputs(LENGTHS, torch.float64)
    results = value_and_gradients(varlen_attention, inputs, LENGTHS, **SHAPES[name])
    assert len(plan_stacks(LENGTHS, SHAPES[name].get("sliding_window"), 6)) == 1
    expected = value_and_gradients(plain_attention, inputs, LENGTHS, **SHAPES[name])
    for result, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=0, atol=1e-10)


def test_autocast_does_not_round_the_scores():
    inputs = make_inputs((40, 90), torch.bfloat16)
    plain = varlen_attention(*inputs, (40, 90), scale=SCALE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = varlen_attention(*inputs, (40, 90), scale=SCALE)
    assert torch.equal(under_autocast, plain)


def test_a_window_bounds_the_keys_of_a_tile():
    tiles = plan_tiles((2000,), 64)
    spans = [tile.keys.stop - tile.keys.start for tile in tiles]
    assert max(spans) <= tiled.TILE_QUERIES + 63


def test_the_masks_of_a_window_are_shared():
    """Each was a float32 matrix of its own: 270 MiB a plan here, and as much for its stacks."""
    stacks = plan_stacks((16384,), 4096, 8)
    masks = [tile.mask for stack in stacks for tile in stack.tiles] + [s.mask for s in stacks]
    storages = {mask.untyped_storage().data_ptr(): mask.untyped_storage() for mask in masks}
    assert sum(storage.nbytes() for storage in storages.values()) < 16 << 20


def test_lengths_that_do_not_fit_the_batch_are_refused():
    inputs = make_inputs(LENGTHS, torch.float32)
    with pytest.raises(ValueError, match="lengths adding up to 4"):
        varlen_attention(*inputs, (3, 1), scale=SCALE)


@pytest.mark.parametrize("backend", ["torch_varlen", "padded_sdpa"])
def test_a_backend_without_soft_cap_says_so(backend):
    inputs = make_inputs(LENGTHS, torch.float32)
    with pytest.raises(ValueError, match="no soft cap"):
        varlen_attention(*inputs, LENGTHS, scale=SCALE, softcap=2.0, backend=backend)


def test_every_choice_names_a_backend():
    assert choose_varlen_backend("cpu") == "tiled"
    assert choose_varlen_backend("cpu", has_softcap=True) == "tiled"
    assert choose_varlen_backend("meta") == "padded_sdpa"
    assert choose_varlen_backend("meta", has_softcap=True) == "tiled"
    assert {"tiled", "padded_sdpa"} <= set(VARLEN_BACKENDS)
