"""The arithmetic of training memory: what tokens cost, and how many go through at once."""

from dataclasses import dataclass
from typing import Literal

# More tokens at once than this gain nothing: the products are large enough to run at full speed.
# On two CPU cores 1024 are as fast as 4096, for a third of the memory (docs/performance.md).
USEFUL_TOKENS = {"cpu": 1024, "cuda": 16384}
USABLE_SHARE = 0.8
"""Of free memory, what activations may take; the rest is for what is not foreseen."""
WORKSPACE_FACTOR = 1.3
UNLIMITED_TOKENS = 2**62


@dataclass(frozen=True)
class BatchLimits:
    """What one micro-batch may hold: at most `rows` rows (None: any) and `tokens` tokens.

    Padding counts as tokens. A single row longer than `tokens` is a micro-batch of its own.
    """

    rows: int | None
    tokens: int


UNLIMITED = BatchLimits(None, UNLIMITED_TOKENS)


@dataclass(frozen=True)
class ActivationCost:
    """Bytes that a token holds from its forward to its backward pass."""

    layers: int
    layer_bytes: float
    """One layer that keeps its activations, per token."""
    recomputed_layer_bytes: float
    """One layer that recomputes them, per token."""
    other_bytes: float
    """Everything outside the layers, per token."""

    def bytes_a_token(self, recomputed: int) -> float:
        """Return the bytes a token holds with `recomputed` layers recomputed, workspace included.

        While a recomputed layer runs backward its own activations exist once.
        """
        kept = self.layers - recomputed + min(recomputed, 1)
        layers = kept * self.layer_bytes + recomputed * self.recomputed_layer_bytes
        return WORKSPACE_FACTOR * (layers + self.other_bytes)


@dataclass(frozen=True)
class RowSizes:
    """The lengths that matter: of the longest row, and of the largest optimizer step (tokens)."""

    longest: int
    step: int


@dataclass(frozen=True)
class MemoryPlan:
    """How much goes through the model at once, and how many layers are recomputed."""

    limits: BatchLimits
    recomputed_layers: int
    needed_bytes: float


def plan_memory(
    cost: ActivationCost,
    available: float,
    sizes: RowSizes,
    *,
    useful_tokens: int,
    micro_batch_size: Literal["auto"] | int,
    checkpointing: Literal["auto"] | bool,
) -> MemoryPlan:
    """Choose the tokens of a micro-batch and the number of recomputed layers.

    Args:
        cost: what a token costs.
        available: bytes that activations may take.
        sizes: how long the rows are.
        useful_tokens: more at once than this gains nothing (see `USEFUL_TOKENS`).
        micro_batch_size: rows at once, or "auto".
        checkpointing: recompute all layers, none, or ("auto") as few as fit.

    Returns:
        The plan; what does not fit even with every layer recomputed is found by the dry run.
    """
    if micro_batch_size == "auto":
        wanted = max(sizes.longest, min(useful_tokens, sizes.step))
        # Rather smaller micro-batches than recomputation, down to a quarter of the useful size.
        tolerable = max(sizes.longest, min(wanted, useful_tokens // 4))
    else:
        wanted = tolerable = micro_batch_size * sizes.longest
    recomputed = cost.layers if checkpointing else 0
    if checkpointing == "auto":
        fitting = (
            count
            for count in range(cost.layers)
            if cost.bytes_a_token(count) * tolerable <= available
        )
        recomputed = next(fitting, cost.layers)
    per_token = cost.bytes_a_token(recomputed)
    if micro_batch_size != "auto":
        limits = BatchLimits(micro_batch_size, UNLIMITED_TOKENS)
        return MemoryPlan(limits, recomputed, per_token * wanted)
    tokens = max(sizes.longest, min(wanted, int(available / per_token)))
    return MemoryPlan(BatchLimits(None, tokens), recomputed, per_token * tokens)


def shrink_plan(
    plan: MemoryPlan, cost: ActivationCost, longest: int, checkpointing: Literal["auto"] | bool
) -> MemoryPlan | None:
    """Return the next smaller plan after one did not fit, or None if there is none.

    Half the tokens, down to the longest row; then, if it is left to us, every layer recomputed.
    """
    tokens, recomputed = plan.limits.tokens, plan.recomputed_layers
    if plan.limits.rows is None and tokens > longest:
        tokens = max(longest, tokens // 2)
    elif checkpointing == "auto" and recomputed < cost.layers:
        recomputed = cost.layers
    else:
        return None
    planned_tokens = plan.needed_bytes / cost.bytes_a_token(plan.recomputed_layers)
    needed = cost.bytes_a_token(recomputed) * min(tokens, planned_tokens)
    return MemoryPlan(BatchLimits(plan.limits.rows, tokens), recomputed, needed)
