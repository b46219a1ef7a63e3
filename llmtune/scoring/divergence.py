"""How far a tuned model's next-token distributions have moved from its base's."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from llmtune.adapters.fused import fused_inference
from llmtune.scoring.batches import (
    adapter_disabled,
    batch_by_length,
    float32_head,
    inference,
    length_switch,
    model_device,
    pad_rows,
    require_positions,
    rows_budget,
    run_forward,
)

CHUNK_POSITIONS = 128
"""Positions whose float32 distributions over the whole vocabulary are held at once."""
CPU_CHUNK_POSITIONS = 32
"""The same on a CPU: what its cache holds."""

Variant = Callable[[], contextlib.AbstractContextManager[object]]
"""Makes a block in which the model is one of its variants: the adapter at half its strength."""

AS_IT_STANDS: Mapping[str, Variant] = {"tuned": contextlib.nullcontext}


@dataclass(frozen=True)
class Divergence:
    """KL(base || tuned) in nats and changed likeliest tokens, summed over each of n sequences.

    Arrays are [n]: `kl_sums` float64, `flips` and `num_tokens` int64.
    """

    kl_sums: np.ndarray
    flips: np.ndarray
    num_tokens: np.ndarray

    @property
    def kl(self) -> float:
        """KL in nats a token."""
        return float(self.kl_sums.sum() / max(1, self.num_tokens.sum()))

    @property
    def top1_flips(self) -> float:
        """The share of positions at which the likeliest next token differs."""
        return float(self.flips.sum() / max(1, self.num_tokens.sum()))


def measure_divergence(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    *,
    token_budget: int,
    variants: Mapping[str, Variant] = AS_IT_STANDS,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, Divergence]:
    """Compare a PeftModel, in each of its variants, with itself without the adapter.

    Every position of `sequences` counts, over the whole vocabulary. The base runs once for all
    variants; no variant's block is open while it runs.

    Args:
        sequences: token ids as the model would read them (BOS included where it has one).
        token_budget: padded tokens in one batch; cut further so that the logits fit in memory.
        variants: by name, what to enter for each; the default is the model as it is.
        on_progress: called with the number of sequences finished so far.

    Raises:
        LlmtuneError: the model has no adapter, or a sequence exceeds the model's positions.
    """
    require_positions(model, max((len(ids) for ids in sequences), default=0))
    lengths = [len(ids) for ids in sequences]
    shape = (len(variants), len(sequences))
    kl_sums, flips = np.zeros(shape), np.zeros(shape, dtype=np.int64)
    done = 0
    with inference(model), fused_inference(model), float32_head(model):
        budget = rows_budget(model, token_budget)
        for indices in batch_by_length(lengths, budget, switch=length_switch(model)):
            batch = pad_rows([sequences[i] for i in indices], model_device(model), left=False)
            with adapter_disabled(model):
                base = run_forward(model, batch).logits
            for place, enter in enumerate(variants.values()):
                with enter():
                    tuned = run_forward(model, batch).logits
                for row, index in enumerate(indices):  # views: all logits are there twice, no more
                    part = row, slice(lengths[index])
                    kl, flipped = compare_distributions(base[part], tuned[part])
                    kl_sums[place, index], flips[place, index] = kl.sum(), flipped.sum()
                del tuned
            done += len(indices)
            if on_progress is not None:
                on_progress(done)
    counts = np.array(lengths, dtype=np.int64)
    return {
        name: Divergence(kl_sums[place], flips[place], counts)
        for place, name in enumerate(variants)
    }


def compare_distributions(
    base_logits: torch.Tensor, tuned_logits: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Return KL(base || tuned) in nats and whether the likeliest token changed, both [P].

    KL at one position is sum_v p_base(v) * (log p_base(v) - log p_tuned(v)), in float32, a few
    positions at a time so that no float32 copy of all logits exists.

    Args:
        base_logits, tuned_logits: [P, V].
    """
    kl, flipped = [], []
    rows = CPU_CHUNK_POSITIONS if base_logits.device.type == "cpu" else CHUNK_POSITIONS
    for base, tuned in zip(base_logits.split(rows), tuned_logits.split(rows), strict=True):
        log_base, log_tuned = base.float().log_softmax(-1), tuned.float().log_softmax(-1)
        terms = nn.functional.kl_div(log_tuned, log_base, reduction="none", log_target=True)
        kl.append(terms.sum(-1))
        flipped.append(log_base.argmax(-1) != log_tuned.argmax(-1))
    return torch.cat(kl).double().cpu().numpy(), torch.cat(flipped).cpu().numpy()
