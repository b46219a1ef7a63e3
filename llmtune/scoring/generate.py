"""Greedy and sampled text, in batches or as a stream, with no setting but the ones given."""

from collections.abc import Callable, Container, Generator, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from llmtune.adapters.fused import fused_inference
from llmtune.scoring.batches import (
    batch_by_length,
    evaluation_mode,
    length_switch,
    position_limit,
    require_positions,
)
from llmtune.scoring.prefix import NO_PREFIX, rows_at_once, share_prefix
from llmtune.scoring.writing import OpenRows, can_join, join_rows, open_rows, write_rows

UNFINISHED_CHARACTER = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Decoding:
    """How text is generated: greedy at temperature 0, else sampled from the top `top_p` mass.

    `stop_token_ids` end a text: those of `LiveModel.stop_token_ids`.
    """

    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Generation:
    """What a model wrote: the ids without the stop token, and whether it stopped by itself."""

    token_ids: tuple[int, ...]
    text: str
    stopped: bool


def generate_texts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    token_budget: int,
    on_progress: Callable[[int], None] | None = None,
) -> list[Generation]:
    """Continue every prompt; rows that stop make room for the next, so nothing waits.

    Only in a model with recurrent or convolution states they stay in their batch to its end. What
    all prompts begin with runs once where that is exact.

    The model's generation_config is not read. Sampling draws from one generator per prompt, seeded
    by `decoding.seed` and the prompt's place, so texts do not depend on the batches. A text that
    reaches the model's last position ends there, and counts as one that did not stop.

    Args:
        prompts: token ids, none empty.
        token_budget: padded tokens of prompts that run at once; four times as many may be cached.
        on_progress: called with the number of prompts finished so far.

    Raises:
        LlmtuneError: a prompt leaves the model no position for an answer.
    """
    if not prompts:
        return []
    texts = Texts(find_rooms(model, prompts, decoding), decoding.stop_token_ids)
    done = 0
    with evaluation_mode(model), torch.no_grad(), fused_inference(model):
        waiting = _Waiting(model, prompts, decoding, token_budget)
        rows = waiting.join(None)
        assert rows is not None, "there is at least one prompt"
        for place, token in write_rows(model, rows, decoding, texts.rooms, refill=waiting.join):
            if texts.add(place, token):
                done += 1
                if on_progress is not None:
                    on_progress(done)
    return [texts.of(place, tokenizer) for place in range(len(prompts))]


def iter_texts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    token_budget: int,
    done: Container[int] = (),
) -> Iterator[tuple[int, Generation, bool]]:
    """Yield `generate_texts`' answers one by one as they end: place, answer, and batch end.

    The last of a batch comes with True. Batches are made of all prompts, and no prompt joins one
    later; one whose places are all `done` is left out, so that whoever continues computes what a
    single call would.

    Raises:
        LlmtuneError: a prompt leaves the model no position for an answer.
    """
    if not prompts:
        return
    texts = Texts(find_rooms(model, prompts, decoding), decoding.stop_token_ids)
    with evaluation_mode(model), fused_inference(model):
        with torch.no_grad():
            waiting = _Waiting(model, prompts, decoding, token_budget)
        for batch in waiting.batches:
            if all(place in done for place in batch):
                continue
            with torch.no_grad():
                rows = waiting.open(batch)
            unfinished = len(batch)
            for place, token in write_rows(model, rows, decoding, texts.rooms):
                if texts.add(place, token):
                    unfinished -= 1
                    yield place, texts.of(place, tokenizer), not unfinished


def find_rooms(model: nn.Module, prompts: Sequence[Sequence[int]], decoding: Decoding) -> list[int]:
    """Return how many tokens may follow each prompt.

    Raises:
        LlmtuneError: a prompt leaves the model no position for an answer.
    """
    require_positions(model, max(map(len, prompts), default=0) + 1)
    limit = position_limit(model)
    most = decoding.max_new_tokens
    return [most if limit is None else min(most, limit - len(prompt)) for prompt in prompts]


