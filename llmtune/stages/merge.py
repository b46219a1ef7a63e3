"""The merge stage: stream the adapter into its base, then compare it with the live adapter."""

import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from peft.helpers import rescale_adapter_scale
from torch import nn
from transformers import PreTrainedTokenizerFast

from llmtune.adapters.saved import load_adapter
from llmtune.data.render import render_question
from llmtune.data.template import require_trained_template
from llmtune.errors import CheckFailed, LlmtuneError
from llmtune.evaluation.requests import build_choice_requests
from llmtune.evaluation.suite import Suite
from llmtune.merging.changes import MergePlan
from llmtune.merging.config import MERGE_BASES, MergeConfig, MergeSettings
from llmtune.merging.merge import (
    MergeResult,
    free_bytes,
    move_into_place,
    needed_bytes,
    remove_leftovers,
    write_merge,
)
from llmtune.merging.plan import PlanOptions, plan_merge
from llmtune.merging.provenance import add_to_provenance
from llmtune.merging.verify import VerifyPrompts, VerifyResult, verify_merge
from llmtune.models.config import Fp4Quantization, ModelConfig, Nf4Quantization
from llmtune.models.hardware import choose_device
from llmtune.models.load import LoadedModel, load_model
from llmtune.models.resolve import BaseSource
from llmtune.models.round_trip import QuantizedBase, describe_quantized_base
from llmtune.models.tokenizer import load_tokenizer
from llmtune.open_prompts import OPEN_PROMPTS
from llmtune.safetensors_io import ADAPTER_FILE, CheckpointIndex, read_header
from llmtune.scoring.generate import Decoding
from llmtune.scoring.likelihood import ContinuationRequest
from llmtune.stages.memory import release_memory

log = logging.getLogger("llmtune")

NUM_CHECKED = 20
CHECKED_NEW_TOKENS = 32
FLOAT32_BYTES = 4
MEMORY_SHARE = 0.5
"""Of the free memory, what two float32 copies of the model may take for an exact check."""


@dataclass(frozen=True)
class MergeRequest:
    """What is merged into what, and what the result is checked on."""

    model: ModelConfig
    source: BaseSource
    adapter_dir: Path
    out_dir: Path
    knobs: MergeConfig
    sequences: Sequence[Sequence[int]] = ()
    """Held-out rows as token ids; without any the open prompts are compared."""
    suites: Sequence[Suite] = ()
    """The first target suite of choices among these gives the labels to compare."""
    settings: MergeSettings = field(default_factory=MergeSettings)


@dataclass(frozen=True)
class _Candidate:
    """One base's merge, written and not yet in its place."""

    plan: MergePlan
    directory: Path
    result: MergeResult


@dataclass(frozen=True)
class _Live:
    """The adapter on its base, as it is compared with a merged model."""

    model: nn.Module
    loaded: LoadedModel
    is_quantized: bool


