"""What a diagnosis is: its result and file, when and how it is made, and what it tells a report."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Generic, Literal, Protocol, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from llmtune.errors import LlmtuneError
from llmtune.evaluation.diagnosis.shown import Facts, Section, Writer
from llmtune.io.fingerprint import hash_json
from llmtune.io.run_dir import RunDir, atomic_write_json

if TYPE_CHECKING:
    from llmtune.data.config import DataConfig
    from llmtune.evaluation.config import EvaluateConfig
    from llmtune.evaluation.diagnosis.subject import DiagnosisSettings, Subject
    from llmtune.evaluation.results import ArmResult
    from llmtune.evaluation.tasks.base import Suite
    from llmtune.models.live import LiveModel

Interval = tuple[float, float]
Extent = Literal["none", "quick", "full"]
EXTENTS: tuple[Extent, ...] = ("none", "quick", "full")

QUICK = "llmtune report RUN --quick"
FULL = "llmtune report RUN --full"


@dataclass(frozen=True, kw_only=True)
class Diagnostic:
    """What every file holds besides its numbers: what they were made from.

    `inputs` are hashes by name: `base` and `adapter` as the manifest and the results name them
    (absent where the measurement does not depend on them), `items`, `rows` and settings.
    """

    FILE_NAME: ClassVar[str]
    inputs: Mapping[str, str]
    seconds: float = 0.0
    """What the measurement took."""
    answers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Hashes of the arms' answers that it was made from (`hash_answers`), by suite and arm."""

    @property
    def fingerprint(self) -> str:
        """One hash of all inputs."""
        return hash_json(dict(self.inputs))

    def is_of(self, *, base: str | None, adapter: str | None) -> bool:
        """Return whether this was measured on these models, as far as it depends on them."""
        now = {"base": base, "adapter": adapter}
        return all(self.inputs.get(name, value) == value for name, value in now.items())


DiagnosticT = TypeVar("DiagnosticT", bound=Diagnostic)


@dataclass(frozen=True)
class Planned(Generic[DiagnosticT]):
    """A diagnosis before it is made: `measure` costs `tokens` forward tokens at most.

    `refused` says why it cannot be measured on this run; `measure` then raises that.
    """

    kind: type[DiagnosticT]
    inputs: Mapping[str, str]
    tokens: int
    measure: Callable[[], DiagnosticT]
    refused: str | None = None

    def find(self, diagnostics_dir: Path) -> DiagnosticT | None:
        """Return the result that is there, if it was made from the same inputs."""
        try:
            known = read_diagnostic(self.kind, diagnostics_dir)
        except LlmtuneError:
            return None  # half a file, or one of a different version: it is measured again
        return known if known is not None and dict(known.inputs) == dict(self.inputs) else None


class Given(Protocol):
    """What a diagnosis can be made from: the loaded model, its rows and suites, and settings."""

    knobs: "EvaluateConfig"
    suites: "tuple[Suite, ...]"
    results: "dict[str, dict[str, ArmResult]]"
    run: RunDir
    force: bool

    @property
    def data(self) -> "DataConfig":
        """The run's own rows."""

    @property
    def scored(self) -> "LiveModel":
        """The base with its adapter on, loaded when it is first asked for."""

    @property
    def subject(self) -> "Subject":
        """The loaded model with its rows, prepared when they are first asked for."""

    @property
    def diagnosis_settings(self) -> "DiagnosisSettings":
        """Batches, seed, confidence and progress."""

    @property
    def strengths(self) -> tuple[float, ...]:
        """Other strengths of the adapter that are measured."""

    def keep(self, result: "ArmResult") -> None:
        """Write down what an arm scored on a suite."""


@dataclass(frozen=True)
class Leak:
    """Items of one suite that training has seen, so that their scores prove nothing.

    `ways` says how many were found in which way: in words, and as report.json holds it.
    """

    item_ids: tuple[str, ...]
    n: int
    """How many items the suite has."""
    ways: str
    numbers: Mapping[str, int]

    @property
    def share(self) -> float:
        """The share of the suite's items."""
        return len(self.item_ids) / self.n


@dataclass(frozen=True)
class MoreRows:
    """What twice the training rows would bring on a suite, with the interval of the gain."""

    suite: str
    rows: int
    loss_name: str
    loss_now: float
    loss_then: float
    gain: float
    interval: Interval


@dataclass(frozen=True)
class Alternative:
    """What a diagnosis offers in place of tuning: it answers suites itself, on the bare base.

    A report holds its scores against the tuned model's. If they are as good, the verdict is to use
    it; if it was not measured, a verdict to ship says so.
    """

    arm: str
    """The name of its results."""
    label: str
    """What a table calls it."""
    words: str
    """What a sentence calls it."""
    verdict: str
    """The verdict if it is as good as the tuned model."""
    meaning: str
    """What this verdict says, in one sentence."""
    reason: str
    """Why it is then to be preferred."""
    to_do: str


