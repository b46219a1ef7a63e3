"""Several adapters of one base merged into one model, or into one new adapter."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from llmtune.adapters.config import method_of
from llmtune.adapters.manifest import (
    CONFIG_NAME,
    MANIFEST_NAME,
    WEIGHTS_NAME,
    adapter_fingerprint,
    read_adapter_config,
    read_adapter_manifest,
)
from llmtune.checks.merged import VerifyResult, load_merged, verify_merge
from llmtune.checks.prompts import NUM_NEW_TOKENS, build_prompts
from llmtune.checks.provenance import add_to_provenance
from llmtune.checks.reference import comparison_dtype, load_live
from llmtune.errors import LlmtuneError
from llmtune.io.unfinished import move_into_place, require_space, unfinished_dir
from llmtune.merging.changes import MergePlan, WeightedAdapter
from llmtune.merging.combined_adapter import combine_adapters
from llmtune.merging.config import Combination, MergeConfig, MergeSettings
from llmtune.merging.merge import needed_bytes, write_merge
from llmtune.merging.plan import plan_combined_merge
from llmtune.models.config import ModelConfig
from llmtune.models.hardware import choose_device
from llmtune.models.resolve import resolve_base
from llmtune.models.round_trip import describe_quantized_base
from llmtune.runs.targets import resolve_target
from llmtune.scoring.generate import Decoding
from llmtune.stages.memory import release_memory
from llmtune.stages.merge import require_close, score_values
from llmtune.stages.merge_plan import describe_plans, plan_options

log = logging.getLogger("llmtune")

RUNS_DIR = "runs"
ADAPTER_DIR = "adapter"


@dataclass(frozen=True)
class CombineRequest:
    """Which adapters are combined how, and where the result goes."""

    adapters: Sequence[str]
    """`NAME_OR_PATH=WEIGHT` each: an adapter directory, a run, or the name of one in `runs/`."""
    overrides: Sequence[str]
    """`model.*=value`: how the base is found."""
    how: Combination
    out_dir: Path
    to_adapter: bool
    knobs: MergeConfig
    settings: MergeSettings


def combine(request: CombineRequest) -> dict[str, Any]:
    """Combine adapters into a model or an adapter; return what was made as JSON values.

    A model made of a plain sum is compared with the base and all adapters switched on at once;
    other methods have no live model, so theirs is loaded from disk and not compared.

    Raises:
        LlmtuneError: an adapter cannot be found or combined, is there twice, holds a number that
            is not finite, or is one of another base.
        CheckFailed: the merged model differs from its adapters by more than `max_kl`.
    """
    adapters = _resolve(request)
    if request.to_adapter:
        made = combine_adapters(adapters, request.how, request.out_dir)
        return {**asdict(made), "out_dir": str(made.out_dir), "adapters": _describe(adapters)}
    model, plan = _plan(request, adapters)
    out_dir = request.out_dir.absolute()
    require_space(out_dir, needed_bytes(plan))
    with unfinished_dir(out_dir) as scratch:
        device = choose_device(request.settings.device)
        result = write_merge(plan, scratch / out_dir.name, device=device)
        check = _check(request, model, adapters, result.out_dir)
        require_close(check, request.knobs.max_kl, request.out_dir)
        add_to_provenance(result.out_dir, {"check": None if check is None else score_values(check)})
        move_into_place(result.out_dir, out_dir)
    return {
        **result.to_dict(),
        "out_dir": str(request.out_dir),
        "adapters": _describe(adapters),
        "method": request.how.method,
        "check": None if check is None else check.to_dict(),
    }


def describe_combination(request: CombineRequest) -> dict[str, Any]:
    """Plan the combined merge and write nothing; see `stages.merge_plan.describe_plans`."""
    _, plan = _plan(request, _resolve(request))
    return describe_plans([plan], request.out_dir)


def used_dirs(request: CombineRequest) -> list[Path]:
    """Return the directories that a combination reads: the adapters', and their base's."""
    adapters = [_read_item(item).directory for item in request.adapters]
    bases = [read_adapter_config(one).get("base_model_name_or_path") for one in adapters]
    if not request.to_adapter and adapters:
        bases.append(resolve_target(str(adapters[0]), request.overrides).model.base)
    return [*adapters, *(Path(base).expanduser() for base in bases if base)]


def _resolve(request: CombineRequest) -> list[WeightedAdapter]:
    found = [_read_item(item) for item in request.adapters]
    if len(found) < 2:
        raise LlmtuneError("--adapters: give at least two, such as --adapters a=0.6 b=0.4")
    hashes: dict[str, Path] = {}
    for one in found:
        other = hashes.setdefault(adapter_fingerprint(one.directory), one.directory)
        if other is not one.directory:
            raise LlmtuneError(f"--adapters: {one.directory} and {other} are the same adapter")
        _require_finite(one.directory)
    if not any(one.weight for one in found):
        raise LlmtuneError("--adapters: every weight is 0, so the result would be the base")
    _require_one_base([one.directory for one in found])
    return found


def _read_item(item: str) -> WeightedAdapter:
    name, separator, number = item.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not separator or not math.isfinite(weight):
        raise LlmtuneError(f"--adapters: {item!r} is no NAME_OR_PATH=WEIGHT, such as runs/a=0.6")
    for place in (Path(name), Path(RUNS_DIR) / name):
        for directory in (place, place / ADAPTER_DIR):
            if (directory / CONFIG_NAME).is_file():
                return WeightedAdapter(directory, weight)
    raise LlmtuneError(
        f"--adapters: {name!r} is neither an adapter directory nor a run, here or in {RUNS_DIR}/"
    )


def _require_finite(directory: Path) -> None:
    read_adapter_config(directory)
    for name, tensor in load_file(directory / WEIGHTS_NAME).items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise LlmtuneError(f"{directory}: {name!r} holds a number that is not finite")


def _require_one_base(directories: Sequence[Path]) -> None:
    """Compare fingerprints where llmtune wrote the adapters, else the bases' names."""
    known = {}
    for directory in directories:
        if (directory / MANIFEST_NAME).is_file():
            known[directory] = read_adapter_manifest(directory).get("base", {}).get("fingerprint")
    names = {one: read_adapter_config(one).get("base_model_name_or_path") for one in directories}
    bases = known if len(known) == len(directories) else names
    if len(set(bases.values())) > 1:
        listed = "; ".join(f"{one}: {str(base)[:60]}" for one, base in bases.items())
        raise LlmtuneError(f"--adapters: they belong to different bases ({listed})")


