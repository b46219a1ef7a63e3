"""The merge stage: stream the adapter into its base, then compare it with the live adapter."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmtune.checks.merged import VerifyResult, verify_merge
from llmtune.checks.prompts import NUM_NEW_TOKENS, ComparedPrompts, build_prompts
from llmtune.checks.provenance import add_to_provenance
from llmtune.checks.reference import (
    LiveModel,
    at_strength,
    comparison_dtype,
    load_live,
)
from llmtune.data.open_prompts import OPEN_PROMPTS
from llmtune.data.template import require_trained_template
from llmtune.errors import CheckFailed
from llmtune.io.unfinished import move_into_place, require_space, unfinished_dir
from llmtune.merging.changes import MergePlan
from llmtune.merging.merge import MergeResult, needed_bytes, write_merge
from llmtune.models.hardware import choose_device
from llmtune.scoring.generate import Decoding
from llmtune.stages.memory import release_memory
from llmtune.stages.merge_plan import MergeRequest, has_live_model, plan_candidates

log = logging.getLogger("llmtune")


@dataclass(frozen=True)
class _Candidate:
    """One base's merge, written and not yet in its place."""

    plan: MergePlan
    directory: Path
    result: MergeResult


def run_merge_stage(request: MergeRequest) -> dict[str, Any]:
    """Merge, check, and only then let the directory appear; return both results as JSON values.

    With `base: auto` both bases' merges are written and compared with the quantized model and its
    adapter on the held-out rows; the one of the smaller KL stays.

    Raises:
        LlmtuneError: there is nothing to dequantize, or nothing to compare two bases with.
        CheckFailed: the merged model's KL to the live adapter is above `max_kl`.
    """
    require_trained_template(request.source.tokenizer, request.adapter_dir)
    prompts = build_prompts(request.source.tokenizer, request.held_out)
    release_memory()
    plans = plan_candidates(request)
    for notice in plans[0].notices:
        log.info("merge: %s", notice)
    out_dir = request.out_dir.absolute()
    require_space(out_dir, sum(needed_bytes(plan) for plan in plans))
    with unfinished_dir(out_dir) as scratch:
        candidates = [_write(plan, scratch / plan.base, request) for plan in plans]
        kept, live, scores = _choose(request, candidates, prompts)
        # One list of stop tokens for everything that is saved, and a config that can be saved.
        live.loaded.model.generation_config.save_pretrained(kept.directory)
        check = _check(request, live, kept.directory, prompts)
        require_close(check, request.knobs.max_kl, request.out_dir)
        record: dict[str, Any] = {}
        if scores:
            record["candidates"] = {name: score_values(score) for name, score in scores.items()}
        add_to_provenance(
            kept.directory, {**record, "check": None if check is None else score_values(check)}
        )
        move_into_place(kept.directory, out_dir)
    return {
        **kept.result.to_dict(),
        "out_dir": str(request.out_dir),
        **record,
        "check": None if check is None else _check_values(check),
    }


def require_close(check: VerifyResult | None, max_kl: float, out_dir: Path) -> None:
    """Check that a merged model is what its adapter is.

    Raises:
        CheckFailed: it is not.
    """
    if check is not None and not check.kl <= max_kl:
        raise CheckFailed(
            f"merged model and live adapter differ by {check.kl:.4f} nats/token (KL), more than "
            f"merge.max_kl={max_kl:g} (--max-kl); nothing was left in {out_dir}"
        )


def score_values(score: VerifyResult) -> dict[str, Any]:
    """Return the numbers of a comparison, without the texts."""
    return {
        "kl": score.kl,
        "top1_agreement": score.top1_agreement,
        "perplexity": score.merged_perplexity,
        "live_perplexity": score.live_perplexity,
        "max_logit_difference": score.max_logit_difference,
        "num_tokens": score.num_tokens,
        "num_labels": score.num_labels,
        "num_same_labels": score.num_same_labels,
        "dtype": score.dtype,
    }


def _write(plan: MergePlan, directory: Path, request: MergeRequest) -> _Candidate:
    result = write_merge(plan, directory, device=choose_device(request.settings.device))
    log.info(
        "merge into the %s base: %d of %d tensors changed, %.1f s",
        plan.base,
        sum(result.changes.values()),
        result.num_tensors,
        result.seconds,
    )
    return _Candidate(plan, directory, result)


def _choose(
    request: MergeRequest, candidates: Sequence[_Candidate], prompts: ComparedPrompts
) -> tuple[_Candidate, LiveModel, Mapping[str, VerifyResult]]:
    """Return the closer candidate, the live model it is checked by, and both scores if there are.

    The live adapter's base is the one it was merged into: never quantized for the original,
    quantized for the dequantized one.
    """
    kept = candidates[0]
    if len(candidates) == 1:
        return kept, _load_live(request, kept, is_quantized=_is_dequantized(kept)), {}
    live = _load_live(request, kept, is_quantized=True)
    scores = _score(request, live, candidates, replace(prompts, open_prompts=()))
    kept = min(candidates, key=lambda one: scores[one.plan.base].kl)
    if not _is_dequantized(kept):
        del live
        release_memory()
        live = _load_live(request, kept, is_quantized=False)
    return kept, live, scores


def _is_dequantized(candidate: _Candidate) -> bool:
    """Whether the base was quantized and dequantized for this merge; packed bases just are."""
    return candidate.plan.round_trip is not None


def _load_live(request: MergeRequest, candidate: _Candidate, *, is_quantized: bool) -> LiveModel:
    """Load base and adapter, or the base alone at a strength that the live adapter cannot have."""
    return load_live(
        request.model,
        request.source,
        request.adapter_dir if has_live_model(request) else None,
        dtype=comparison_dtype(candidate.directory, device=request.model.device),
        is_quantized=is_quantized,
    )


def _score(
    request: MergeRequest,
    live: LiveModel,
    candidates: Sequence[_Candidate],
    prompts: ComparedPrompts,
) -> dict[str, VerifyResult]:
    """Compare every candidate with the quantized model and its adapter on the held-out rows."""
    decoding = Decoding(NUM_NEW_TOKENS, live.loaded.stop_token_ids)
    scores = {}
    for one in candidates:
        with at_strength(live, request.knobs.strength):
            score = verify_merge(
                live.model, one.directory, prompts, decoding=decoding, dtype=live.loaded.dtype
            )
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
    if not has_live_model(request):
        log.warning(
            "merge: not checked: this adapter also has biases or single token rows, so there is "
            "no live model of strength %g to compare with",
            request.knobs.strength,
        )
        return None
    decoding = Decoding(NUM_NEW_TOKENS, live.loaded.stop_token_ids)
    with at_strength(live, request.knobs.strength):
        check = verify_merge(
            live.model, merged_dir, prompts, decoding=decoding, dtype=live.loaded.dtype
        )
    log.info("merge: %s", check.summary())
    for each in check.label_differences:
        log.info(
            "merge: label of prompt %d differs: it led by %.3f nats (adapter) and %.3f (merged)",
            each.prompt + 1,
            each.live_margin,
            each.merged_margin,
        )
    return check


def _check_values(check: VerifyResult) -> dict[str, Any]:
    return {**check.to_dict(), "open_prompts": list(OPEN_PROMPTS)}
