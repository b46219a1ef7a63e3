"""A model card from a run's report: what was done, and the numbers as they were measured."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmtune.io.json_files import read_json_object
from llmtune.models.hub import reads_as_hub_id
from llmtune.version import __version__

CARD_NAME = "README.md"


def read_report(path: Path) -> dict[str, Any] | None:
    """Return a run's report.json, or None if the run has none yet.

    Raises:
        LlmtuneError: it is not a JSON object.
    """
    if not path.is_file():
        return None
    return read_json_object(path, advice="write the report again: llmtune report RUN")


def render_card(name: str, report: Mapping[str, Any] | None, *, files: Mapping[str, str]) -> str:
    """Return the text of a model card in Markdown, with the front matter the hub reads.

    Paths of this machine do not enter it: a local base is named by its last part.

    Args:
        name: the model's name.
        report: a run's report.json, or None: then the card says that nothing was measured.
        files: what each file beside the card is, by its name.
    """
    lines = ["---", *_front_matter(report), "---", "", f"# {name}", "", *card_lines(report)]
    if files:
        lines += ["## Files", "", *(f"- `{file}`: {what}" for file, what in files.items()), ""]
    lines += [f"Made with llmtune {__version__}. The license of the base model applies."]
    return "\n".join(lines) + "\n"


def card_lines(report: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield the lines of a card that a report decides."""
    if report is None:
        yield from ("Nothing was measured of this model by llmtune.", "")
    else:
        yield from _results(report)


def report_facts(report: Mapping[str, Any] | None) -> dict[str, str]:
    """Return what the head of a file says of a run's report; nothing without one."""
    if report is None:
        return {}
    return {"base_name": base_name(report), "verdict": str(report.get("verdict"))}


def base_name(report: Mapping[str, Any]) -> str:
    """Return the base's hub id, or the last part of its path."""
    origin = str((report.get("base") or {}).get("origin") or "unknown")
    return origin if _is_hub_id(report) else Path(origin).name


def _is_hub_id(report: Mapping[str, Any]) -> bool:
    base = report.get("base") or {}
    return bool(base.get("revision")) and reads_as_hub_id(str(base.get("origin")))


def _front_matter(report: Mapping[str, Any] | None) -> Iterator[str]:
    yield "library_name: transformers"
    yield "pipeline_tag: text-generation"
    yield "tags: [llmtune, fine-tuned]"
    if report is not None and _is_hub_id(report):
        yield f"base_model: {base_name(report)}"


def _results(report: Mapping[str, Any]) -> Iterator[str]:
    verdict = (report.get("decided_by") or {}).get("reasons") or []
    yield f"Fine-tuned from **{base_name(report)}**. Verdict: **{report.get('verdict')}**."
    yield ""
    yield from (f"- {reason}" for reason in verdict)
    yield ""
    yield "## Results"
    yield ""
    yield "The same items, answered by base and tuned model; 95 % interval of the change."
    yield ""
    yield "| suite | role | metric | items | base | tuned | change |"
    yield "|---|---|---|---:|---:|---:|---:|"
    for suite, values in (report.get("suites") or {}).items():
        yield (
            f"| {suite} | {values.get('role')} | {values.get('metric')} | {values.get('n')} | "
            f"{_number(values.get('base'))} | {_number(values.get('tuned'))} | {_change(values)} |"
        )
    yield ""
    caveats = report.get("caveats") or []
    if caveats:
        yield "## Read this too"
        yield ""
        yield from (f"- {caveat}" for caveat in caveats)
        yield ""
    yield from _training(report)


def _training(report: Mapping[str, Any]) -> Iterator[str]:
    config, cost = report.get("config") or {}, report.get("cost") or {}
    adapter = config.get("adapter") or {}
    yield "## Training"
    yield ""
    rank = f", rank {adapter['rank']}" if "rank" in adapter else ""
    yield f"- method: {adapter.get('method')}{rank}"
    quantization = (config.get("model") or {}).get("quantization") or {}
    yield f"- base in: {quantization.get('method', '16 or 32 bits')}"
    yield f"- steps: {cost.get('steps')}, tokens read: {cost.get('tokens')}"
    yield ""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _change(values: Mapping[str, Any]) -> str:
    difference, interval = values.get("difference"), values.get("interval")
    if difference is None:
        return "-"
    if not interval or None in interval:
        return f"{difference:+.3f}"
    return f"{difference:+.3f} [{interval[0]:+.3f}, {interval[1]:+.3f}]"
