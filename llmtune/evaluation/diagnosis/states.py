"""Frozen hidden states of whole texts, pooled as they pass, so that no layer's states are kept."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from llmtune.errors import LlmtuneError
from llmtune.scoring.batches import (
    adapter_disabled,
    batch_by_length,
    has_adapter,
    inference,
    model_device,
    pad_rows,
    require_positions,
    rows_budget,
    run_forward,
)
from llmtune.scoring.prefix import (
    NO_PREFIX,
    SharedPrefix,
    common_prefix,
    rows_at_once,
    share_prefix,
)

MIN_START = 8
"""Tokens that all texts must begin with for a pass of their own to pay."""

CLIP = 5.0
"""Standard deviations at which a standardised channel is cut."""


@dataclass(frozen=True)
class TextStates:
    """Of N texts, by the number of layers passed: `mean` and `last` are float32 [N, H].

    `losses` are the summed -log p of every token after the first, in nats, float64 [N]; None if
    they were not asked for.
    """

    mean: dict[int, np.ndarray]
    last: dict[int, np.ndarray]
    losses: np.ndarray | None = None

    def pooled(self, pooling: str, layer: int) -> np.ndarray:
        """Return the features of one pooling (`mean` or `last`) at one layer."""
        return {"mean": self.mean, "last": self.last}[pooling][layer]


@dataclass(frozen=True)
class Standardizer:
    """Centre and scale by the train rows' statistics, float32 [H]."""

    mean: np.ndarray
    scale: np.ndarray

    def apply(self, states: np.ndarray) -> np.ndarray:
        """Return states in standard deviations, cut at 5.

        A few channels of a language model hold values thousands of times the others' (massive
        activations, Sun et al. 2024, arXiv:2402.17762): scaled and cut, none rules the rest.
        Channels that never change become 0.
        """
        return np.asarray(np.clip((states - self.mean) / self.scale, -CLIP, CLIP))


def fit_standardizer(states: np.ndarray) -> Standardizer:
    """Return the statistics of train states [N, H]."""
    deviation = states.std(0)
    return Standardizer(states.mean(0), np.where(deviation > 0, deviation, np.inf))


def quarter_layers(model: nn.Module) -> tuple[int, ...]:
    """Return how many layers are a quarter, half, three quarters and all of the model's."""
    depth = len(decoder_layers(model))
    return tuple(sorted({max(1, round(depth * part / 4)) for part in (1, 2, 3, 4)}))


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the decoder's layers in the order of the forward pass.

    Raises:
        LlmtuneError: the architecture does not show them.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    depth = base.config.get_text_config().num_hidden_layers
    layers = [m for m in base.modules() if isinstance(m, GradientCheckpointingLayer)]
    if len(layers) != depth:
        raise LlmtuneError(
            f"{type(base).__name__} shows {len(layers)} layers where its config says {depth}: its "
            "hidden states cannot be read (no probe, no domain shift)"
        )
    return layers


