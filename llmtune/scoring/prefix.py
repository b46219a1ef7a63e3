"""The leading tokens that many prompts share: run once, their keys and values used for all."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import Cache

from llmtune.models.decoder import config_number
from llmtune.scoring.batches import (
    length_switch,
    logits_positions,
    model_device,
    pad_rows,
    run_forward,
    text_config,
)
from llmtune.scoring.caches import attention_window, is_plain_cache, select_rows

logger = logging.getLogger(__name__)

MIN_SHARED_TOKENS = 4
LONG_PREFIX_TOKENS = 64
"""A prefix of this length (demonstrations, a long instruction) is worth a warning if not shared."""

CACHED_PER_BUDGET = 4
"""Cached tokens (shared prefixes included) that a batch may hold for each token of its budget."""

CACHE_BYTES = 2 * 2**30
"""What the cached keys and values of a batch may take."""


@dataclass(frozen=True)
class SharedPrefix:
    """The leading tokens that all prompts share, with their keys and values for one row."""

    length: int
    cache: Cache | None
    logits: torch.Tensor | None = None
    """Of all its positions [length, V], if they were asked for."""

    def for_rows(self, num_rows: int, device: torch.device) -> Cache | None:
        """Return the prefix's cache for a batch; the prefix itself stays one row."""
        if self.cache is None:
            return None
        return select_rows(self.cache, torch.zeros(num_rows, dtype=torch.long, device=device))


NO_PREFIX = SharedPrefix(0, None)


def share_prefix(
    model: nn.Module,
    prompts: Sequence[tuple[int, ...]],
    *,
    longest_answer: int,
    min_tokens: int = MIN_SHARED_TOKENS,
    keep_logits: bool = False,
) -> SharedPrefix:
    """Run what all prompts begin with; nothing is shared where it would not be exact or pay.

    That a long prefix cannot be shared is logged: then it runs again for every item. Models that
    keep other state than keys and values (Mamba and its like) cannot, attention through a sliding
    window cannot where a prompt with its answer is longer than the window, and rotary frequencies
    that switch with the length cannot where the prefix is on the other side than a whole prompt.

    Args:
        longest_answer: tokens that follow a prompt at most.
        min_tokens: a shorter prefix is not worth its own pass.
        keep_logits: also keep the logits of the prefix's positions.
    """
    length = common_prefix(prompts) if prompts else 0
    if len(prompts) < 2 or length < min_tokens:
        return NO_PREFIX
    switch, longest = length_switch(model), max(map(len, prompts)) + longest_answer
    if switch is not None and length <= switch < longest:
        reason = f"its rotary frequencies are different from {switch} tokens on"
        _say_not_shared(length, len(prompts), reason)
        return NO_PREFIX
    shared = pad_rows([prompts[0][:length]], model_device(model), left=True)
    logits_to_keep = 0 if keep_logits else 1
    ran = run_forward(model, shared, logits_to_keep=logits_to_keep, keep_cache=True)
    cache = ran.cache
    if not is_plain_cache(cache):
        _say_not_shared(length, len(prompts), "this model's state cannot be copied between items")
        return NO_PREFIX
    # Padding is between the prefix and the rest, so a window would cut the prefix too early.
    window = attention_window(cache)
    if window is not None and longest > window:
        _say_not_shared(length, len(prompts), f"its attention sees only {window} tokens back")
        return NO_PREFIX
    return SharedPrefix(length, cache, ran.logits[0] if keep_logits else None)


def common_prefix(prompts: Sequence[tuple[int, ...]]) -> int:
    """Return how many tokens all prompts begin with, leaving at least one to each."""
    first, last = min(prompts), max(prompts)
    pairs = zip(first, last, strict=False)
    common = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(last)))
    return min(common, min(map(len, prompts)) - 1)


def count_prompt_tokens(prompts: Sequence[tuple[int, ...]]) -> int:
    """Return the tokens that run for all prompts: what `share_prefix` shares counts once."""
    length = common_prefix(prompts) if len(prompts) > 1 else 0
    shared = length if length >= MIN_SHARED_TOKENS else 0
    return shared + sum(len(ids) - shared for ids in prompts)


def rows_at_once(model: nn.Module, *, slots: int, kept: int, token_budget: int) -> int:
    """Return how many rows may run: `slots` cached tokens and `kept` positions' logits each."""
    by_cache = CACHED_PER_BUDGET * token_budget // slots
    by_bytes = CACHE_BYTES // (slots * _slot_bytes(model))
    by_logits = logits_positions(model) // kept
    return max(1, min(by_cache, by_bytes, by_logits))


def _slot_bytes(model: nn.Module) -> int:
    """Return what one token's keys and values take in all layers, about; at least 1."""
    config = text_config(model)
    heads = config_number(config, "num_attention_heads") or 1
    width = config_number(config, "head_dim") or config.hidden_size // heads
    kept = config_number(config, "num_key_value_heads") or heads
    size = next(model.parameters()).element_size()
    return max(1, int(2 * config.num_hidden_layers * kept * width * size))


def _say_not_shared(length: int, num_prompts: int, reason: str) -> None:
    if length >= LONG_PREFIX_TOKENS:
        logger.warning(
            "the %d tokens that all %d prompts begin with are run again for each: %s",
            length,
            num_prompts,
            reason,
        )
