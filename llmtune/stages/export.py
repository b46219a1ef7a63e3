"""The export stage: a run, an adapter or a model written for another program, then checked."""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from llmtune.adapters.manifest import adapter_fingerprint, check_adapter
from llmtune.data.template import require_trained_template
from llmtune.errors import CheckFailed, LlmtuneError
from llmtune.exporting.card import CARD_NAME, base_name, read_report, render_card
from llmtune.exporting.config import ExportSettings
from llmtune.exporting.gguf.adapter import export_adapter_gguf
from llmtune.exporting.gguf.vocabulary import read_vocabulary
from llmtune.exporting.gguf.write import GgufRequest, GgufResult, export_gguf, require_new
from llmtune.exporting.hub import check_push, push_directory
from llmtune.exporting.nf4 import write_nf4
from llmtune.exporting.ollama import MODELFILE_NAME, render_modelfile
from llmtune.exporting.parity import ParityRequest, ParityResult, compare_with_runtime
from llmtune.exporting.preflight import check_exportable, choose_type
from llmtune.exporting.runtime import is_runtime_installed, require_runtime
from llmtune.merging.verify import load_merged
from llmtune.models.checkpoint import read_generation_config
from llmtune.models.identity import base_fingerprint
from llmtune.models.resolve import resolve_base
from llmtune.models.tokenizer import load_tokenizer
from llmtune.models.turns import stop_token_ids
from llmtune.run_dir import atomic_write_text
from llmtune.targets import Target, resolve_target
from llmtune.version import __version__

log = logging.getLogger("llmtune")

EXPORTS_DIR = "exports"
MEMORY_SHARE = 0.5
"""Of the free memory, what the model may take in float32 for the comparison with llama.cpp."""
FLOAT32_OVER_16_BITS = 2

# Largest KL(model || file) after a prompt, in nats, with which a file is kept. A broken file has
# several nats; SmolLM2-135M, which suffers more than larger models, has 0.0001 in f16 and 0.007
# in q8_0.
MAX_KL = {"f32": 0.01, "f16": 0.01, "bf16": 0.02, "q8_0": 0.05}
MAX_KL_SMALL = 0.6
"""For the 4- and 5-bit types."""


@dataclass(frozen=True)
class _Job:
    target: Target
    settings: ExportSettings
    type: str | None
    out: Path
    name: str
    report: Mapping[str, Any] | None


def export_target(
    target_name: str, overrides: Sequence[str], settings: ExportSettings
) -> dict[str, Any]:
    """Export what `target_name` names and check the result; nothing is left by a failed check.

    Args:
        target_name: a run, its config, a merged or other model; an adapter for `adapter-gguf`.
        overrides: `key.path=value` of the run's config.
        settings: what is made, and where.

    Returns:
        The exporter's result as JSON values: `to`, `out`, `num_bytes`, `notices` and more.

    Raises:
        LlmtuneError: the target has nothing to export, or it cannot be exported so.
        CheckFailed: the file's answers are not the model's.
    """
    type = choose_type(settings.to, settings.type)
    target = resolve_target(target_name, overrides)
    if settings.to == "hub":
        return _push(target, settings)
    out = settings.out or _default_out(target, settings.to, type)
    require_new(out, overwrite=settings.force)
    job = _Job(target, settings, type, out, _name(target), _report(target))
    result = EXPORTERS[settings.to](job)
    for notice in result.get("notices", ()):
        log.warning("%s", notice)
    return {"to": settings.to, "out": str(out), **result}


def _default_out(target: Target, to: str, type: str | None) -> Path:
    if target.config is None:
        raise LlmtuneError(f"{target.name}: is not a run; say where the export goes with --out")
    run = target.config.run
    stem = f"{run.path.resolve().name}-{type}"
    names = {"gguf": f"{stem}.gguf", "adapter-gguf": f"{stem}-adapter.gguf", "ollama": stem}
    return run.path / EXPORTS_DIR / names.get(to, to)


def _name(target: Target) -> str:
    path = target.config.run.path if target.config else Path(target.name)
    return path.resolve().name


def _report(target: Target) -> dict[str, Any] | None:
    return read_report(target.config.run.report_json_path) if target.config else None


