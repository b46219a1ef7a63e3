"""One forward pass for every scorer: padding, positions, batches by length, two switches."""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from llmtune.adapters.live import refuse_rewritten_base, switched_off
from llmtune.errors import LlmtuneError
from llmtune.models.decoder import rotary_switch

CPU_TOKEN_BUDGET = 2048
GPU_TOKEN_BUDGET = 16384
LOGITS_BYTES = 256 * 2**20
"""A batch that needs logits at every position is cut so that they take about this many bytes."""

PASS_SHARE = 32
"""A forward pass costs about as much beside its tokens as one part in so many of the budget."""

HEAD_ROWS, CPU_HEAD_ROWS = 8192, 1024
"""Rows of the LM head that are cast to float32 at once; on a CPU what its cache holds."""


@dataclass(frozen=True)
class PaddedBatch:
    """Token ids and attention mask, both [B, T], on the model's device."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    starts_at_once: bool = False
    """Whether every row's first token is at the first place, so that padding is behind the rows."""


@dataclass(frozen=True)
class ForwardResult:
    """Logits [B, kept, V] as the model gave them, and the cache where it was asked for."""

    logits: torch.Tensor
    cache: Cache | None


def choose_token_budget(model: nn.Module) -> int:
    """Return how many padded tokens one batch may hold on the model's device."""
    return CPU_TOKEN_BUDGET if model_device(model).type == "cpu" else GPU_TOKEN_BUDGET


