"""The merge stage: stream the adapter into its base, then compare it with the live adapter."""

import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from peft.helpers import rescale_adapter_scale
from transformers import PreTrainedTokenizerFast

from llmtune.adapters.saved import load_adapter
from llmtune.data.render import render_question
from llmtune.data.template import require_trained_template
from llmtune.errors import CheckFailed
from llmtune.evaluation.requests import build_choice_requests
from llmtune.evaluation.suite import Suite
from llmtune.merging.merge import move_into_place, remove_leftovers, write_merge
from llmtune.merging.plan import plan_merge
from llmtune.merging.verify import VerifyPrompts, VerifyResult, verify_merge
from llmtune.models.config import ModelConfig
from llmtune.models.load import LoadedModel, load_model
from llmtune.models.resolve import BaseSource
from llmtune.models.tokenizer import load_tokenizer
from llmtune.open_prompts import OPEN_PROMPTS
from llmtune.safetensors_io import ADAPTER_FILE, CheckpointIndex, read_header
from llmtune.scoring.generate import Decoding
from llmtune.scoring.likelihood import ContinuationRequest

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
    strength: float
    max_kl: float
    sequences: Sequence[Sequence[int]] = ()
    """Held-out rows as token ids; without any the open prompts are compared."""
    suites: Sequence[Suite] = ()
    """The first target suite of choices among these gives the labels to compare."""


def run_merge_stage(request: MergeRequest) -> dict[str, Any]:
    """Merge, check, and only then let the directory appear; return both results as JSON values.

    Raises:
        CheckFailed: the merged model's KL to the live adapter is above `max_kl`.
    """
    tokenizer = load_tokenizer(request.source.dir, chat_template=request.model.chat_template)
    require_trained_template(tokenizer, request.adapter_dir)
    plan = plan_merge(request.source.dir, request.adapter_dir, strength=request.strength)
    for notice in plan.notices:
        log.info("merge: %s", notice)
    out_dir = request.out_dir.absolute()
    unchecked = out_dir.with_name(f".{out_dir.name}.unchecked")
    remove_leftovers(out_dir)
    result = write_merge(plan, unchecked, overwrite=True)
    log.info(
        "merge: %d of %d tensors changed, %.1f s; checking against the live adapter",
        sum(result.changes.values()),
        result.num_tensors,
        result.seconds,
    )
    try:
        loaded = _load_unquantized(request, unchecked)
        # One list of stop tokens for everything that is saved, and a config that can be saved.
        loaded.model.generation_config.save_pretrained(unchecked)
        check = _check(request, loaded, unchecked)
        if check is not None and not check.kl <= request.max_kl:
            raise CheckFailed(
                f"merged model and live adapter differ by {check.kl:.4f} nats/token (KL), more "
                f"than merge.max_kl={request.max_kl:g}; nothing was left in {request.out_dir}"
            )
        move_into_place(unchecked, request.out_dir)
    finally:
        shutil.rmtree(unchecked, ignore_errors=True)
    return {
        **result.to_dict(),
        "out_dir": str(request.out_dir),
        "check": None if check is None else _check_values(check),
    }


def _check_values(check: VerifyResult) -> dict[str, Any]:
    return {**check.to_dict(), "open_prompts": list(OPEN_PROMPTS[:NUM_CHECKED])}


def _load_unquantized(request: MergeRequest, merged_dir: Path) -> LoadedModel:
    dtype = _comparison_dtype(merged_dir)
    config = request.model.model_copy(update={"quantization": None, "dtype": dtype})
    return load_model(config, request.source)


def _check(request: MergeRequest, loaded: LoadedModel, merged_dir: Path) -> VerifyResult | None:
    """Compare base + adapter, never quantized, with the merged directory as read from disk.

    A live adapter can be weakened only where it is all low-rank products; at another strength
    there is nothing to compare the others with, and None is returned.
    """
    if request.strength != 1 and not _is_all_low_rank(request.adapter_dir):
        log.warning(
            "merge: not checked: at strength %g only plain LoRA has a live model to compare with, "
            "and this adapter also has magnitudes, biases or whole tensors",
            request.strength,
        )
        return None
    live = load_adapter(loaded.model, request.adapter_dir, base_fingerprint=loaded.fingerprint)
    decoding = Decoding(CHECKED_NEW_TOKENS, loaded.stop_token_ids)
    prompts = _prompts(request, loaded)
    with rescale_adapter_scale(live, request.strength):
        check = verify_merge(live, merged_dir, prompts, decoding=decoding, dtype=loaded.dtype)
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


def _is_all_low_rank(adapter_dir: Path) -> bool:
    names = [entry.name for entry in read_header(adapter_dir / ADAPTER_FILE).tensors]
    return all("lora_A" in name or "lora_B" in name for name in names) and not any(
        name.endswith("bias") for name in names
    )


def _comparison_dtype(merged_dir: Path) -> str:
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
