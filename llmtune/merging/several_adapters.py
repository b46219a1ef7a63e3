"""Several adapters of one base merged into one model, and checked."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from safetensors.torch import load_file

from llmtune.adapters.config import method_of
from llmtune.adapters.live import add_adapters
from llmtune.adapters.manifest import (
    MANIFEST_NAME,
    WEIGHTS_NAME,
    adapter_fingerprint,
    read_adapter_config,
    read_adapter_manifest,
)
from llmtune.checks.merge_result import VerifyResult
from llmtune.checks.merged import load_merged, verify_merge
from llmtune.checks.prompts import NUM_NEW_TOKENS, build_prompts
from llmtune.checks.reference import comparison_dtype, load_comparable
from llmtune.errors import LlmtuneError
from llmtune.io.fingerprint import JsonObject
from llmtune.io.json_files import blamed_on
from llmtune.merging.changes import MergePlan, WeightedAdapter
from llmtune.merging.checked import (
    CheckedMerge,
    Judgment,
    WrittenMerge,
    merge_checked,
)
from llmtune.merging.combined_adapter import CombinedAdapter
from llmtune.merging.config import Combination, MergeConfig, MergeSettings
from llmtune.merging.one_adapter import plan_options
from llmtune.merging.plan import plan_combined_merge
from llmtune.merging.planned import PlannedMerges
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.hardware import release_memory
from llmtune.models.quantization.describe import describe_quantized_base
from llmtune.models.resolve import Loadable
from llmtune.scoring.generate import Decoding

log = logging.getLogger("llmtune")


@dataclass(frozen=True)
class SeveralRequest:
    """Which adapters are merged how, and where the model goes."""

    base: Loadable
    """The base of the first, which is that of all."""
    adapters: tuple[WeightedAdapter, ...]
    how: Combination
    out_dir: Path
    knobs: MergeConfig
    settings: MergeSettings


@dataclass(frozen=True)
class CombinedMerge:
    """A merged model of several adapters in its place."""

    merged: CheckedMerge
    adapters: tuple[WeightedAdapter, ...]
    method: str

    def to_dict(self) -> JsonObject:
        """Return the result as JSON."""
        record = {**self.merged.to_record()}
        check = record.pop("check")
        found = {"adapters": _describe(self.adapters), "method": self.method, "check": check}
        return cast(JsonObject, {**record, **found})

    def describe(self) -> str:
        """Say what the model was made of."""
        out_dir = self.merged.result.out_dir
        return f"{_format_sum(self.adapters)}: merged model saved in {out_dir} ({self.method})"


@dataclass(frozen=True)
class NewAdapter:
    """A new adapter made of several."""

    made: CombinedAdapter
    adapters: tuple[WeightedAdapter, ...]

    def to_dict(self) -> JsonObject:
        """Return the result as JSON."""
        return {
            **asdict(self.made),
            "out_dir": str(self.made.out_dir),
            "adapters": _describe(self.adapters),
        }

    def describe(self) -> str:
        """Say what the adapter was made of, and what cutting the rank lost."""
        made = self.made
        ranks = ", ".join(f"{count} of rank {rank}" for rank, count in made.ranks.items())
        text = f"{_format_sum(self.adapters)}: adapter saved in {made.out_dir}, {ranks}"
        if made.lost_energy:
            text += (
                f"\ncutting the rank lost {made.lost_energy:.2%} of the deltas' energy, at most "
                f"{made.worst_lost_energy:.2%} in {made.worst_module}"
            )
        return text


def merge_several(request: SeveralRequest) -> CombinedMerge:
    """Merge several adapters into a model.

    A model made of a plain sum is compared with the base and all adapters switched on at once;
    other methods have no live model, so theirs is loaded from disk and not compared.

    Raises:
        LlmtuneError: the adapters cannot be combined, or are not of this base.
        CheckFailed: the merged model differs from its adapters by more than `max_kl`.
    """
    merged = merge_checked(
        [_plan(request)],
        request.out_dir,
        lambda written: _judge(request, written),
        max_kl=request.knobs.max_kl,
        settings=request.settings,
    )
    return CombinedMerge(merged, request.adapters, request.how.method)


def plan_several(request: SeveralRequest) -> PlannedMerges:
    """Plan what `merge_several` would write.

    Raises:
        LlmtuneError: the adapters cannot be combined, or are not of this base.
    """
    return PlannedMerges([_plan(request)], request.out_dir)


def require_combinable(adapters: Sequence[WeightedAdapter]) -> None:
    """Check that several adapters can become one model or adapter, from their files alone.

    Raises:
        LlmtuneError: there is one only, one is there twice or holds a number that is not finite,
            all have the weight 0, or they belong to different bases.
    """
    if len(adapters) < 2:
        raise LlmtuneError("--adapters: give at least two, such as --adapters a=0.6 b=0.4")
    hashes: dict[str, Path] = {}
    for one in adapters:
        other = hashes.setdefault(adapter_fingerprint(one.directory), one.directory)
        if other is not one.directory:
            raise LlmtuneError(f"--adapters: {one.directory} and {other} are the same adapter")
        _require_finite(one.directory)
    if not any(one.weight for one in adapters):
        raise LlmtuneError("--adapters: every weight is 0, so the result would be the base")
    _require_one_base([one.directory for one in adapters])


def _require_finite(directory: Path) -> None:
    read_adapter_config(directory)
    with blamed_on(directory / WEIGHTS_NAME, "safetensors"):
        tensors = load_file(directory / WEIGHTS_NAME)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise LlmtuneError(f"{directory}: {name!r} holds a number that is not finite")


def _require_one_base(directories: Sequence[Path]) -> None:
    """Compare fingerprints if llmtune wrote all the adapters, else the bases' names."""
    known = {}
    for directory in directories:
        if (directory / MANIFEST_NAME).is_file():
            base = read_adapter_manifest(directory).get("base") or {}
            known[directory] = base.get("fingerprint")
    names = {one: read_adapter_config(one).get("base_model_name_or_path") for one in directories}
    bases = known if len(known) == len(directories) else names
    if len(set(bases.values())) > 1:
        listed = "; ".join(f"{one}: {str(base)[:60]}" for one, base in bases.items())
        raise LlmtuneError(f"--adapters: they belong to different bases ({listed})")


