"""A model card from a run's report: what was done, and the numbers as they were measured."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.io.json_files import read_json_object
from llmtune.models.hub import reads_as_hub_id
from llmtune.version import __version__

CARD_NAME = "README.md"


@dataclass(frozen=True)
class CardSuite:
    """What a card shows of one suite; a number is None if it was not measured."""

    name: str
    role: str
    metric: str
    num_items: int
    compared: tuple[str, str]
    """The two models, before and after."""
    before: float | None
    after: float | None
    difference: float | None
    interval: tuple[float, float] | None

    @classmethod
    def from_json(cls, name: str, values: Mapping[str, Any]) -> "CardSuite":
        """Take what report.json holds of a suite."""
        before, after = values.get("compared") or ("base", "tuned")
        interval = values.get("interval")
        return cls(
            name,
            str(values.get("role")),
            str(values.get("metric")),
            int(values.get("n") or 0),
            (before, after),
            values.get(before),
            values.get(after),
            values.get("difference"),
            None if not interval or None in interval else (interval[0], interval[1]),
        )

    def row(self) -> str:
        """Return its row of the table."""
        pair = f"{self.compared[0]} to {self.compared[1]}"
        numbers = f"{_number(self.before)} | {_number(self.after)} | {self._change()}"
        return (
            f"| {self.name} | {self.role} | {self.metric} | {self.num_items} | {pair} | {numbers} |"
        )

    def _change(self) -> str:
        if self.difference is None:
            return "-"
        if self.interval is None:
            return f"{self.difference:+.3f}"
        return f"{self.difference:+.3f} [{self.interval[0]:+.3f}, {self.interval[1]:+.3f}]"


@dataclass(frozen=True)
class CardReport:
    """What a card shows of a run's report."""

    verdict: str
    reasons: Sequence[str]
    caveats: Sequence[str]
    base_name: str
    """The base's hub id, or the last part of its path."""
    is_hub_base: bool
    suites: tuple[CardSuite, ...]
    method: str
    rank: int | None
    base_in: str
    base_stored: str | None
    """How the base was stored, and what its weights became, if it was quantized."""
    steps: int | None
    tokens: int | None

    @classmethod
    def from_json(cls, report: Mapping[str, Any]) -> "CardReport":
        """Take what report.json holds; what an older one lacks is left out."""
        base, config = report.get("base") or {}, report.get("config") or {}
        adapter, cost = config.get("adapter") or {}, report.get("cost") or {}
        quantization = (config.get("model") or {}).get("quantization") or {}
        origin = str(base.get("origin") or "unknown")
        is_hub_base = bool(base.get("revision")) and reads_as_hub_id(origin)
        return cls(
            verdict=str(report.get("verdict")),
            reasons=(report.get("decided_by") or {}).get("reasons") or [],
            caveats=report.get("caveats") or [],
            base_name=origin if is_hub_base else Path(origin).name,
            is_hub_base=is_hub_base,
            suites=tuple(
                CardSuite.from_json(name, values)
                for name, values in (report.get("suites") or {}).items()
            ),
            method=str(adapter.get("method")),
            rank=adapter.get("rank"),
            base_in=quantization.get("method", "16 or 32 bits"),
            base_stored=base.get("stored"),
            steps=cost.get("steps"),
            tokens=cost.get("tokens"),
        )

    def facts(self) -> dict[str, str]:
        """Return what the head of a file says of the report."""
        return {"base_name": self.base_name, "verdict": self.verdict}


def read_report(path: Path) -> CardReport | None:
    """Read a run's report.json; None if the run has none yet.

    Raises:
        LlmtuneError: it is not a JSON object.
    """
    if not path.is_file():
        return None
    advice = "write the report again: llmtune report RUN"
    return CardReport.from_json(read_json_object(path, advice=advice))


def render_card(name: str, report: CardReport | None, *, files: Mapping[str, str]) -> str:
    """Return the text of a model card in Markdown, with the front matter the hub reads.

    Paths of this machine do not enter it: a local base is named by its last part.

    Args:
        name: the model's name.
        report: None if there is none: then the card says that nothing was measured.
        files: what each file beside the card is, by its name.
    """
    lines = ["---", *_front_matter(report), "---", "", f"# {name}", "", *card_lines(report)]
    if files:
        lines += ["## Files", "", *(f"- `{file}`: {what}" for file, what in files.items()), ""]
    lines += [f"Made with llmtune {__version__}. The license of the base model applies."]
    return "\n".join(lines) + "\n"


def card_lines(report: CardReport | None) -> Iterator[str]:
    """Yield the lines of a card that a report decides."""
    if report is None:
        yield from ("Nothing was measured of this model by llmtune.", "")
    else:
        yield from _results(report)


def _front_matter(report: CardReport | None) -> Iterator[str]:
    yield "library_name: transformers"
    yield "pipeline_tag: text-generation"
    yield "tags: [llmtune, fine-tuned]"
    if report is not None and report.is_hub_base:
        yield f"base_model: {report.base_name}"


def _results(report: CardReport) -> Iterator[str]:
    yield f"Fine-tuned from **{report.base_name}**. Verdict: **{report.verdict}**."
    yield ""
    yield from (f"- {reason}" for reason in report.reasons)
    yield ""
    yield "## Results"
    yield ""
    yield "The same items, answered by both models; 95 % interval of the change."
    yield ""
    yield "| suite | role | metric | items | models | before | after | change |"
    yield "|---|---|---|---:|---|---:|---:|---:|"
    yield from (suite.row() for suite in report.suites)
    yield ""
    if report.caveats:
        yield "## Read this too"
        yield ""
        yield from (f"- {caveat}" for caveat in report.caveats)
        yield ""
    yield "## Training"
    yield ""
    rank = "" if report.rank is None else f", rank {report.rank}"
    yield f"- method: {report.method}{rank}"
    yield f"- base in: {report.base_in}"
    if report.base_stored:
        yield f"- base was stored: {report.base_stored}, into which the adapter is merged"
    yield f"- steps: {report.steps}, tokens read: {report.tokens}"
    yield ""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