def run_merge_stage(request: MergeRequest) -> dict[str, Any]:
    """Merge, check, and only then let the directory appear; return both results as JSON values.

    With `base: auto` both bases' merges are written and compared with the quantized model and its
    adapter on the held-out rows; the one of the smaller KL stays.

    Raises:
        LlmtuneError: there is nothing to dequantize, or nothing to compare two bases with.
        CheckFailed: the merged model's KL to the live adapter is above `max_kl`.
    """
    tokenizer = load_tokenizer(request.source.dir, chat_template=request.model.chat_template)
    require_trained_template(tokenizer, request.adapter_dir)
    release_memory()
    plans = plan_candidates(request)
    for notice in plans[0].notices:
        log.info("merge: %s", notice)
    out_dir = request.out_dir.absolute()
    remove_leftovers(out_dir)
    _remove_unchecked(out_dir)
    candidates = []
    scores: dict[str, VerifyResult] = {}
    live = None
    try:
        for plan in plans:
            candidates.append(_write(plan, request))
        kept = candidates[0]
        if len(candidates) > 1:
            live = _load_live(request, kept, is_quantized=True)
            scores = _score(request, live, candidates)
            kept = min(candidates, key=lambda one: scores[one.plan.base].kl)
        if live is None or not _is_reference(live, kept.plan):
            live = None
            release_memory()
            live = _load_live(request, kept, is_quantized=kept.plan.round_trip is not None)
        # One list of stop tokens for everything that is saved, and a config that can be saved.
        live.loaded.model.generation_config.save_pretrained(kept.directory)
        check = _check(request, live, kept.directory)
        if check is not None and not check.kl <= request.knobs.max_kl:
            raise CheckFailed(
                f"merged model and live adapter differ by {check.kl:.4f} nats/token (KL), more "
                f"than merge.max_kl={request.knobs.max_kl:g}; nothing was left in {request.out_dir}"
            )
        record = {"candidates": {name: _score_values(score) for name, score in scores.items()}}
        add_to_provenance(kept.directory, record if scores else {})
        move_into_place(kept.directory, request.out_dir)
    finally:
        _remove_unchecked(out_dir)
    return {
        **kept.result.to_dict(),
        "out_dir": str(request.out_dir),
        **(record if scores else {}),
        "check": None if check is None else _check_values(check),
    }


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
    if knobs.base == "auto" and quantized is not None and not _has_live_model(request):
        raise LlmtuneError(
            f"merge.base=auto at strength {knobs.strength:g}: only plain LoRA has a live model to "
            "compare the two bases with, and this adapter also has magnitudes, biases or whole "
            "tensors; choose merge.base=original or dequantized"
        )
    bases: list[QuantizedBase | None] = [quantized] if knobs.base == "dequantized" else [None]
    if knobs.base == "auto" and quantized is not None:
        bases.append(quantized)
    source = request.source
    name = source.origin if source.revision else Path(source.origin).name
    options = PlanOptions(
        dtype=request.settings.dtype,
        allow_pickle=request.model.weights == "any",
        base_name=name,
        base_revision=source.revision,
    )
    return [
        plan_merge(
            source.dir,
            request.adapter_dir,
            strength=knobs.strength,
            options=replace(options, quantized=base),
        )
        for base in bases
    ]


def _write(plan: MergePlan, request: MergeRequest) -> _Candidate:
    directory = _unchecked_dir(request.out_dir.absolute(), plan.base)
    device = choose_device(request.settings.device)
    result = write_merge(plan, directory, overwrite=True, device=device)
    log.info(
        "merge into the %s base: %d of %d tensors changed, %.1f s",
        plan.base,
        sum(result.changes.values()),
        result.num_tensors,
        result.seconds,
    )
    return _Candidate(plan, directory, result)


def _unchecked_dir(out_dir: Path, base: str) -> Path:
    return out_dir.with_name(f".{out_dir.name}.{base}.unchecked")


def _remove_unchecked(out_dir: Path) -> None:
    for base in MERGE_BASES:
        shutil.rmtree(_unchecked_dir(out_dir, base), ignore_errors=True)


def _is_reference(live: _Live, plan: MergePlan) -> bool:
    """Whether the live model is what a merge of this plan should answer like."""
    return live.is_quantized == (plan.round_trip is not None)


def _load_live(request: MergeRequest, candidate: _Candidate, *, is_quantized: bool) -> _Live:
    """Load base and adapter, in float32 where that fits, quantized or not."""
    config = reference_model(
        request.model, comparison_dtype(candidate.directory), is_quantized=is_quantized
    )
    loaded = load_model(config, request.source)
    if not _has_live_model(request):
        return _Live(loaded.model, loaded, is_quantized)
    model = load_adapter(loaded.model, request.adapter_dir, base_fingerprint=loaded.fingerprint)
    return _Live(model, loaded, is_quantized)


def reference_model(model: ModelConfig, dtype: str, *, is_quantized: bool) -> ModelConfig:
    """Return how an adapter's base is loaded to compare a merged model with it, all in `dtype`."""
    quantization = model.quantization if is_quantized else None
    if isinstance(quantization, Nf4Quantization | Fp4Quantization):
        quantization = quantization.model_copy(update={"compute_dtype": "auto"})
    return model.model_copy(update={"quantization": quantization, "dtype": dtype})


def _score(
    request: MergeRequest, live: _Live, candidates: Sequence[_Candidate]
) -> dict[str, VerifyResult]:
    """Compare every candidate with the quantized model and its adapter on the held-out rows."""
    prompts = replace(_prompts(request, live.loaded), open_prompts=())
    decoding = Decoding(CHECKED_NEW_TOKENS, live.loaded.stop_token_ids)
    scores = {}
    for one in candidates:
        with rescale_adapter_scale(live.model, request.knobs.strength):
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


def _score_values(score: VerifyResult) -> dict[str, Any]:
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


