"""Rows that are being written: stepped together, left when they end, joined by new ones."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.cache_utils import Cache

from llmtune.scoring.batches import PaddedBatch, model_device, pad_rows, run_forward
from llmtune.scoring.caches import (
    attention_window,
    can_drop,
    can_narrow,
    drop_rows,
    give_room,
    is_plain_cache,
    select_rows,
)
from llmtune.scoring.prefix import SharedPrefix

if TYPE_CHECKING:
    from llmtune.scoring.generate import Decoding


@dataclass(frozen=True)
class OpenRows:
    """Rows whose next token is to be chosen from `logits` [R, V].

    `places` names them; `batch` holds the ids of the last pass [R, T] and the mask of all tokens so
    far; `cache` is None for models that keep none.
    """

    places: tuple[int, ...]
    batch: PaddedBatch
    logits: torch.Tensor
    cache: Cache | None

    @property
    def slots(self) -> int:
        """How many tokens' keys and values each row keeps, padding included."""
        return int(self.batch.attention_mask.shape[1])

    def select(self, rows: Sequence[int]) -> "OpenRows":
        """Return some of the rows; only where `can_narrow` allows it."""
        if len(rows) == len(self.places):
            return self
        index = torch.tensor(rows, device=self.logits.device)
        return OpenRows(
            tuple(self.places[row] for row in rows),
            PaddedBatch(self.batch.input_ids[index], self.batch.attention_mask[index]),
            self.logits[index],
            None if self.cache is None else select_rows(self.cache, index),
        )

    def keep(self, rows: Sequence[int]) -> tuple["OpenRows", Sequence[int]]:
        """Return only these rows, and their order; those that are dropped are gone for good.

        The last rows take the places of the dropped ones if the cache allows it, so that the other
        rows' keys and values are not copied.
        """
        if len(rows) == len(self.places) or not can_drop(self.cache):
            return self.select(rows), rows
        cache = self.cache
        assert cache is not None, "what can be dropped is in a cache"
        order = drop_rows(cache, rows)
        return replace(replace(self, cache=None).select(order), cache=cache), order


def can_join(cache: Cache | None, slots: int) -> bool:
    """Return whether rows of this kind of cache can be one batch of so many tokens, exactly.

    Keys and values can be padded on the left as long as no window has cut any of them off.
    """
    if cache is None or not is_plain_cache(cache):
        return False
    window = attention_window(cache)
    return window is None or slots < window


def join_rows(parts: Sequence[OpenRows]) -> OpenRows:
    """Return all rows as one batch, the shorter ones padded on the left."""
    if len(parts) == 1:
        return parts[0]
    slots = max(part.slots for part in parts)
    width = max(part.batch.input_ids.shape[1] for part in parts)
    caches = [part.cache for part in parts]
    joined = copy.copy(caches[0])
    assert joined is not None, "only rows with a cache are joined"
    joined.layers = [copy.copy(layer) for layer in joined.layers]
    for place, layer in enumerate(joined.layers):
        others = [cache.layers[place] for cache in caches if cache is not None]
        layer.keys = torch.cat([_pad_left(each.keys, slots, dim=-2) for each in others])
        layer.values = torch.cat([_pad_left(each.values, slots, dim=-2) for each in others])
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = slots
    return OpenRows(
        tuple(place for part in parts for place in part.places),
        PaddedBatch(
            torch.cat([_pad_left(part.batch.input_ids, width, dim=-1) for part in parts]),
            torch.cat([_pad_left(part.batch.attention_mask, slots, dim=-1) for part in parts]),
        ),
        torch.cat([part.logits for part in parts]),
        joined,
    )


