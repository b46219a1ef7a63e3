"""Log-likelihoods of short continuations; what the prompts share is computed once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast
from transformers.cache_utils import Cache

from llmtune.adapters.fused import fused_inference
from llmtune.scoring.batches import (
    PaddedBatch,
    batch_by_length,
    float32_head,
    inference,
    length_switch,
    model_device,
    pad_rows,
    require_positions,
    run_forward,
)
from llmtune.scoring.caches import is_plain_cache, select_rows
from llmtune.scoring.generate import Decoding, Generation, Texts, find_rooms, generate_texts
from llmtune.scoring.prefix import SharedPrefix, count_prompt_tokens, rows_at_once, share_prefix
from llmtune.scoring.requests import ContinuationRequest, ContinuationScore
from llmtune.scoring.writing import OpenRows, can_join, join_rows, open_rows, write_rows


@dataclass(frozen=True)
class Writing:
    """What is written beside the scores: where `is_wanted` says so, and how."""

    tokenizer: PreTrainedTokenizerFast
    decoding: Decoding
    is_wanted: Callable[[Sequence[ContinuationScore]], bool]


def score_continuations(
    model: nn.Module,
    requests: Sequence[ContinuationRequest],
    *,
    token_budget: int,
    on_progress: Callable[[int], None] | None = None,
) -> list[list[ContinuationScore]]:
    """Score every continuation of every request; results do not depend on the batches.

    The tokens that all prompts share run once, then each prompt once, whatever the number of its
    choices. The prompt's last logits give the first token of every choice; choices of several
    tokens run after the prompt's cached keys and values.

    Args:
        token_budget: padded tokens (prompts after the shared part) in one batch.
        on_progress: called with the number of requests scored so far.

    Raises:
        LlmtuneError: a prompt with its choice has more tokens than the model has positions.
    """
    return _Scoring(model, requests, token_budget, None).run(on_progress)


def score_and_write(
    model: nn.Module,
    requests: Sequence[ContinuationRequest],
    writing: Writing,
    *,
    token_budget: int,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[list[list[ContinuationScore]], list[Generation | None]]:
    """Score as `score_continuations` does, and write texts after the same prompts.

    A prompt runs once for both: its keys and values wait until there are enough rows for a batch.

    Returns:
        The scores, and what `generate_texts` would write; None if no text is wanted.
    """
    scoring = _Scoring(model, requests, token_budget, writing)
    scores = scoring.run(on_progress)
    return scores, scoring.texts()


def count_forward_tokens(requests: Sequence[ContinuationRequest]) -> int:
    """Return the tokens that `score_continuations` runs where it can share the prompts' prefix."""
    prompts = [request.prompt_ids for request in requests]
    choices = sum(len(ids) - 1 for request in requests for ids in request.choice_ids)
    return count_prompt_tokens(prompts) + choices


class _Scoring:
    """One pass over the prompts of all requests."""

    def __init__(
        self,
        model: nn.Module,
        requests: Sequence[ContinuationRequest],
        token_budget: int,
        writing: Writing | None,
    ) -> None:
        self._model, self._requests, self._budget = model, requests, token_budget
        self._writing = writing
        self._waiting: list[OpenRows] = []
        self._apart: list[int] = []
        self._prompts = [request.prompt_ids for request in requests]
        self._rooms: list[int] = []
        self._wanted: set[int] = set()
        if writing is not None:
            self._rooms = find_rooms(model, self._prompts, writing.decoding)
            self._texts = Texts(self._rooms, writing.decoding.stop_token_ids)

    def run(self, on_progress: Callable[[int], None] | None) -> list[list[ContinuationScore]]:
        requests, model, budget = self._requests, self._model, self._budget
        if not requests:
            return []
        assert all(request.prompt_ids and all(request.choice_ids) for request in requests)
        longest_choice = max(len(choice) for request in requests for choice in request.choice_ids)
        require_positions(model, max(map(len, self._prompts)) + longest_choice)
        scores: list[list[ContinuationScore]] = [[] for _ in requests]
        done = 0
        with inference(model), fused_inference(model):
            longest = max(longest_choice, *self._rooms, 0)
            prefix = share_prefix(model, self._prompts, longest_answer=longest)
            lengths = [len(ids) - prefix.length for ids in self._prompts]
            slots = prefix.length + max(lengths)
            max_rows = rows_at_once(model, slots=slots, kept=1, token_budget=budget)
            switch = length_switch(model)
            switch = None if switch is None else switch - prefix.length
            for batch in batch_by_length(lengths, budget, max_rows=max_rows, switch=switch):
                with float32_head(model):
                    rows, results = self._score_batch(batch, prefix)
                self._keep(rows, results)
                for index, result in zip(batch, results, strict=True):
                    scores[index] = result
                done += len(batch)
                if on_progress is not None:
                    on_progress(done)
            self._write()
        return scores

    def texts(self) -> list[Generation | None]:
        writing = self._writing
        assert writing is not None, "nothing is written"
        places = range(len(self._requests))
        texts = [
            self._texts.of(place, writing.tokenizer) if place in self._wanted else None
            for place in places
        ]
        written = generate_texts(
            self._model,
            writing.tokenizer,
            [self._prompts[place] for place in self._apart],
            writing.decoding,
            token_budget=self._budget,
        )
        for place, text in zip(self._apart, written, strict=True):
            texts[place] = text
        return texts

    def _score_batch(
        self, batch: Sequence[int], prefix: SharedPrefix
    ) -> tuple[OpenRows, list[list[ContinuationScore]]]:
        requests = [self._requests[index] for index in batch]
        is_cached = self._writing is not None or any(
            len(ids) > 1 for request in requests for ids in request.choice_ids
        )
        rows = open_rows(
            self._model, [self._prompts[i] for i in batch], batch, prefix, keep_cache=is_cached
        )
        logits = rows.logits.float()
        log_probs = logits.log_softmax(-1)
        greedy = logits.argmax(-1).tolist()
        first = [
            [(log_probs[row, ids[0]].item(), greedy[row] == ids[0]) for ids in request.choice_ids]
            for row, request in enumerate(requests)
        ]
        rest = _score_rest(self._model, requests, rows, self._budget)
        scores = [
            [
                _join(first[row][choice], rest.get((row, choice), (0.0, True)), len(ids))
                for choice, ids in enumerate(request.choice_ids)
            ]
            for row, request in enumerate(requests)
        ]
        return rows, scores

    def _keep(self, rows: OpenRows, scores: Sequence[Sequence[ContinuationScore]]) -> None:
        """Let the rows wait of which a text is wanted."""
        if self._writing is None:
            return
        kept = [row for row, each in enumerate(scores) if self._writing.is_wanted(each)]
        places = [rows.places[row] for row in kept]
        if not can_join(rows.cache, rows.slots + max(self._rooms)):
            self._apart += places
        elif kept:
            self._wanted.update(places)
            # Written text comes from the model's own head, as `generate_texts` writes it.
            dtype = next(self._model.parameters()).dtype
            chosen = rows.select(kept)
            self._make_room(chosen)
            self._waiting.append(replace(chosen, logits=chosen.logits.to(dtype)))

    def _make_room(self, rows: OpenRows) -> None:
        """Write what waits if it would be too much together with these rows."""
        together = [*self._waiting, rows]
        slots = max(each.slots for each in together) + max(self._rooms)
        most = rows_at_once(self._model, slots=slots, kept=1, token_budget=self._budget)
        if sum(len(each.places) for each in together) > most:
            self._write()

    def _write(self) -> None:
        if not self._waiting:
            return
        assert self._writing is not None, "rows only wait to be written"
        rows = join_rows(self._waiting)
        self._waiting = []
        for place, token in write_rows(self._model, rows, self._writing.decoding, self._rooms):
            self._texts.add(place, token)


