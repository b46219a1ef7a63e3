"""Log-likelihoods of short continuations; what the prompts share is computed once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import Cache

from llmtune.scoring.batches import (
    PaddedBatch,
    batch_by_length,
    float32_head,
    inference,
    is_plain_cache,
    model_device,
    pad_rows,
    require_positions,
    run_forward,
    select_rows,
)
from llmtune.scoring.prefix import SharedPrefix, common_prefix, rows_at_once, share_prefix


@dataclass(frozen=True)
class ContinuationRequest:
    """One prompt and the continuations to score after it, all as token ids, none empty."""

    prompt_ids: tuple[int, ...]
    choice_ids: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ContinuationScore:
    """log p(continuation | prompt) in nats, and whether greedy decoding would have written it."""

    log_likelihood: float
    num_tokens: int
    is_greedy: bool


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
    if not requests:
        return []
    assert all(request.prompt_ids and all(request.choice_ids) for request in requests)
    longest_choice = max(len(choice) for request in requests for choice in request.choice_ids)
    require_positions(model, max(len(r.prompt_ids) for r in requests) + longest_choice)
    scores: list[list[ContinuationScore]] = [[] for _ in requests]
    done = 0
    with inference(model), float32_head(model):
        prompts = [request.prompt_ids for request in requests]
        prefix = share_prefix(model, prompts, longest_answer=longest_choice)
        lengths = [len(request.prompt_ids) - prefix.length for request in requests]
        slots = prefix.length + max(lengths)
        max_rows = rows_at_once(model, slots=slots, kept=1, token_budget=token_budget)
        for batch in batch_by_length(lengths, token_budget, max_rows=max_rows):
            chosen = [requests[index] for index in batch]
            results = _score_batch(model, chosen, prefix, token_budget)
            for index, result in zip(batch, results, strict=True):
                scores[index] = result
            done += len(batch)
            if on_progress is not None:
                on_progress(done)
    return scores


def count_forward_tokens(requests: Sequence[ContinuationRequest]) -> int:
    """Return the tokens that `score_continuations` runs where it can share the prompts' prefix."""
    prompts = [request.prompt_ids for request in requests]
    shared = common_prefix(prompts) if len(prompts) > 1 else 0
    choices = sum(len(ids) - 1 for request in requests for ids in request.choice_ids)
    return shared + sum(len(ids) - shared for ids in prompts) + choices


def _score_batch(
    model: nn.Module,
    requests: Sequence[ContinuationRequest],
    prefix: SharedPrefix,
    token_budget: int,
) -> list[list[ContinuationScore]]:
    device = model_device(model)
    suffixes = [request.prompt_ids[prefix.length :] for request in requests]
    batch = pad_rows(suffixes, device, left=True, known=prefix.length)
    several = [
        (row, choice)
        for row, request in enumerate(requests)
        for choice, ids in enumerate(request.choice_ids)
        if len(ids) > 1
    ]
    cache = prefix.for_rows(len(requests), device)
    result = run_forward(model, batch, logits_to_keep=1, cache=cache, keep_cache=bool(several))
    logits = result.logits[:, -1].float()
    log_probs = logits.log_softmax(-1)
    greedy = logits.argmax(-1).tolist()
    first = [
        [(log_probs[row, ids[0]].item(), greedy[row] == ids[0]) for ids in request.choice_ids]
        for row, request in enumerate(requests)
    ]
    rest = _score_rest(model, requests, several, batch, result.cache, token_budget)
    return [
        [
            _join(first[row][choice], rest.get((row, choice), (0.0, True)), len(ids))
            for choice, ids in enumerate(request.choice_ids)
        ]
        for row, request in enumerate(requests)
    ]


def _join(first: tuple[float, bool], rest: tuple[float, bool], length: int) -> ContinuationScore:
    return ContinuationScore(first[0] + rest[0], length, first[1] and rest[1])


def _score_rest(
    model: nn.Module,
    requests: Sequence[ContinuationRequest],
    several: Sequence[tuple[int, int]],
    prompts: PaddedBatch,
    cache: Cache | None,
    token_budget: int,
) -> dict[tuple[int, int], tuple[float, bool]]:
    """Score tokens 2.. of the choices listed in `several` as (request, choice)."""
    scores: dict[tuple[int, int], tuple[float, bool]] = {}
    reuse = is_plain_cache(cache)
    slots = prompts.attention_mask.shape[1]
    longest = max((len(requests[row].choice_ids[choice]) for row, choice in several), default=1)
    num_rows = rows_at_once(
        model, slots=slots + longest, kept=max(1, longest - 1), token_budget=token_budget
    )
    ordered = sorted(several, key=lambda key: -len(requests[key[0]].choice_ids[key[1]]))
    for start in range(0, len(ordered), num_rows):
        keys = ordered[start : start + num_rows]
        choices = [requests[row].choice_ids[choice] for row, choice in keys]
        if reuse:
            logits = _run_after(model, choices, [row for row, _ in keys], prompts, cache)
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