def _source_dir(target: Target) -> Path:
    """Return the 16-bit model to export: a run's merged one, or the model named.

    Raises:
        LlmtuneError: it has not been merged.
    """
    if target.merged_dir is not None:
        if target.adapter_dir is not None:
            template = target.model.chat_template
            tokenizer = load_tokenizer(target.merged_dir, chat_template=template)
            require_trained_template(tokenizer, target.adapter_dir)
        return target.merged_dir
    if target.config is not None or target.adapter_dir is not None:
        raise LlmtuneError(
            f"{target.name}: there is no merged model yet; make it with: "
            f"llmtune merge {target.name}"
        )
    return resolve_base(target.model).dir


def _export_gguf(job: _Job) -> dict[str, Any]:
    """Write the file beside its place, compare it with the model, then move it there."""
    source = _source_dir(job.target)
    result, parity = _write_checked(job, source, job.out)
    return _describe(result, parity)


def _export_ollama(job: _Job) -> dict[str, Any]:
    """Write a directory: the GGUF file, a Modelfile and the model card."""
    source = _source_dir(job.target)
    template = job.target.model.chat_template
    tokenizer = load_tokenizer(source, chat_template=template)
    file_name = f"{job.name}-{job.type}.gguf"
    modelfile = render_modelfile(
        tokenizer,
        file_name,
        stop_token_ids=stop_token_ids(tokenizer, read_generation_config(source)),
        adds_bos=read_vocabulary(source, chat_template=template).adds_bos,
    )

    def fill(directory: Path) -> dict[str, Any]:
        result, parity = _write_checked(job, source, directory / file_name)
        atomic_write_text(directory / MODELFILE_NAME, modelfile)
        files = {file_name: f"the model in {job.type}", MODELFILE_NAME: "for `ollama create`"}
        atomic_write_text(directory / CARD_NAME, render_card(job.name, job.report, files=files))
        return _describe(replace(result, path=job.out / file_name), parity)

    return _fill_directory(job.out, fill)


def _export_adapter_gguf(job: _Job) -> dict[str, Any]:
    """Write the adapter alone, for llama.cpp to apply on a GGUF of the base."""
    adapter_dir = job.target.adapter_dir
    if adapter_dir is None:
        raise LlmtuneError(f"{job.target.name}: has no adapter to export")
    base = resolve_base(job.target.model).dir
    check_exportable(base, job.settings.to, job.type, chat_template=job.target.model.chat_template)
    check_adapter(adapter_dir, base_fingerprint=base_fingerprint(base))
    assert job.type is not None
    result = export_adapter_gguf(
        adapter_dir,
        base,
        job.out,
        type=job.type,
        provenance={**_provenance(job), "llmtune.adapter": adapter_fingerprint(adapter_dir)},
        overwrite=job.settings.force,
    )
    return _describe(result, None)


def _export_nf4(job: _Job) -> dict[str, Any]:
    """Write a directory that transformers loads in 4 bits, with the model card."""
    source = _source_dir(job.target)

    def fill(directory: Path) -> dict[str, Any]:
        result = write_nf4(source, directory, chat_template=job.target.model.chat_template)
        files = {"model.safetensors": "the model in 4 bits (bitsandbytes NF4)"}
        atomic_write_text(directory / CARD_NAME, render_card(job.name, job.report, files=files))
        return result.to_dict()

    return _fill_directory(job.out, fill)


def _push(target: Target, settings: ExportSettings) -> dict[str, Any]:
    """Push a run's merged model, an adapter or a model directory, with the model card."""
    check_push(settings.repo)
    is_adapter = target.config is None and target.adapter_dir is not None
    source = target.adapter_dir if is_adapter else _source_dir(target)
    assert source is not None and settings.repo is not None
    card = render_card(settings.repo.partition("/")[2], _report(target), files={})
    result = push_directory(source, settings.repo, card=card, public=settings.public)
    return {"to": settings.to, "out": result.url, **result.to_dict()}


EXPORTERS: dict[str, Callable[[_Job], dict[str, Any]]] = {
    "gguf": _export_gguf,
    "ollama": _export_ollama,
    "adapter-gguf": _export_adapter_gguf,
    "nf4": _export_nf4,
}


def _write_checked(job: _Job, source: Path, path: Path) -> tuple[GgufResult, ParityResult | None]:
    assert job.type is not None
    unchecked = path.with_name(f".{path.name}.unchecked")
    template = job.target.model.chat_template
    request = GgufRequest(source, unchecked, job.type, job.name, _provenance(job), template)
    try:
        result = export_gguf(request, overwrite=True)
        log.info("export: %s, %d bytes, %.1f s", job.type, result.num_bytes, result.seconds)
        parity = _compare(job, source, unchecked)
        if parity is not None:
            _check_parity(parity, job, path)
        unchecked.replace(path)
    finally:
        unchecked.unlink(missing_ok=True)
    return replace(result, path=path), parity