def _join(first: tuple[float, bool], rest: tuple[float, bool], length: int) -> ContinuationScore:
    return ContinuationScore(first[0] + rest[0], length, first[1] and rest[1])


def _score_rest(
    model: nn.Module,
    requests: Sequence[ContinuationRequest],
    rows: OpenRows,
    token_budget: int,
) -> dict[tuple[int, int], tuple[float, bool]]:
    """Score tokens 2.. of the choices that have several, by (request, choice)."""
    scores: dict[tuple[int, int], tuple[float, bool]] = {}
    several = [
        (row, choice)
        for row, request in enumerate(requests)
        for choice, ids in enumerate(request.choice_ids)
        if len(ids) > 1
    ]
    longest = max((len(requests[row].choice_ids[choice]) for row, choice in several), default=1)
    num_rows = rows_at_once(
        model, slots=rows.slots + longest, kept=max(1, longest - 1), token_budget=token_budget
    )
    ordered = sorted(several, key=lambda key: -len(requests[key[0]].choice_ids[key[1]]))
    for start in range(0, len(ordered), num_rows):
        keys = ordered[start : start + num_rows]
        choices = [requests[row].choice_ids[choice] for row, choice in keys]
        if rows.cache is not None and is_plain_cache(rows.cache):
            logits = _run_after(model, choices, [row for row, _ in keys], rows.batch, rows.cache)
        else:
            logits = _run_whole(model, choices, [requests[row].prompt_ids for row, _ in keys])
        for key, ids, row_logits in zip(keys, choices, logits, strict=True):
            targets = torch.tensor(ids[1:], device=row_logits.device)
            row_logits = row_logits[: len(targets)].float()
            picked = row_logits.log_softmax(-1).gather(-1, targets[:, None])
            is_greedy = bool((row_logits.argmax(-1) == targets).all())
            scores[key] = (picked.sum().item(), is_greedy)
    return scores


def _run_after(
    model: nn.Module,
    choices: Sequence[tuple[int, ...]],
    rows: Sequence[int],
    prompts: PaddedBatch,
    cache: Cache,
) -> torch.Tensor:
    """Return logits [R, K-1, V] of each choice but its last token, after its prompt's cache."""
    device = prompts.input_ids.device
    index = torch.tensor(rows, device=device)
    tail = pad_rows([ids[:-1] for ids in choices], device, left=False)
    mask = torch.cat([prompts.attention_mask[index], tail.attention_mask], dim=1)
    batch = PaddedBatch(tail.input_ids, mask)
    return run_forward(model, batch, cache=select_rows(cache, index)).logits


def _run_whole(
    model: nn.Module, choices: Sequence[tuple[int, ...]], prompts: Sequence[tuple[int, ...]]
) -> list[torch.Tensor]:
    """The same logits for models whose cache cannot be reused: prompt and choice as one row."""
    logits = []
    for prompt, ids in zip(prompts, choices, strict=True):
        batch = pad_rows([(*prompt, *ids[:-1])], model_device(model), left=False)
        logits.append(run_forward(model, batch, logits_to_keep=len(ids) - 1).logits[0])
    return logits
