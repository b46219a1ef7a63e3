"""Which bases an adapter is to be merged into, and what that would write."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmtune.adapters.manifest import has_strengths
from llmtune.checks.prompts import HeldOut
from llmtune.errors import LlmtuneError
from llmtune.io.unfinished import free_bytes
from llmtune.merging.changes import MergePlan
from llmtune.merging.config import MergeConfig, MergeSettings
from llmtune.merging.merge import needed_bytes
from llmtune.merging.plan import PlanOptions, plan_merge
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.config import ModelConfig
from llmtune.models.round_trip import QuantizedBase, describe_quantized_base


@dataclass(frozen=True)
class MergeRequest:
    """What is merged into what, and what the result is checked on."""

    model: ModelConfig
    source: Checkpoint
    adapter_dir: Path
    out_dir: Path
    knobs: MergeConfig
    held_out: HeldOut | None = None
    """Without any the open prompts are compared."""
    settings: MergeSettings = field(default_factory=MergeSettings)


def plan_candidates(request: MergeRequest) -> list[MergePlan]:
    """Plan the merge into the base that was asked for, or into both with `base: auto`.

    `auto` for a base that is not quantized is the original alone.

    Raises:
        LlmtuneError: as `plan_merge`; or the base is to be dequantized and is not quantized.
    """
    knobs = request.knobs
    quantized = None
    if knobs.base != "original":
        quantized = describe_quantized_base(request.model, request.source)
    if knobs.base == "dequantized" and quantized is None:
        raise LlmtuneError(
            "merge.base=dequantized: the adapter's base is not quantized (model.quantization is "
            "null), so there is nothing to dequantize; use merge.base=original"
        )
    if knobs.base == "auto" and quantized is not None and not has_live_model(request):
        raise LlmtuneError(
            f"merge.base=auto at strength {knobs.strength:g}: this adapter also has biases or "
            "single token rows, so there is no live model of that strength to compare the two "
            "bases with; choose merge.base=original or dequantized"
        )
    bases: list[QuantizedBase | None] = [quantized] if knobs.base == "dequantized" else [None]
    if knobs.base == "auto" and quantized is not None:
        bases.append(quantized)
    options = plan_options(request.model, request.source, request.settings)
    plans = [
        plan_merge(
            request.source,
            request.adapter_dir,
            strength=knobs.strength,
            options=replace(options, quantized=base),
        )
        for base in bases
    ]
    if len({plan.base for plan in plans}) < len(plans):
        return plans[:1]  # the files hold 4 bits already, so that there is one base only
    return plans


def plan_options(model: ModelConfig, source: Checkpoint, settings: MergeSettings) -> PlanOptions:
    """Return how this base is read; the merged model names it without a path of this machine."""
    return PlanOptions(
        dtype=settings.dtype,
        allow_pickle=model.weights == "any",
        base_name=source.origin if source.revision else Path(source.origin).name,
        base_revision=source.revision,
    )


def describe_plans(plans: Sequence[MergePlan], out_dir: Path) -> dict[str, Any]:
    """Say what the plans would write; nothing is.

    Returns:
        `plans`: one for each base that would be merged, with every changed tensor; `out_dir`,
        `needed_bytes` of all that would lie on the disk at once, and `free_bytes` of it.
    """
    return {
        "out_dir": str(out_dir),
        "needed_bytes": sum(needed_bytes(plan) for plan in plans),
        "free_bytes": free_bytes(out_dir),
        "plans": [plan.to_dict() for plan in plans],
    }


def has_live_model(request: MergeRequest) -> bool:
    """Whether the adapter can be switched on at the strength asked for."""
    return request.knobs.strength == 1 or has_strengths(request.adapter_dir)