def _provenance(job: _Job) -> dict[str, str]:
    facts = {"llmtune.version": __version__}
    if job.report is not None:
        facts["general.base_model.0.name"] = base_name(job.report)
        facts["llmtune.verdict"] = str(job.report.get("verdict"))
    return facts


def _compare(job: _Job, source: Path, path: Path) -> ParityResult | None:
    """Ask llama.cpp and transformers the same, where llama.cpp is there or was asked for."""
    if job.settings.runtime is False:
        return None
    if job.settings.runtime:
        require_runtime()
    elif not is_runtime_installed():
        log.warning(
            "export: llama.cpp is not installed, so the file was not run in it: "
            "pip install 'llmtune[runtime]'"
        )
        return None
    return compare_file(source, path, chat_template=job.target.model.chat_template)


def compare_file(source: Path, path: Path, *, chat_template: Path | None = None) -> ParityResult:
    """Compare a GGUF file in llama.cpp with the checkpoint it was made from, both on the CPU.

    Raises:
        LlmtuneError: llama.cpp is not installed or cannot load the file.
    """
    tokenizer = load_tokenizer(source, chat_template=chat_template)
    dtype = getattr(torch, comparison_dtype(source))
    model = load_merged(source, dtype=dtype, device="cpu")
    stops = stop_token_ids(tokenizer, read_generation_config(source))
    request = ParityRequest(path, stops, num_threads=torch.get_num_threads())
    parity = compare_with_runtime(model, tokenizer, request)
    log.info("export: %s", describe_parity(parity))
    return parity


def comparison_dtype(source: Path) -> Literal["float32", "bfloat16"]:
    """Return float32 where the model fits so, that only the export's rounding shows."""
    stored = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    fits = FLOAT32_OVER_16_BITS * stored <= MEMORY_SHARE * psutil.virtual_memory().available
    return "float32" if fits else "bfloat16"


def allowed_kl(type: str) -> float:
    """Return the KL, in nats, with which a file of this type is kept."""
    return MAX_KL.get(type, MAX_KL_SMALL)


def describe_parity(parity: ParityResult) -> str:
    """Say in one line how close file and model are."""
    return (
        f"llama.cpp against transformers: {parity.num_same_prompts} of {parity.num_prompts} "
        f"prompts with the same token ids, {parity.num_same_answers} greedy answers the same, KL "
        f"{parity.kl:.2e} nats, {parity.num_same_strings} of {parity.num_strings} tricky strings "
        "tokenized the same"
    )


def _check_parity(parity: ParityResult, job: _Job, path: Path) -> None:
    assert job.type is not None
    limit = job.settings.max_kl if job.settings.max_kl is not None else allowed_kl(job.type)
    if parity.num_same_prompts < parity.num_prompts:
        raise CheckFailed(
            f"{path}: llama.cpp makes other token ids of "
            f"{parity.num_prompts - parity.num_same_prompts} of {parity.num_prompts} chat prompts; "
            "the file was removed"
        )
    if not parity.kl <= limit:
        raise CheckFailed(
            f"{path}: llama.cpp's answers differ from the model's by {parity.kl:.4f} nats (KL), "
            f"more than {limit:g}; the file was removed. Choose a finer --type than "
            f"{job.type}, or allow more with --max-kl"
        )


def _describe(result: GgufResult, parity: ParityResult | None) -> dict[str, Any]:
    notices = list(result.notices)
    if parity is not None and parity.num_same_strings < parity.num_strings:
        notices.append(
            f"llama.cpp tokenizes {parity.num_strings - parity.num_same_strings} of "
            f"{parity.num_strings} tricky strings differently, such as {parity.odd_strings[0]!r}"
        )
    described = None if parity is None else parity.to_dict()
    return {**result.to_dict(), "notices": notices, "parity": described}


def _fill_directory(out: Path, fill: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Let `fill` write a directory beside `out`, then put it there; `out` is replaced whole."""
    unchecked = out.with_name(f".{out.name}.unchecked")
    shutil.rmtree(unchecked, ignore_errors=True)
    unchecked.mkdir(parents=True)
    try:
        result = fill(unchecked)
        if out.is_dir():
            shutil.rmtree(out)
        unchecked.rename(out)
    finally:
        shutil.rmtree(unchecked, ignore_errors=True)
    return result
