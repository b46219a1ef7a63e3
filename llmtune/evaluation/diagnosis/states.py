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

CLIP = 5.0
"""Standard deviations at which a standardised channel is cut."""


@dataclass(frozen=True)
class TextStates:
    """Of N texts, by the number of layers passed: `mean` and `last` are float32 [N, H].

    `losses` are the summed -log p of every token after the first, in nats, float64 [N]; None where
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
        return np.clip((states - self.mean) / self.scale, -CLIP, CLIP)


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
    the text. Memory: the pooled states, and one batch.

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
    pools: dict[tuple[str, int], list[np.ndarray]] = {
        (pooling, layer): [] for pooling in ("mean", "last") for layer in layers
    }
    order: list[int] = []
    losses: list[float] = []
    budget = rows_budget(model, token_budget) if with_losses else token_budget
    off = adapter_disabled(model) if has_adapter(model) else contextlib.nullcontext()
    with inference(model), off:
        for indices in batch_by_length([len(ids) for ids in sequences], budget):
            rows = [sequences[i] for i in indices]
            batch = pad_rows(rows, model_device(model), left=False)
            with _pooling(modules, layers, batch.attention_mask, pools):
                logits = run_forward(model, batch, logits_to_keep=0 if with_losses else 1).logits
            if with_losses:
                losses += _sum_losses(logits, rows)
            order += indices
            if on_progress is not None:
                on_progress(len(order))
    back = np.argsort(order)
    joined = {key: np.concatenate(parts)[back] for key, parts in pools.items()} if order else {}
    return TextStates(
        mean={layer: joined["mean", layer] for layer in layers},
        last={layer: joined["last", layer] for layer in layers},
        losses=np.array(losses)[back] if with_losses else None,
    )


@contextlib.contextmanager
def _pooling(
    modules: Sequence[nn.Module],
    layers: Sequence[int],
    mask: torch.Tensor,
    pools: dict[tuple[str, int], list[np.ndarray]],
) -> Iterator[None]:
    """Append to `pools` what the chosen layers give while the block runs; `mask` is [B, T]."""
    counted = mask.clone()
    counted[mask.sum(1) > 1, 0] = 0
    ends = mask.sum(1) - 1

    def pool(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            weights = counted.to(hidden.dtype)[:, :, None]
            mean = (hidden * weights).float().sum(1) / counted.sum(1, keepdim=True)
            last = hidden[torch.arange(len(hidden), device=hidden.device), ends].float()
            pools["mean", layer].append(mean.cpu().numpy())
            pools["last", layer].append(last.cpu().numpy())

        return hook

    handles = [modules[layer - 1].register_forward_hook(pool(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sum_losses(logits: torch.Tensor, rows: Sequence[Sequence[int]]) -> list[float]:
    sums = []
    for row_logits, ids in zip(logits, rows, strict=True):
        targets = torch.tensor(list(ids[1:]), device=logits.device, dtype=torch.long)
        predicted = row_logits[: len(targets)].float()
        sums.append(nn.functional.cross_entropy(predicted, targets, reduction="sum").item())
    return sums
