"""Greedy and sampled text, in batches or as a stream, with no setting but the ones given."""

from collections.abc import Callable, Container, Generator, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from llmtune.adapters.fused import fused_inference
from llmtune.data.pieces import HALF_CHARACTER
from llmtune.scoring.batches import (
    batch_by_length,
    evaluation_mode,
    length_switch,
    position_limit,
    require_positions,
)
from llmtune.scoring.prefix import NO_PREFIX, rows_at_once, share_prefix
from llmtune.scoring.writing import OpenRows, can_join, join_rows, open_rows, write_rows


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

    def __init__(self, rooms: list[int], stop_token_ids: Sequence[int]) -> None:
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
class TokenShare:
    """A chosen token, with the log-probabilities that the model gave to it and to the likeliest.

    They are of the model itself, before `temperature` and `top_p`.
    """

    token_id: int
    log_probability: float
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """The next text of a stream, never half a character; the last one says how it ended."""

    text: str
    num_tokens: int
    """Tokens written so far, without the stop token."""
    is_last: bool = False
    stopped: bool = False
    """Whether the model ended the text by itself; known of the last piece."""
    place: int = 0
    """Which of several answers to the prompt it is a piece of."""
    token_ids: tuple[int, ...] = ()
    """All tokens of the text so far, without the stop token."""
    shares: tuple[TokenShare, ...] = ()
    """If they are asked for: of the tokens since the last piece."""


def stream_pieces(  # noqa: PLR0913 (what a text is, and how it is read while it is written)
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    prompt: Sequence[int],
    decoding: Decoding,
    *,
    places: Sequence[int] = (0,),
    num_likeliest: int | None = None,
    is_ended: Callable[[int], bool] = lambda _: False,
) -> Iterator[Piece]:
    """Yield a prompt's continuation as it is written: what `generate_texts` would return.

    Args:
        places: the answers that are written at once, 0, 1, ...; each draws with a seed of its own.
        num_likeliest: how many likeliest tokens come with each chosen one; None: no shares.
        is_ended: asked after each piece of a place whether its reader has enough of it.

    Raises:
        LlmtuneError: the prompt leaves the model no position for an answer.
    """
    texts = Texts(
        find_rooms(model, [prompt] * (max(places) + 1), decoding), decoding.stop_token_ids
    )
    shown = dict.fromkeys(places, "")
    waiting: dict[int, list[TokenShare]] = {place: [] for place in places}

    def watch(rows: Sequence[int], logits: torch.Tensor, tokens: Sequence[int]) -> None:
        for place, share in zip(rows, _shares(logits, tokens, num_likeliest or 0), strict=True):
            waiting[place].append(share)

    with evaluation_mode(model), fused_inference(model):
        with torch.no_grad():
            rows = open_rows(model, [prompt] * len(places), places, NO_PREFIX)
        watched = None if num_likeliest is None else watch
        for place, token in write_rows(model, rows, decoding, texts.rooms, watch=watched):
            is_last = texts.add(place, token)
            so_far = texts.of(place, tokenizer)
            text, ids = so_far.text[len(shown[place]) :], so_far.token_ids
            if not is_last and (not text or so_far.text.endswith(HALF_CHARACTER)):
                continue
            shown[place] = so_far.text
            # a stop token is not part of the text
            shares = waiting.pop(place)[: None if not so_far.stopped else -1]
            waiting[place] = []
            yield Piece(text, len(ids), is_last, so_far.stopped, place, ids, tuple(shares))
            if is_ended(place):
                texts.rooms[place] = 0


def _shares(logits: torch.Tensor, tokens: Sequence[int], num_likeliest: int) -> list[TokenShare]:
    """Return the shares of one step's tokens; `logits` is [R, V]."""
    log_probs = logits.log_softmax(-1)
    chosen = log_probs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])
    values, ids = log_probs.topk(min(num_likeliest, log_probs.shape[-1]), dim=-1)
    return [
        TokenShare(token, float(own), tuple(zip(top_ids, top, strict=True)))
        for token, own, top_ids, top in zip(
            tokens, chosen[:, 0].tolist(), ids.tolist(), values.tolist(), strict=True
        )
    ]


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
