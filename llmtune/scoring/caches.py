"""Cached keys and values: which can be reused, rows of them, and room for tokens to come."""

import copy
from collections.abc import Sequence

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

ROOM = 16
"""Tokens that a roomy layer can take before its keys and values are copied."""


class RoomyLayer(DynamicLayer):
    """Keys and values in memory with room for more: a step writes its own and copies no others.

    transformers' layer joins all of them to the new ones in every step. Rows can be dropped in
    place. If `keys` and `values` are replaced from outside they are copied at the next step.
    """

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        self.dtype, self.device = layer.keys.dtype, layer.keys.device
        self.keys, self.values = layer.keys, layer.values
        self.is_initialized = True
        self._roomy: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in new keys and values [R, heads, T, width], and return all of them."""
        known, new = self.keys.shape[-2], key_states.shape[-2]
        roomy = self._memory(known + new)
        end = known + new
        for memory, states in zip(roomy, (key_states, value_states), strict=True):
            memory[: len(states), :, known:end] = states
        self._show(len(key_states), end)
        return self.keys, self.values

    def drop_rows(self, kept: Sequence[int]) -> None:
        """Keep these rows, in this order: see `drop_rows`."""
        roomy = self._memory(self.keys.shape[-2])
        for row, source in enumerate(kept):
            if row != source:
                for memory in roomy:
                    memory[row] = memory[source]
        self._show(len(kept), self.keys.shape[-2])

    def _memory(self, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return memory for so many slots that holds the present keys and values."""
        roomy = self._roomy
        if roomy is None or roomy[0].shape[-2] < slots or not self._is_shown(roomy):
            roomy = (_with_room(self.keys, slots), _with_room(self.values, slots))
            self._roomy = roomy
        return roomy

    def _is_shown(self, roomy: tuple[torch.Tensor, torch.Tensor]) -> bool:
        return all(
            shown.data_ptr() == memory.data_ptr() and shown.stride() == memory.stride()
            for shown, memory in zip((self.keys, self.values), roomy, strict=True)
        )

    def _show(self, rows: int, slots: int) -> None:
        assert self._roomy is not None, "shown after it was made"
        self.keys, self.values = (memory[:rows, :, :slots] for memory in self._roomy)


def _with_room(states: torch.Tensor, slots: int) -> torch.Tensor:
    rows, heads, known, width = states.shape
    memory = states.new_empty(rows, heads, slots + ROOM, width)
    memory[:, :, :known] = states
    return memory


PLAIN = (DynamicLayer, DynamicSlidingWindowLayer, RoomyLayer)


def give_room(cache: Cache | None) -> Cache | None:
    """Return a cache of the same keys and values that can grow in place.

    The given one stays as it is, but for layers that have room already: both share those.
    """
    if cache is None or not is_plain_cache(cache):
        return cache
    roomy = copy.copy(cache)
    roomy.layers = [_with_own_state(layer) for layer in cache.layers]
    return roomy


def _with_own_state(layer: CacheLayerMixin) -> CacheLayerMixin:
    if type(layer) is DynamicLayer and layer.is_initialized:
        return RoomyLayer(layer)
    return layer if type(layer) is RoomyLayer else copy.copy(layer)


def can_drop(cache: Cache | None) -> bool:
    """Return whether `drop_rows` may be asked: all layers have room of their own."""
    return cache is not None and all(type(layer) is RoomyLayer for layer in cache.layers)


def drop_rows(cache: Cache, kept: Sequence[int]) -> list[int]:
    """Keep only these rows, given in ascending order, in place; return the order they are in now.

    The last of them take the places of those that are dropped, so only they are copied.
    """
    order = list(range(len(kept)))
    staying = set(kept)
    moving = [row for row in kept if row >= len(kept)]
    for place in order:
        if place not in staying:
            order[place] = moving.pop()
    for layer in cache.layers:
        layer.drop_rows(order)
    return order


def select_rows(cache: Cache, rows: torch.Tensor) -> Cache:
    """Return a cache of the given rows (an index may repeat); the original stays as it was."""
    selected = copy.copy(cache)
    selected.layers = [copy.copy(layer) for layer in cache.layers]
    selected.batch_select_indices(rows)
    return selected


def can_narrow(cache: Cache | None) -> bool:
    """Return whether `select_rows` keeps all of a row's state.

    Recurrent and convolution states have no way to select rows, so their rows stay together.
    """
    return cache is None or is_plain_cache(cache)


def is_plain_cache(cache: Cache | None) -> bool:
    """Return whether every layer caches keys and values only, so that its rows can be reused."""
    if not isinstance(cache, Cache) or not all(type(layer) in PLAIN for layer in cache.layers):
        return False
    # Where a model adds layers of its own kind, their places among these stay empty (MiniMax).
    return len({layer.is_initialized for layer in cache.layers}) == 1


def attention_window(cache: Cache) -> int | None:
    """Return the smallest sliding window in tokens; None if every layer sees everything."""
    windows = [
        layer.sliding_window
        for layer in cache.layers
        if isinstance(layer, DynamicSlidingWindowLayer)
    ]
    return min(windows, default=None)