def _check_values(check: VerifyResult) -> dict[str, Any]:
    return {**check.to_dict(), "open_prompts": list(OPEN_PROMPTS[:NUM_CHECKED])}


def _check(request: MergeRequest, live: _Live, merged_dir: Path) -> VerifyResult | None:
    """Compare the live adapter with the merged directory as read from disk.

    The adapter's base is the one it was merged into: never quantized for the original, quantized
    for the dequantized one. A live adapter can be weakened only where it is all low-rank products;
    at another strength there is nothing to compare the others with, and None is returned.
    """
    if not _has_live_model(request):
        log.warning(
            "merge: not checked: at strength %g only plain LoRA has a live model to compare with, "
            "and this adapter also has magnitudes, biases or whole tensors",
            request.knobs.strength,
        )
        return None
    decoding = Decoding(CHECKED_NEW_TOKENS, live.loaded.stop_token_ids)
    prompts = _prompts(request, live.loaded)
    with rescale_adapter_scale(live.model, request.knobs.strength):
        check = verify_merge(
            live.model, merged_dir, prompts, decoding=decoding, dtype=live.loaded.dtype
        )
    log.info("merge: %s", describe_check(check))
    for each in check.label_differences:
        log.info(
            "merge: label of prompt %d differs: it led by %.3f nats (adapter) and %.3f (merged)",
            each.prompt + 1,
            each.live_margin,
            each.merged_margin,
        )
    return check


def describe_check(check: VerifyResult) -> str:
    """Say in one line how close merged model and adapter are."""
    return (
        f"merged against adapter in {check.dtype}: KL {check.kl:.2e} nats/token, largest logit "
        f"difference {check.max_logit_difference:.3f}, top-1 agreement {check.top1_agreement:.2%}, "
        f"{check.num_same_labels} of {check.num_labels} labels and "
        f"{check.num_same_texts} of {check.num_open_prompts} greedy texts the same"
    )


def describe_plans(request: MergeRequest) -> dict[str, Any]:
    """Plan the merge and write nothing.

    Returns:
        `plans`: one for each base that would be merged, with every changed tensor; `out_dir`,
        `needed_bytes` of all that would lie on the disk at once, and `free_bytes` of it.

    Raises:
        LlmtuneError: as `plan_candidates`.
    """
    plans = plan_candidates(request)
    return {
        "out_dir": str(request.out_dir),
        "needed_bytes": sum(needed_bytes(plan) for plan in plans),
        "free_bytes": free_bytes(request.out_dir),
        "plans": [plan.to_dict() for plan in plans],
    }


def _has_live_model(request: MergeRequest) -> bool:
    return request.knobs.strength == 1 or _is_all_low_rank(request.adapter_dir)


def _is_all_low_rank(adapter_dir: Path) -> bool:
    names = [entry.name for entry in read_header(adapter_dir / ADAPTER_FILE).tensors]
    return all("lora_A" in name or "lora_B" in name for name in names) and not any(
        name.endswith("bias") for name in names
    )


def comparison_dtype(merged_dir: Path) -> str:
    """Return float32 where two such copies fit, so that only the merge's rounding shows."""
    tensors = CheckpointIndex.open(merged_dir).tensors.values()
    needed = 2 * FLOAT32_BYTES * sum(math.prod(tensor.shape) for tensor in tensors)
    free = psutil.virtual_memory().available
    if torch.cuda.is_available():
        free = min(free, torch.cuda.mem_get_info()[0])
    return "float32" if needed <= MEMORY_SHARE * free else "bfloat16"


def _prompts(request: MergeRequest, loaded: LoadedModel) -> VerifyPrompts:
    open_prompts = [tuple(render_question(loaded.tokenizer, question)) for question in OPEN_PROMPTS]
    sequences = [tuple(ids) for ids in request.sequences[:NUM_CHECKED]] or open_prompts
    return VerifyPrompts(
        sequences=tuple(sequences),
        labels=tuple(_labels(request.suites, loaded.tokenizer)),
        open_prompts=tuple(open_prompts[:NUM_CHECKED]),
    )


def _labels(
    suites: Sequence[Suite], tokenizer: PreTrainedTokenizerFast
) -> list[ContinuationRequest]:
    choices = [suite for suite in suites if suite.task == "choice" and suite.role == "target"]
    return build_choice_requests(tokenizer, choices[0])[:NUM_CHECKED] if choices else []