class Texts:
    """What is written so far, by place; `rooms` says how much may be."""

    def __init__(self, rooms: Sequence[int], stop_token_ids: Sequence[int]) -> None:
        self.rooms = rooms
        self._stops = stop_token_ids
        self._written: dict[int, list[int]] = {}
        self._stopped: set[int] = set()

    def add(self, place: int, token: int) -> bool:
        """Take in one chosen token, and return whether it ends the text."""
        ids = self._written.setdefault(place, [])
        if token in self._stops:
            self._stopped.add(place)
            return True
        ids.append(token)
        return len(ids) == self.rooms[place]

    def of(self, place: int, tokenizer: PreTrainedTokenizerFast) -> Generation:
        """Return the text of a place."""
        ids = self._written.get(place, [])
        text = tokenizer.decode(ids, skip_special_tokens=True)
        return Generation(tuple(ids), text, place in self._stopped)


class _Waiting:
    """Prompts that have not begun: they join the running rows as soon as there is room."""

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding,
        token_budget: int,
    ) -> None:
        self._model, self._prompts, self._budget = model, prompts, token_budget
        self._room = decoding.max_new_tokens
        self._prefix = share_prefix(
            model, [tuple(ids) for ids in prompts], longest_answer=self._room
        )
        lengths = [len(ids) - self._prefix.length for ids in prompts]
        max_rows = self._rows_for(self._prefix.length + max(lengths) + self._room)
        self._switch = length_switch(model)
        switch = None
        if self._switch is not None:
            switch = self._switch - self._room - self._prefix.length
        self.batches = batch_by_length(lengths, token_budget, max_rows=max_rows, switch=switch)

    def open(self, batch: Sequence[int]) -> OpenRows:
        """Run a batch's prompts."""
        return open_rows(self._model, [self._prompts[i] for i in batch], batch, self._prefix)

    def join(self, rows: OpenRows | None) -> OpenRows | None:
        """Return the running rows with as many new batches as there is room for."""
        while self.batches and (rows is None or self._has_room(rows, self.batches[0])):
            new = self.open(self.batches.pop(0))
            rows = new if rows is None else join_rows([rows, new])
        return rows

    def _has_room(self, rows: OpenRows, batch: Sequence[int]) -> bool:
        longest = max(len(self._prompts[place]) for place in batch)
        slots = max(rows.slots, longest) + self._room
        fits = len(rows.places) + len(batch) <= self._rows_for(slots)
        is_alike = self._is_long(rows.places[0]) == self._is_long(batch[0])
        return fits and is_alike and can_join(rows.cache, slots)

    def _is_long(self, place: int) -> bool:
        """Whether a prompt with its answer may pass the switch of rotary frequencies."""
        longest = len(self._prompts[place]) + self._room
        return self._switch is not None and longest > self._switch

    def _rows_for(self, slots: int) -> int:
        return rows_at_once(self._model, slots=slots, kept=1, token_budget=self._budget)


@dataclass(frozen=True)
class Piece:
    """The next text of a stream, never half a character; the last one says how it ended."""

    text: str
    num_tokens: int
    """Tokens written so far, without the stop token."""
    is_last: bool = False
    stopped: bool = False
    """Whether the model ended the text by itself; known of the last piece."""


def stream_pieces(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    prompt: Sequence[int],
    decoding: Decoding,
) -> Iterator[Piece]:
    """Yield a prompt's continuation as it is written: what `generate_texts` would return.

    Raises:
        LlmtuneError: the prompt leaves the model no position for an answer.
    """
    texts = Texts(find_rooms(model, [prompt], decoding), decoding.stop_token_ids)
    shown = ""
    with evaluation_mode(model), fused_inference(model):
        with torch.no_grad():
            rows = open_rows(model, [prompt], [0], NO_PREFIX)
        for place, token in write_rows(model, rows, decoding, texts.rooms):
            if texts.add(place, token):
                break
            so_far = texts.of(place, tokenizer)
            text = so_far.text
            if not text.endswith(UNFINISHED_CHARACTER) and len(text) > len(shown):
                yield Piece(text[len(shown) :], len(so_far.token_ids))
                shown = text
    whole = texts.of(0, tokenizer)
    rest = whole.text[len(shown) :]
    yield Piece(rest, len(whole.token_ids), is_last=True, stopped=whole.stopped)


def stream_text(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    prompt: Sequence[int],
    decoding: Decoding,
) -> Generator[str]:
    """Yield the texts of `stream_pieces`, none empty.

    Raises:
        LlmtuneError: the prompt leaves the model no position for an answer.
    """
    for piece in stream_pieces(model, tokenizer, prompt, decoding):
        if piece.text:
            yield piece.text