def open_rows(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    places: Sequence[int],
    prefix: SharedPrefix,
    *,
    keep_cache: bool = True,
) -> OpenRows:
    """Run prompts, after the tokens in `prefix` that they begin with."""
    device = model_device(model)
    rows = [prompt[prefix.length :] for prompt in prompts]
    batch = pad_rows(rows, device, left=True, known=prefix.length)
    cache = prefix.for_rows(len(prompts), device)
    result = run_forward(model, batch, logits_to_keep=1, cache=cache, keep_cache=keep_cache)
    kept = result.cache
    num_given = batch.attention_mask.shape[1]
    if kept is not None and is_plain_cache(kept) and kept.get_seq_length() != num_given:
        kept = None  # the model puts tokens of its own before a text (CPM-Ant)
    return OpenRows(tuple(places), batch, result.logits[:, -1], kept)


@torch.no_grad()
def write_rows(
    model: nn.Module,
    rows: OpenRows,
    decoding: "Decoding",
    rooms: Sequence[int],
    *,
    refill: Callable[[OpenRows | None], OpenRows | None] | None = None,
    watch: Callable[[Sequence[int], torch.Tensor, Sequence[int]], None] | None = None,
) -> Iterator[tuple[int, int]]:
    """Yield (place, token) as they are chosen, stop tokens included.

    A row that ends leaves the batch; in a model with recurrent or convolution states it stays in it
    to the end. Sampling draws from one generator a row, seeded by `decoding.seed` and its place.

    Args:
        rooms: by place, how many tokens may be written; one that is lowered ends its row.
        refill: given the rows that go on (None: none does), returns them with new ones joined.
        watch: called before tokens are yielded: places, their logits [R, V], and the tokens.
    """
    generators: dict[int, torch.Generator] = {}
    written: Counter[int] = Counter()
    left: OpenRows | None = replace(rows, cache=give_room(rows.cache))
    while left is not None:
        for place in left.places:
            if place not in generators:
                generators[place] = _make_generator(decoding.seed, place)
        drawn = [generators[place] for place in left.places]
        logits = left.logits.float()
        tokens = _choose_tokens(logits, decoding, drawn)
        if watch is not None:
            watch(left.places, logits, tokens)
        going = []
        for row, (place, token) in enumerate(zip(left.places, tokens, strict=True)):
            if written[place] >= rooms[place]:
                continue  # ended before, and could not leave
            yield place, token
            ended = token in decoding.stop_token_ids
            written[place] = rooms[place] if ended else written[place] + 1
            if written[place] < rooms[place]:
                going.append(row)
        if going:
            if can_narrow(left.cache):
                left, order = left.keep(going)
                tokens = [tokens[row] for row in order]
            left = _step(model, left, tokens)
        else:
            left = None
        if refill is not None and (left := refill(left)) is not None:
            left = replace(left, cache=give_room(left.cache))


def _step(model: nn.Module, rows: OpenRows, tokens: Sequence[int]) -> OpenRows:
    """Run the chosen tokens."""
    new = torch.tensor(tokens, device=rows.logits.device)[:, None]
    mask = torch.cat([rows.batch.attention_mask, torch.ones_like(new)], dim=1)
    # Without a cache of keys and values the text so far runs again for every token.
    ids = new if rows.cache is not None else torch.cat([rows.batch.input_ids, new], dim=1)
    batch = PaddedBatch(ids, mask)
    result = run_forward(model, batch, logits_to_keep=1, cache=rows.cache, keep_cache=True)
    return replace(rows, batch=batch, logits=result.logits[:, -1], cache=result.cache)


def _pad_left(tensor: torch.Tensor, length: int, *, dim: int) -> torch.Tensor:
    missing = length - tensor.shape[dim]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor.new_zeros(shape), tensor], dim=dim)


def _make_generator(seed: int, place: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + place) % 2**63)


def _choose_tokens(
    logits: torch.Tensor, decoding: "Decoding", generators: Sequence[torch.Generator]
) -> list[int]:
    if decoding.temperature == 0:
        likeliest: list[int] = logits.argmax(-1).tolist()
        return likeliest
    probs = (logits / decoding.temperature).softmax(-1).cpu()
    if decoding.top_p < 1:
        ordered, order = probs.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(before >= decoding.top_p, 0.0)
        probs = torch.zeros_like(probs).scatter(-1, order, ordered)
    return [int(row.multinomial(1, generator=g)) for row, g in zip(probs, generators, strict=True)]