def read_states(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    layers: Sequence[int],
    *,
    token_budget: int,
    with_losses: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> TextStates:
    """Run the base (an adapter is switched off) over texts once and pool its hidden states.

    The mean leaves out the first token, whose state is the attention sink's and says nothing of
    the text. Without losses what all texts begin with runs once, and nothing above the last layer
    asked for runs. Memory: the pooled states, and one batch.

    Args:
        sequences: token ids, none empty.
        layers: how many layers the states have passed; the final norm is not applied.
        with_losses: also sum the loss; needs the LM head at every position.
        on_progress: called with the number of texts finished so far.

    Raises:
        LlmtuneError: a text exceeds the model's positions, or the layers cannot be found.
    """
    require_positions(model, max((len(ids) for ids in sequences), default=0))
    modules = decoder_layers(model)
    order: list[int] = []
    losses: list[float] = []
    budget = rows_budget(model, token_budget) if with_losses else token_budget
    off = adapter_disabled(model) if has_adapter(model) else contextlib.nullcontext()
    with inference(model), off:
        start = _NOTHING if with_losses else _read_start(model, modules, layers, sequences)
        known = start.prefix.length
        pools = _Pools(start, layers, is_last=not with_losses)
        lengths = [len(ids) - known for ids in sequences]
        max_rows = None
        if known:
            slots = known + max(lengths)
            max_rows = rows_at_once(model, slots=slots, kept=1, token_budget=token_budget)
        for indices in batch_by_length(lengths, budget, max_rows=max_rows):
            rows = [sequences[i][known:] for i in indices]
            device = model_device(model)
            batch = pad_rows(rows, device, left=False, known=known)
            with pools.watching(modules, batch.attention_mask[:, known:]):
                cache = start.prefix.for_rows(len(rows), device)
                keep = 0 if with_losses else 1
                logits = run_forward(model, batch, logits_to_keep=keep, cache=cache).logits
                losses += _sum_losses(logits, rows)
            order += indices
            if on_progress is not None:
                on_progress(len(order))
    back = np.argsort(order)
    return TextStates(
        mean={layer: pools.joined("mean", layer)[back] for layer in layers} if order else {},
        last={layer: pools.joined("last", layer)[back] for layer in layers} if order else {},
        losses=np.array(losses)[back] if with_losses else None,
    )


def count_state_tokens(sequences: Sequence[Sequence[int]]) -> int:
    """Return the tokens that `read_states` runs without losses, the shared beginning once."""
    known = common_prefix([tuple(ids) for ids in sequences]) if len(sequences) > 1 else 0
    known = known if known >= MIN_START else 0
    return known + sum(len(ids) - known for ids in sequences)


@dataclass(frozen=True)
class _Start:
    """What all texts begin with, and the sums of its states after the first token, [H] a layer."""

    prefix: SharedPrefix
    sums: dict[int, torch.Tensor]


_NOTHING = _Start(NO_PREFIX, {})


class _LastLayerReached(Exception):
    """Ends a forward pass whose later layers nobody asked for."""


def _read_start(
    model: nn.Module,
    modules: Sequence[nn.Module],
    layers: Sequence[int],
    sequences: Sequence[Sequence[int]],
) -> _Start:
    """Run the texts' shared beginning once, where it is worth a pass of its own."""
    sums: dict[int, torch.Tensor] = {}

    def watch(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, output: Any) -> None:
            sums[layer] = _hidden(output)[0, 1:].float().sum(0)

        return hook

    handles = [modules[layer - 1].register_forward_hook(watch(layer)) for layer in layers]
    try:
        prompts = [tuple(ids) for ids in sequences]
        prefix = share_prefix(model, prompts, longest_answer=0, min_tokens=MIN_START)
    finally:
        for handle in handles:
            handle.remove()
    return _Start(prefix, sums) if prefix.length else _NOTHING


class _Pools:
    """The pooled states of every batch so far; with `is_last` a pass ends at the deepest layer."""

    def __init__(self, start: _Start, layers: Sequence[int], *, is_last: bool) -> None:
        self._start = start
        self._layers = tuple(layers)
        self._deepest = max(layers) if is_last else None
        self._found: dict[tuple[str, int], list[np.ndarray]] = {}

    def joined(self, pooling: str, layer: int) -> np.ndarray:
        """Return the states of all batches, [N, H], in the order they came."""
        return np.concatenate(self._found[pooling, layer])

    @contextlib.contextmanager
    def watching(self, modules: Sequence[nn.Module], mask: torch.Tensor) -> Iterator[None]:
        """Take in what the layers give while the block runs; `mask` [B, T] is of its own tokens."""
        counted = mask.clone()
        known = self._start.prefix.length
        if not known:
            counted[mask.sum(1) > 1, 0] = 0
        counts = counted.sum(1, keepdim=True) + max(0, known - 1)
        ends = mask.sum(1) - 1

        def pool(layer: int) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: object, output: Any) -> None:
                hidden = _hidden(output)
                total = (hidden * counted.to(hidden.dtype)[:, :, None]).float().sum(1)
                if known:
                    total = total + self._start.sums[layer]
                last = hidden[torch.arange(len(hidden), device=hidden.device), ends].float()
                for pooling, states in (("mean", total / counts), ("last", last)):
                    self._found.setdefault((pooling, layer), []).append(states.cpu().numpy())
                if layer == self._deepest:
                    raise _LastLayerReached

            return hook

        handles = [modules[layer - 1].register_forward_hook(pool(layer)) for layer in self._layers]
        try:
            with contextlib.suppress(_LastLayerReached):
                yield
        finally:
            for handle in handles:
                handle.remove()


def _hidden(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _sum_losses(logits: torch.Tensor, rows: Sequence[Sequence[int]]) -> list[float]:
    sums = []
    for row_logits, ids in zip(logits, rows, strict=True):
        targets = torch.tensor(list(ids[1:]), device=logits.device, dtype=torch.long)
        predicted = row_logits[: len(targets)].float()
        sums.append(nn.functional.cross_entropy(predicted, targets, reduction="sum").item())
    return sums