def _plan(
    request: CombineRequest, adapters: Sequence[WeightedAdapter]
) -> tuple[ModelConfig, MergePlan]:
    knobs = request.knobs
    if request.how.method == "svd" and request.how.rank is None:
        raise LlmtuneError("--method svd needs --rank")
    for one in adapters:
        saved = read_adapter_config(one.directory)
        reason = method_of(saved).why_only_alone(saved)
        if reason is not None:
            raise LlmtuneError(f"{one.directory}: {reason}")
    model = resolve_target(str(adapters[0].directory), request.overrides).model
    source = resolve_base(model, allow_quantized=True)
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
    return model, plan_combined_merge(source, adapters, combination=request.how, options=options)


def _check(
    request: CombineRequest,
    model: ModelConfig,
    adapters: Sequence[WeightedAdapter],
    merged_dir: Path,
) -> VerifyResult | None:
    release_memory()
    if request.how.is_dense:
        load_merged(merged_dir, dtype=None, device="cpu")
        log.info("merge: %s has no live model; loaded from disk, not compared", request.how.method)
        return None
    first, *others = adapters
    dtype = comparison_dtype(merged_dir, device=model.device)
    is_quantized = request.knobs.base == "dequantized"
    source = resolve_base(model, allow_quantized=True)
    live = load_live(model, source, first.directory, dtype=dtype, is_quantized=is_quantized)
    loaded = live.loaded
    prompts = replace(build_prompts(loaded.tokenizer), open_prompts=())
    with _all_active(live.model, first, others):
        check = verify_merge(
            live.model,
            merged_dir,
            prompts,
            decoding=Decoding(NUM_NEW_TOKENS, loaded.stop_token_ids),
            dtype=loaded.dtype,
        )
    log.info("merge: %s", check.summary())
    return check


@contextmanager
def _all_active(
    live: nn.Module, first: WeightedAdapter, others: Sequence[WeightedAdapter]
) -> Iterator[None]:
    """Switch on every adapter at its weight; the model is not used for anything else."""
    assert isinstance(live, PeftModel)
    (name,) = live.peft_config
    weights = {name: first.weight}
    for place, one in enumerate(others):
        live.load_adapter(str(one.directory), adapter_name=f"other{place}")
        weights[f"other{place}"] = one.weight
    live.base_model.set_adapter(list(weights))
    for module in live.modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict):
            for adapter, weight in weights.items():
                if adapter in scaling:
                    scaling[adapter] *= weight
    yield


def _describe(adapters: Sequence[WeightedAdapter]) -> list[dict[str, object]]:
    return [{"directory": str(one.directory), "weight": one.weight} for one in adapters]
