"""One adapter merged into its base, or into the closer of two forms of it, and checked."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from llmtune.adapters.manifest import has_strengths
from llmtune.checks.merge_result import VerifyResult
from llmtune.checks.merged import verify_merge
from llmtune.checks.prompts import NUM_NEW_TOKENS, ComparedPrompts, HeldOut, build_prompts
from llmtune.checks.reference import comparison_dtype, load_comparable
from llmtune.data.template import require_trained_template
from llmtune.errors import LlmtuneError
from llmtune.merging.changes import MergePlan
from llmtune.merging.checked import (
    CheckedMerge,
    Judgment,
    WrittenMerge,
    merge_checked,
)
from llmtune.merging.config import MergeConfig, MergeSettings
from llmtune.merging.plan import PlanOptions, plan_merge
from llmtune.merging.planned import PlannedMerges
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.config import ModelConfig
from llmtune.models.hardware import release_memory
from llmtune.models.live import LiveModel
from llmtune.models.quantization.describe import QuantizedBase, describe_quantized_base
from llmtune.scoring.generate import Decoding
from llmtune.scoring.live import as_arm

log = logging.getLogger("llmtune")


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
    is_untrained: bool = False
    """Its adapter has names and shapes only, to plan with."""

    @property
    def has_live_model(self) -> bool:
        """Whether the adapter can be switched on at the strength asked for."""
        return self.knobs.strength == 1 or has_strengths(self.adapter_dir)


def merge_one(request: MergeRequest) -> CheckedMerge:
    """Merge, check, and only then let the directory appear.

    With `base: auto` both bases' merges are written and compared with the quantized model and its
    adapter on the held-out rows; the one with the smaller KL stays.

    Raises:
        LlmtuneError: there is nothing to dequantize, or nothing to compare two bases with.
        CheckFailed: the merged model's KL to the live adapter is above `max_kl`.
    """
    require_trained_template(request.source.tokenizer, request.adapter_dir)
    prompts = build_prompts(request.source.tokenizer, request.held_out)
    release_memory()
    plans = _plan_candidates(request)
    for notice in plans[0].notices:
        log.info("merge: %s", notice)
    return merge_checked(
        plans,
        request.out_dir,
        lambda written: _judge(request, prompts, written),
        max_kl=request.knobs.max_kl,
        settings=request.settings,
    )


def plan_one(request: MergeRequest) -> PlannedMerges:
    """Plan what `merge_one` would write.

    Raises:
        LlmtuneError: the adapter cannot be merged.
    """
    return PlannedMerges(_plan_candidates(request), request.out_dir)


def plan_options(model: ModelConfig, source: Checkpoint, settings: MergeSettings) -> PlanOptions:
    """Return how this base is read; the merged model names it without a path of this machine."""
    return PlanOptions(
        dtype=settings.dtype,
        allow_pickle=model.weights == "any",
        trust_remote_code=model.trust_remote_code,
        base_name=source.origin if source.revision else Path(source.origin).name,
        base_revision=source.revision,
    )


def _plan_candidates(request: MergeRequest) -> list[MergePlan]:
    """Plan the merge into the base that was asked for, or into both with `base: auto`.

    `auto` for a base that is not quantized is the original alone.
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
    if knobs.base == "auto" and quantized is not None and not request.has_live_model:
        raise LlmtuneError(
            f"merge.base=auto at strength {knobs.strength:g}: this adapter also has biases or "
            "single token rows, so there is no live model of that strength to compare the two "
            "bases with; choose merge.base=original or dequantized"
        )
    bases: list[QuantizedBase | None] = [quantized] if knobs.base == "dequantized" else [None]
    if knobs.base == "auto" and quantized is not None:
        bases.append(quantized)
    options = plan_options(request.model, request.source, request.settings)
    options = replace(options, is_untrained=request.is_untrained)
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