def _plan(request: SeveralRequest) -> MergePlan:
    knobs, model, source = request.knobs, request.base.model, request.base.base
    if request.how.method == "svd" and request.how.rank is None:
        raise LlmtuneError("--method svd needs --rank")
    for one in request.adapters:
        saved = read_adapter_config(one.directory)
        reason = method_of(saved).why_only_alone(saved)
        if reason is not None:
            raise LlmtuneError(f"{one.directory}: {reason}")
    quantized = None
    if knobs.base == "auto":
        raise LlmtuneError(
            "--base auto compares one adapter's merges; choose original, dequantized"
        )
    if knobs.base == "dequantized":
        quantized = describe_quantized_base(model, source)
        if quantized is None:
            raise LlmtuneError("--base dequantized: the adapters' base is not quantized")
    options = replace(plan_options(model, source, request.settings), quantized=quantized)
    return plan_combined_merge(source, request.adapters, combination=request.how, options=options)


def _judge(request: SeveralRequest, written: Sequence[WrittenMerge]) -> Judgment:
    (kept,) = written
    release_memory()
    if request.how.is_dense:
        remote = request.base.model.trust_remote_code
        load_merged(kept.directory, dtype=None, device="cpu", trust_remote_code=remote)
        log.info("merge: %s has no live model; loaded from disk, not compared", request.how.method)
        return Judgment(kept, check=None)
    check = _compare(request, kept.directory)
    log.info("merge: %s", check.summary())
    return Judgment(kept, check)


def _compare(request: SeveralRequest, merged_dir: Path) -> VerifyResult:
    """Compare the merged model with its base and all adapters on the open prompts."""
    model = request.base.model
    first, *others = request.adapters
    dtype = comparison_dtype(Checkpoint.open(merged_dir), device=model.device)
    is_quantized = request.knobs.base == "dequantized"
    live = load_comparable(
        model, request.base.base, first.directory, dtype, is_quantized=is_quantized
    )
    assert isinstance(live.model, PeftModel)
    add_adapters(
        live.model,
        [(one.directory, one.weight) for one in others],
        first_weight=first.weight,
    )
    return verify_merge(
        live.model,
        merged_dir,
        replace(build_prompts(live.tokenizer), open_prompts=()),
        decoding=Decoding(NUM_NEW_TOKENS, live.stop_token_ids),
        dtype=live.dtype,
        trust_remote_code=model.trust_remote_code,
    )


def _describe(adapters: Sequence[WeightedAdapter]) -> list[JsonObject]:
    return [{"directory": str(one.directory), "weight": one.weight} for one in adapters]


def _format_sum(adapters: Sequence[WeightedAdapter]) -> str:
    return " + ".join(f"{one.weight:g} x {one.directory}" for one in adapters)
