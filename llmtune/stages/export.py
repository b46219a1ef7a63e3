"""The export stage: a run, an adapter or a model written for another program, then checked."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmtune.adapters.manifest import adapter_fingerprint, check_adapter
from llmtune.checks.provenance import read_record
from llmtune.data.template import require_trained_template
from llmtune.errors import LlmtuneError
from llmtune.exporting.card import CARD_NAME, base_name, read_report, render_card
from llmtune.exporting.config import QUANTIZER_TYPES, ExportSettings
from llmtune.exporting.gguf.adapter import export_adapter_gguf
from llmtune.exporting.gguf.read import count_tensor_types
from llmtune.exporting.gguf.vocabulary import read_vocabulary
from llmtune.exporting.gguf.write import GgufRequest, GgufResult, write_gguf
from llmtune.exporting.hub import check_push, push_directory
from llmtune.exporting.nf4 import write_nf4
from llmtune.exporting.ollama import MODELFILE_NAME, render_modelfile
from llmtune.exporting.place import mark_export, require_new
from llmtune.exporting.preflight import check_exportable, choose_type
from llmtune.exporting.quantizer import quantize_file
from llmtune.io.run_dir import atomic_write_text
from llmtune.io.safetensors import CheckpointIndex
from llmtune.io.unfinished import move_into_place, unfinished_dir, unfinished_file
from llmtune.models.checkpoint import read_generation_config
from llmtune.models.identity import base_fingerprint
from llmtune.models.resolve import resolve_base
from llmtune.models.tokenizer import load_tokenizer
from llmtune.models.turns import stop_token_ids
from llmtune.runs.targets import Target, resolve_target
from llmtune.stages.export_check import compare_file, require_parity, wants_runtime
from llmtune.version import __version__

log = logging.getLogger("llmtune")

EXPORTS_DIR = "exports"


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
    require_new(out, settings.to, overwrite=settings.force)
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
    with unfinished_file(job.out) as unfinished:
        result = _write_checked(job, _source_dir(job.target), unfinished)
    return {**result, "path": str(job.out)}


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
        result = _write_checked(job, source, directory / file_name)
        atomic_write_text(directory / MODELFILE_NAME, modelfile)
        files = {file_name: f"the model in {job.type}", MODELFILE_NAME: "for `ollama create`"}
        atomic_write_text(directory / CARD_NAME, render_card(job.name, job.report, files=files))
        return {**result, "path": str(job.out / file_name)}

    return _fill_directory(job, source, fill)


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
        provenance={
            **_provenance(job, base),
            "llmtune.adapter": adapter_fingerprint(adapter_dir),
        },
        overwrite=job.settings.force,
    )
    return {**result.to_dict(), "parity": None}


def _export_nf4(job: _Job) -> dict[str, Any]:
    """Write a directory that transformers loads in 4 bits, with the model card."""
    source = _source_dir(job.target)

    def fill(directory: Path) -> dict[str, Any]:
        result = write_nf4(source, directory, chat_template=job.target.model.chat_template)
        files = {"model.safetensors": "the model in 4 bits (bitsandbytes NF4)"}
        atomic_write_text(directory / CARD_NAME, render_card(job.name, job.report, files=files))
        return result.to_dict()

    return _fill_directory(job, source, fill)


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


def _write_checked(job: _Job, source: Path, path: Path) -> dict[str, Any]:
    """Write the file and compare it with the model; the caller removes what does not pass."""
    result = _write_gguf(job, source, path)
    log.info("export: %s, %d bytes, %.1f s", job.type, result.num_bytes, result.seconds)
    parity = None
    if wants_runtime(job.settings.runtime):
        template = job.target.model.chat_template
        parity = compare_file(source, path, chat_template=template)
        require_parity(parity, result.type, job.out, max_kl=job.settings.max_kl)
    notices = list(result.notices)
    if parity is not None and parity.num_same_strings < parity.num_strings:
        notices.append(
            f"llama.cpp tokenizes {parity.num_strings - parity.num_same_strings} of "
            f"{parity.num_strings} tricky strings differently, such as {parity.odd_strings[0]!r}"
        )
    described = None if parity is None else parity.to_dict()
    return {**result.to_dict(), "notices": notices, "parity": described}


def _write_gguf(job: _Job, source: Path, path: Path) -> GgufResult:
    """Write the file, a K-quant through an exact one that llama.cpp's quantizer reads."""
    assert job.type is not None
    is_quantizer = job.type in QUANTIZER_TYPES
    exact = path.with_name("exact.gguf") if is_quantizer else path
    type = _exact_type(source) if is_quantizer else job.type
    template = job.target.model.chat_template
    request = GgufRequest(source, exact, type, job.name, _provenance(job, source), template)
    result = write_gguf(request)
    if not is_quantizer:
        return result
    start = time.monotonic()
    quantize_file(exact, path, job.type)
    exact.unlink()
    return replace(
        result,
        type=job.type,
        tensor_types=count_tensor_types(path),
        num_bytes=path.stat().st_size,
        seconds=result.seconds + time.monotonic() - start,
    )


def _exact_type(source: Path) -> str:
    """Return the GGUF type that holds every number of the checkpoint as it is."""
    stored = {tensor.dtype for tensor in CheckpointIndex.open(source).tensors.values()}
    return "f32" if len(stored) > 1 else {"BF16": "bf16", "F16": "f16"}.get(stored.pop(), "f32")


def _facts(job: _Job, source: Path) -> dict[str, str]:
    """Return what the export was made from, without any path of this machine."""
    facts = {"source": base_fingerprint(source), "version": __version__}
    record = read_record(source)
    if record is not None:
        facts["merged_into"] = record.base
    if job.report is not None:
        facts["base_name"] = base_name(job.report)
        facts["verdict"] = str(job.report.get("verdict"))
    return facts


def _provenance(job: _Job, source: Path) -> dict[str, str]:
    facts = {f"llmtune.{key}": value for key, value in _facts(job, source).items()}
    name = facts.pop("llmtune.base_name", None)
    return facts | ({"general.base_model.0.name": name} if name else {})


def _fill_directory(
    job: _Job, source: Path, fill: Callable[[Path], dict[str, Any]]
) -> dict[str, Any]:
    """Let `fill` write a directory beside its place, then put it there, whole."""
    out = job.out.absolute()
    with unfinished_dir(out) as scratch:
        directory = scratch / out.name
        directory.mkdir()
        result = fill(directory)
        mark_export(directory, {"to": job.settings.to, "type": job.type, **_facts(job, source)})
        move_into_place(directory, out)
    return result