class Diagnosis(ABC, Generic[DiagnosticT]):
    """One diagnosis; `config.DIAGNOSES` lists them all, in the order of the report."""

    name: ClassVar[str]
    """Its key in the `evaluate` section and in report.json, and its file in `diagnostics/`."""
    former_name: ClassVar[str | None] = None
    """Its key in configs of earlier versions, which are still read."""
    what: ClassVar[str]
    """What a report calls it under "Not measured"."""
    help: ClassVar[str] = ""
    """The help of its key in the `evaluate` section."""
    extent: ClassVar[Extent | None] = None
    """The smallest extent that makes it if its key leaves it to that; None: no evaluation."""
    command: ClassVar[str] = ""
    """What measures it, if no extent does."""
    knobs: ClassVar[type[BaseModel] | None] = None
    """Its own section under its key, if it is made only when that is there."""
    needs_rows: ClassVar[bool] = True
    """Whether it cannot be made without the rows that were trained on."""
    needs_adapter: ClassVar[bool] = True
    """Whether it cannot be made without an adapter to switch off and on."""
    needs_results: ClassVar[bool] = False
    """Whether it is made from what the arms answered, and so after all of them."""
    alternative: ClassVar[Alternative | None] = None
    """What it scores on suites beside its file, if anything."""
    is_about_forgetting: ClassVar[bool] = False
    """Whether its section belongs to what broke, not on its own."""
    guards: ClassVar[str] = ""
    """What a verdict to ship would have to know from it, in words after "whether"."""
    number_names: ClassVar[tuple[str, ...]] = ()
    """What `numbers` names."""
    result: type[DiagnosticT]

    @property
    def measured_by(self) -> str:
        """The command that measures it."""
        return self.command or {"quick": QUICK}.get(str(self.extent), FULL)

    @property
    def is_evaluated(self) -> bool:
        """Whether an evaluation can make it: by extent, or by a section of its own."""
        return self.extent is not None or self.knobs is not None

    def check(self, knobs: "EvaluateConfig", suites: "Sequence[Suite]") -> None:
        """Raise a `LlmtuneError`, before anything is trained, if it is asked for and cannot be."""

    @abstractmethod
    def plan(self, given: Given) -> Planned[DiagnosticT]:
        """Say from which inputs it would be made and at which cost, and how."""

    def answered(self, found: DiagnosticT) -> tuple[str, ...]:
        """Return the suites that the diagnosis scored as its alternative."""
        return ()

    def leaks(self, found: DiagnosticT) -> Mapping[str, Leak]:
        """Return by suite the items that training has seen; too many decide the verdict."""
        return {}

    def more_rows(self, found: DiagnosticT) -> MoreRows | None:
        """Return what more rows would bring; None if the result does not say that."""
        return None

    def refusal(self, found: DiagnosticT) -> str | None:
        """Return why a result holds no numbers; None if it does."""
        return None

    def caveats(self, found: DiagnosticT) -> tuple[str, ...]:
        """Return what a reader must know beside the verdict."""
        return ()

    def foresee(self, data: "DataConfig", suites: "Sequence[Suite]") -> list[str]:
        """Return warnings that can be given before anything is trained."""
        return []

    def is_missing(self, found: DiagnosticT | None, arms: set[str], *, has_choices: bool) -> bool:
        """Return whether a report should say that it was not measured.

        Args:
            arms: the kinds of arms that were scored.
            has_choices: whether a target suite asks for one of given answers.
        """
        return found is None

    @abstractmethod
    def section(self, found: DiagnosticT, facts: Facts) -> Section | None:
        """Return what a report shows of a result."""

    def instead(self, facts: Facts) -> Section | None:
        """Return what can be said about forgetting if it was not measured."""
        return None

    def summary_lines(self, found: DiagnosticT, write: Writer) -> list[str]:
        """Return lines about the distance from the base, for the Markdown report."""
        return []

    def lines(self, found: DiagnosticT) -> Iterator[str]:
        """Yield what a command that measures nothing else prints of a result."""
        yield from ()

    def numbers(self, found: DiagnosticT) -> dict[str, float | None]:
        """Return the numbers that a budget (`--fail-if`) may name."""
        return {}


def refuse(kind: type[DiagnosticT], why: str) -> Planned[DiagnosticT]:
    """Return a diagnosis that cannot be made."""

    def measure() -> DiagnosticT:
        raise LlmtuneError(why)

    return Planned(kind, {}, 0, measure, refused=why)


def write_diagnostic(result: Diagnostic, diagnostics_dir: Path) -> Path:
    """Write a result whole or not at all and return its path."""
    path = diagnostics_dir / result.FILE_NAME
    values = TypeAdapter(type(result)).dump_python(result, mode="json")
    atomic_write_json(path, values | {"fingerprint": result.fingerprint})
    return path


def read_diagnostic(kind: type[DiagnosticT], diagnostics_dir: Path) -> DiagnosticT | None:
    """Read what `write_diagnostic` wrote; None if that was not measured.

    Raises:
        LlmtuneError: the file is there and is not one of this version's.
    """
    path = diagnostics_dir / kind.FILE_NAME
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        return TypeAdapter(kind).validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise LlmtuneError(
            f"{path}: not a {kind.FILE_NAME} of this version ({place}: {first['msg']}); remove it "
            f"and measure again: {FULL}"
        ) from None