@contextlib.contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Score without dropout and without gradients; every module's training flag is put back."""
    with evaluation_mode(model), torch.no_grad():
        yield


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off; every module's training flag is put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """Make a PeftModel its base; the adapter is back on when the block ends.

    Raises:
        LlmtuneError: `model` has no adapter, or one whose initialization rewrote the base weights
            (PiSSA, OLoRA, CorDA, LoftQ), so that the model without it is not the base.
    """
    if not has_adapter(model):
        raise LlmtuneError(
            "the base arm needs a model with an adapter to switch off; this has none"
        )
    refuse_rewritten_base(model)
    with switched_off(model):
        yield


@contextlib.contextmanager
def float32_head(model: nn.Module) -> Iterator[None]:
    """Let a 16-bit LM head give float32 logits while the block runs.

    bfloat16 logits near 20 are 0.125 apart, so close choices tie (8 % of the items of a sentiment
    suite did) and the first of them wins. The hidden states stay as they are; the weights are cast
    a slice of the vocabulary at a time. Heads that are quantized or carry an adapter are left be.
    """
    head = _base_model(model).get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.dtype == torch.float32:
        yield
        return

    def compute(hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1]).float()
        logits = rows.new_empty(len(rows), head.out_features)
        step = CPU_HEAD_ROWS if rows.device.type == "cpu" else HEAD_ROWS
        for start in range(0, head.out_features, step):
            part = slice(start, start + step)
            logits[:, part] = rows @ head.weight[part].float().T
        if head.bias is not None:
            logits += head.bias.float()
        return logits.view(*hidden.shape[:-1], head.out_features)

    patched = vars(head).get("forward")
    head.forward = compute
    try:
        yield
    finally:
        if patched is None:
            del head.forward
        else:
            head.forward = patched


def has_adapter(model: nn.Module) -> bool:
    """Return whether `model` is a PeftModel."""
    return hasattr(model, "disable_adapter") and hasattr(model, "peft_config")


def model_device(model: nn.Module) -> torch.device:
    """Return the device that token ids must be on."""
    return next(model.parameters()).device


def length_switch(model: nn.Module) -> int | None:
    """Return the tokens beyond which a row changes how those beside it are computed, or None."""
    return rotary_switch(text_config(model))


def batch_by_length(
    lengths: Sequence[int],
    token_budget: int,
    *,
    max_rows: int | None = None,
    switch: int | None = None,
) -> list[list[int]]:
    """Group indices into batches, longest first, with rows x longest <= `token_budget`.

    Of all such groups of neighbors in length the ones with the least padding, each pass counted as
    `PASS_SHARE` says: still more and smaller batches are not worth it.

    A single row longer than the budget is a batch of its own. `max_rows` bounds what grows with
    the rows, whatever their length: the logits of the last positions, a shared prefix's cache.
    Rows of more tokens than `switch` and others are kept apart (see `length_switch`).
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    costs, rows_of_last = [0], [0]
    for end in range(1, len(order) + 1):
        candidates = []
        for rows in range(1, min(end, max_rows or end) + 1):
            tokens = rows * lengths[order[end - rows]]
            if rows > 1 and tokens > token_budget:
                break
            if (
                switch is not None
                and lengths[order[end - 1]] <= switch < lengths[order[end - rows]]
            ):
                break
            candidates.append((costs[end - rows] + tokens + token_budget // PASS_SHARE, rows))
        cost, rows = min(candidates)
        costs.append(cost)
        rows_of_last.append(rows)
    batches: list[list[int]] = []
    end = len(order)
    while end:
        start = end - rows_of_last[end]
        batches.append(order[start:end])
        end = start
    return batches[::-1]


def pad_rows(
    rows: Sequence[Sequence[int]], device: torch.device, *, left: bool, known: int = 0
) -> PaddedBatch:
    """Stack rows of ids into [B, T]; the mask also covers `known` cached tokens before them."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), known + width, dtype=torch.long)
    mask[:, :known] = 1
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, place] = torch.tensor(row, dtype=torch.long)
        mask[index, known:][place] = 1
    return PaddedBatch(ids.to(device), mask.to(device), starts_at_once=not left and not known)


def run_forward(
    model: nn.Module,
    batch: PaddedBatch,
    *,
    logits_to_keep: int = 0,
    cache: Cache | None = None,
    keep_cache: bool = False,
) -> ForwardResult:
    """Run the model on a padded batch, after the tokens in `cache` where one is given.

    Args:
        logits_to_keep: logits of the last so many positions; 0 means all.
        cache: past keys and values; `batch.attention_mask` covers them too. It grows in place.

    Returns:
        Logits [B, kept, V]. Positions count the tokens that are not padding.

    Raises:
        LlmtuneError: the model computes NaN.
    """
    accepted = inspect.signature(_base_model(model).forward).parameters
    arguments = {"input_ids": batch.input_ids, "use_cache": keep_cache or cache is not None}
    if cache is not None:
        arguments["past_key_values"] = cache
    # No token sees the padding behind it, and causal attention without a mask is half the work.
    if not (batch.starts_at_once and cache is None and not keep_cache and _is_causal(model)):
        arguments["attention_mask"] = batch.attention_mask
        if "position_ids" in accepted:
            positions = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
            arguments["position_ids"] = positions[:, -batch.input_ids.shape[1] :]
    if "logits_to_keep" in accepted:
        arguments["logits_to_keep"] = logits_to_keep
    with _whole_head_input(model):
        outputs = model(**arguments)
    assert outputs.logits is not None, "the model was patched to return no logits"
    kept = outputs.logits[:, -logits_to_keep:] if logits_to_keep else outputs.logits
    # The last position sees all before it, so a NaN anywhere in a row shows there.
    if kept[:, -1].isnan().any():
        raise LlmtuneError(
            "the model computes NaN, so it cannot be scored; an adapter whose training diverged "
            "does this (lower train.learning_rate and train again), and so does a 16-bit overflow "
            "(try model.dtype=float32)"
        )
    # State-space models return their state under a different name: it is not reused.
    return ForwardResult(kept, outputs.get("past_key_values") if keep_cache else None)


def _is_causal(model: nn.Module) -> bool:
    """Whether the model masks later tokens without being asked: all layers say so, and use sdpa.

    Recurrent layers are left out: the mask keeps padding out of their state.
    """
    base = _base_model(model)
    config = text_config(model)
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    says = [module.is_causal for module in base.modules() if hasattr(module, "is_causal")]
    return (
        getattr(config, "_attn_implementation", None) == "sdpa"
        and len(says) == config.num_hidden_layers
        and all(says)
        and all(str(kind).endswith("attention") for kind in kinds)
    )


@contextlib.contextmanager
def _whole_head_input(model: nn.Module) -> Iterator[None]:
    """Copy the LM head's input where it is a slice of the hidden states.

    A linear layer runs [B, 1, H] that is a slice as B matrix products, and on a CPU the 16-bit
    kernel first writes the head's weights out B times: 54 MiB a row for SmolLM2-135M.
    """
    head = _base_model(model).get_output_embeddings()
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()


def require_positions(model: nn.Module, num_tokens: int) -> None:
    """Refuse a sequence longer than the model has positions.

    Raises:
        LlmtuneError: names the length that was asked for and the model's limit.
    """
    limit = position_limit(model)
    if limit is not None and num_tokens > limit:
        raise LlmtuneError(
            f"a sequence of {num_tokens} tokens was given to a model of {limit} positions: "
            "shorten the prompts, max_new_tokens or max_length"
        )


def position_limit(model: nn.Module) -> int | None:
    """Return the longest sequence that the model has positions for; None if it has no limit."""
    config = _base_model(model).config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def vocabulary_size(model: nn.Module) -> int:
    """Return the number of logits at one position."""
    return int(text_config(model).vocab_size)


def text_config(model: nn.Module) -> Any:
    """Return the config of the language model, whatever is around it."""
    return _base_model(model).config.get_text_config()


def rows_budget(model: nn.Module, token_budget: int) -> int:
    """Return the token budget for batches that need the logits of every position."""
    return min(token_budget, logits_positions(model))


def logits_positions(model: nn.Module) -> int:
    """Return how many positions' float32 logits may be held at once; at least 1."""
    return max(1, LOGITS_BYTES // (vocabulary_size(model) * 4))


def _base_model(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