def _judge(
    request: MergeRequest, prompts: ComparedPrompts, written: Sequence[WrittenMerge]
) -> Judgment:
    """Choose the closer merge and compare it with the live adapter on the base it was merged into.

    That base is never quantized for the original, and for the dequantized one it computes exactly
    with the weights that the quantized model has. A quantized model whose layers also round what
    goes in (LLM.int8) is not such a reference: how far it is itself is measured beside.
    """
    kept, scores, live_kl = written[0], {}, None
    is_rounding = not request.model.storage.is_exact
    if len(written) > 1 or (_is_dequantized(kept) and is_rounding and request.has_live_model):
        live = _load_live(request, kept, is_quantized=True, is_dense=not is_rounding)
        scores = _score(request, live, written, replace(prompts, open_prompts=()))
        kept = min(written, key=lambda one: scores[one.plan.base].kl)
        del live
        release_memory()
        if _is_dequantized(kept) and is_rounding:
            live_kl = scores[kept.plan.base].kl
    live = _load_live(request, kept, is_quantized=_is_dequantized(kept), is_dense=True)
    # One list of stop tokens for everything that is saved, and a config that can be saved.
    live.model.generation_config.save_pretrained(kept.directory)
    check = _check(request, live, kept.directory, prompts)
    if check is not None:
        check = replace(check, live_kl=live_kl)
    return Judgment(kept, check, scores if len(written) > 1 else {})


def _is_dequantized(written: WrittenMerge) -> bool:
    """Whether the base was quantized and dequantized for this merge; packed bases just are."""
    return written.plan.round_trip is not None


def _load_live(
    request: MergeRequest, written: WrittenMerge, *, is_quantized: bool, is_dense: bool
) -> LiveModel:
    """Load base and adapter, or the base alone at a strength that the live adapter cannot have."""
    dtype = comparison_dtype(Checkpoint.open(written.directory), device=request.model.device)
    return load_comparable(
        request.model,
        request.source,
        request.adapter_dir if request.has_live_model else None,
        dtype,
        is_quantized=is_quantized,
        is_dense=is_dense,
    )


def _score(
    request: MergeRequest,
    live: LiveModel,
    written: Sequence[WrittenMerge],
    prompts: ComparedPrompts,
) -> dict[str, VerifyResult]:
    """Compare every merge with the quantized model and its adapter on the held-out rows."""
    scores = {}
    for one in written:
        score = _compare(request, live, one.directory, prompts)
        release_memory()
        log.info(
            "merge into the %s base, against the quantized model and its adapter: KL %.2e "
            "nats/token, top-1 agreement %.2f%%, perplexity %.3f (adapter %.3f)",
            one.plan.base,
            score.kl,
            100 * score.top1_agreement,
            score.merged_perplexity,
            score.live_perplexity,
        )
        scores[one.plan.base] = score
    return scores


def _check(
    request: MergeRequest, live: LiveModel, merged_dir: Path, prompts: ComparedPrompts
) -> VerifyResult | None:
    """Compare the live adapter with the merged directory as read from disk.

    At a strength that the live adapter cannot have there is nothing to compare with, and None is
    returned.
    """
    if not request.has_live_model:
        log.warning(
            "merge: not checked: this adapter also has biases or single token rows, so there is "
            "no live model of strength %g to compare with",
            request.knobs.strength,
        )
        return None
    check = _compare(request, live, merged_dir, prompts)
    log.info("merge: %s", check.summary())
    for each in check.label_differences:
        log.info(
            "merge: label of prompt %d differs: it led by %.3f nats (adapter) and %.3f (merged)",
            each.prompt + 1,
            each.live_margin,
            each.merged_margin,
        )
    return check


def _compare(
    request: MergeRequest, live: LiveModel, merged_dir: Path, prompts: ComparedPrompts
) -> VerifyResult:
    decoding = Decoding(NUM_NEW_TOKENS, live.stop_token_ids)
    with as_arm(live, strength=request.knobs.strength):
        return verify_merge(
            live.model,
            merged_dir,
            prompts,
            decoding=decoding,
            dtype=live.dtype,
            trust_remote_code=request.model.trust_remote_code,
        )
