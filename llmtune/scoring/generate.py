"""Greedy and sampled text, in batches or as a stream, with no setting but the ones given."""

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from llmtune.scoring.batches import (
    PaddedBatch,
    batch_by_length,
    can_narrow,
    evaluation_mode,
    logits_positions,
    model_device,
    pad_rows,
    position_limit,
    require_positions,
    run_forward,
    select_rows,
)
from llmtune.scoring.prefix import (
    LONG_PREFIX_TOKENS,
    NO_PREFIX,
    SharedPrefix,
    rows_at_once,
    share_prefix,
)

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
    """Continue every prompt; rows that stop leave their batch, so nothing waits for the longest.

    Only in a model with recurrent or convolution states they stay in it to the end.

    The model's generation_config is not read. Sampling draws from one generator per prompt, seeded
    by `decoding.seed` and the prompt's place, so texts do not depend on the batches. A text that
    reaches the model's last position ends there, and counts as one that did not stop.

    Args:
        prompts: token ids, none empty.
        token_budget: padded tokens in one batch, new tokens included.
        on_progress: called with the number of prompts finished so far.

    Raises:
        LlmtuneError: a prompt leaves the model no position for an answer.
    """
    found: dict[int, Generation] = {}
    for place, generation, is_batch_end in iter_texts(
        model, tokenizer, prompts, decoding, token_budget=token_budget
    ):
        found[place] = generation
        if is_batch_end and on_progress is not None:
            on_progress(len(found))
    return [found[place] for place in range(len(prompts))]


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

    The last of a batch comes with True. Batches are made of all prompts; one whose places are all
    `done` is left out, so that whoever continues computes what a single call would.

    Raises:
        LlmtuneError: a prompt leaves the model no position for an answer.
    """
    if not prompts:
        return
    longest = max(len(prompt) for prompt in prompts)
    require_positions(model, longest + 1)
    limit = position_limit(model)
    with evaluation_mode(model):
        prefix = _share_long_prefix(model, prompts, decoding)
        lengths = [len(ids) - prefix.length + decoding.max_new_tokens for ids in prompts]
        max_rows = logits_positions(model)
        if prefix.length:
            slots = prefix.length + max(lengths)
            max_rows = rows_at_once(model, slots=slots, kept=1, token_budget=token_budget)
        for batch in batch_by_length(lengths, token_budget, max_rows=max_rows):
            if all(place in done for place in batch):
                continue
            chosen = [prompts[i] for i in batch]
            rooms = [_room(len(ids), decoding.max_new_tokens, limit) for ids in chosen]
            written: list[list[int]] = [[] for _ in batch]
            unfinished = len(batch)
            for row, token in _decode(model, chosen, decoding, batch, prefix, rooms):
                has_stopped = token in decoding.stop_token_ids
                if not has_stopped:
                    written[row].append(token)
                if not has_stopped and len(written[row]) < rooms[row]:
                    continue
                unfinished -= 1
                text = tokenizer.decode(written[row], skip_special_tokens=True)
                generation = Generation(tuple(written[row]), text, has_stopped)
                yield batch[row], generation, not unfinished


def stream_text(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    prompt: Sequence[int],
    decoding: Decoding,
) -> Iterator[str]:
    """Yield a prompt's continuation piece by piece, never half a character.

    Raises:
        LlmtuneError: the prompt leaves the model no position for an answer.
    """
    require_positions(model, len(prompt) + 1)
    room = _room(len(prompt), decoding.max_new_tokens, position_limit(model))
    written: list[int] = []
    shown = ""
    with evaluation_mode(model):
        for _, token in _decode(model, [prompt], decoding, [0], NO_PREFIX, [room]):
            if token in decoding.stop_token_ids:
                break
            written.append(token)
            text = tokenizer.decode(written, skip_special_tokens=True)
            if not text.endswith(UNFINISHED_CHARACTER) and len(text) > len(shown):
                yield text[len(shown) :]
                shown = text
    text = tokenizer.decode(written, skip_special_tokens=True)
    if len(text) > len(shown):
        yield text[len(shown) :]


@torch.no_grad()
def _share_long_prefix(
    model: nn.Module, prompts: Sequence[Sequence[int]], decoding: Decoding
) -> SharedPrefix:
    """Share demonstrations and long instructions; a template's few tokens are not worth it."""
    return share_prefix(
        model,
        [tuple(prompt) for prompt in prompts],
        longest_answer=decoding.max_new_tokens,
        min_tokens=LONG_PREFIX_TOKENS,
    )


@torch.no_grad()
def _decode(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    places: Sequence[int],
    prefix: SharedPrefix,
    rooms: Sequence[int],
) -> Iterator[tuple[int, int]]:
    """Yield (row, token) as they are chosen, stop tokens included; each row has its own room."""
    device = model_device(model)
    generators = [_make_generator(decoding.seed, place) for place in places]
    suffixes = [prompt[prefix.length :] for prompt in prompts]
    batch = pad_rows(suffixes, device, left=True, known=prefix.length)
    rows = list(range(len(prompts)))
    finished: set[int] = set()
    cache = prefix.for_rows(len(prompts), device)
    for step in range(max(rooms)):
        result = run_forward(model, batch, logits_to_keep=1, cache=cache, keep_cache=True)
        cache, logits = result.cache, result.logits[:, -1].float()
        tokens = _choose_tokens(logits, decoding, [generators[row] for row in rows])
        for row, token in zip(rows, tokens, strict=True):
            if row not in finished:
                yield row, token
                if token in decoding.stop_token_ids or step + 1 >= rooms[row]:
                    finished.add(row)
        if len(finished) == len(prompts):
            return
        kept = batch
        going = [i for i, row in enumerate(rows) if row not in finished]
        if len(going) < len(rows) and can_narrow(cache):
            index = torch.tensor(going, device=device)
            kept = PaddedBatch(batch.input_ids[index], batch.attention_mask[index])
            cache = None if cache is None else select_rows(cache, index)
            rows, tokens = [rows[i] for i in going], [tokens[i] for i in going]
        new = torch.tensor(tokens, device=device)[:, None]
        mask = torch.cat([kept.attention_mask, torch.ones_like(new)], dim=1)
        # Without a cache of keys and values the text so far runs again for every token.
        ids = new if cache is not None else torch.cat([kept.input_ids, new], dim=1)
        batch = PaddedBatch(ids, mask)


def _room(prompt_tokens: int, max_new_tokens: int, limit: int | None) -> int:
    """Return how many tokens may follow a prompt."""
    return max_new_tokens if limit is None else min(max_new_tokens, limit - prompt_tokens)


def _make_generator(seed: int, place: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + place) % 2**63)


def _choose_tokens(
    logits: torch.Tensor, decoding: Decoding, generators: Sequence[torch.Generator]
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
