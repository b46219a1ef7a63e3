"""What each diagnosis found, in memory and as a JSON file in the run's `diagnostics/`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, TypeVar

from pydantic import TypeAdapter, ValidationError

from llmtune.errors import LlmtuneError
from llmtune.io.fingerprint import hash_json
from llmtune.io.run_dir import atomic_write_json

Interval = tuple[float, float]
DiagnosticT = TypeVar("DiagnosticT", bound="Diagnostic")


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

    @property
    def fingerprint(self) -> str:
        """One hash of all inputs."""
        return hash_json(dict(self.inputs))

    def is_of(self, *, base: str | None, adapter: str | None) -> bool:
        """Return whether this was measured on these models, as far as it depends on them."""
        now = {"base": base, "adapter": adapter}
        return all(self.inputs.get(name, value) == value for name, value in now.items())


@dataclass(frozen=True)
class TextDivergence:
    """KL(base || tuned) in nats a token, and the share of positions with another likeliest token.

    `kl_interval` resamples the texts; None for one text.
    """

    kl: float
    top1_flips: float
    num_tokens: int
    num_texts: int
    kl_interval: Interval | None = None


@dataclass(frozen=True)
class StrengthDivergence:
    """At one strength: on general text and on the task's prompts; None where there is no text."""

    general: TextDivergence | None
    target: TextDivergence | None


@dataclass(frozen=True, kw_only=True)
class DivergenceResult(Diagnostic):
    """How far the tuned model's next-token distributions moved; `by_strength` holds "1.0" too."""

    FILE_NAME: ClassVar[str] = "divergence.json"
    general: TextDivergence | None
    target: TextDivergence | None
    by_strength: dict[str, StrengthDivergence] = field(default_factory=dict)


@dataclass(frozen=True)
class StopCount:
    """How many of `n` greedy answers ended by themselves."""

    stopped: int
    n: int
    mean_new_tokens: float

    @property
    def share(self) -> float:
        return self.stopped / self.n


@dataclass(frozen=True, kw_only=True)
class StopsResult(Diagnostic):
    """Whether generation still stops; `trained_stop_share` of the train rows hold a stop token."""

    FILE_NAME: ClassVar[str] = "stops.json"
    base: StopCount
    tuned: StopCount
    trained_stop_share: float
    max_new_tokens: int


@dataclass(frozen=True)
class ContaminatedItem:
    """A suite item that stands in the train rows; `kind` is the strongest sign found.

    `similarity` is the Jaccard index of a near-duplicate; `shared` the words of a shared n-gram.
    """

    item_id: str
    kind: str
    train_row: str
    similarity: float | None = None
    shared: str | None = None


@dataclass(frozen=True)
class SuiteContamination:
    """Items of one suite found in the train rows. An item counts once: exact, else near, else
    ngram; `item_ids` are all of them."""

    exact: int
    ngram: int
    near: int
    n: int
    item_ids: tuple[str, ...]
    found: tuple[ContaminatedItem, ...] = ()

    @property
    def exact_share(self) -> float:
        return self.exact / self.n

    @property
    def share(self) -> float:
        return len(self.item_ids) / self.n


@dataclass(frozen=True, kw_only=True)
class ContaminationResult(Diagnostic):
    """Train rows found among the suites' items."""

    FILE_NAME: ClassVar[str] = "contamination.json"
    suites: dict[str, SuiteContamination]
    n_train_rows: int


@dataclass(frozen=True)
class TextSet:
    """One side of a shift: how the base finds these texts. Quantiles are 5, 25, 50, 75, 95 %."""

    num_texts: int
    nats_per_token: float
    bits_per_byte: float
    tokens_per_word: float
    length_quantiles: tuple[float, float, float, float, float]


@dataclass(frozen=True)
class PairShift:
    """The second set against the first: `ppl_gap` is first minus second.

    `pad` is the proxy A-distance (0 the same, 2 always told apart), `pad_null` the 95 % quantile of
    the same number for two halves of one set. `mmd` is squared and unbiased, so it may be negative.
    """

    ppl_gap_nats: float
    ppl_gap_bits_per_byte: float
    pad: float
    pad_interval: Interval
    pad_null: float
    mmd: float
    mmd_p: float
    num_first: int
    num_second: int


@dataclass(frozen=True, kw_only=True)
class ShiftResult(Diagnostic):
    """How far apart the sets of texts lie; pairs are named `train-evaluation`, `train-general`."""

    FILE_NAME: ClassVar[str] = "shift.json"
    sets: dict[str, TextSet]
    pairs: dict[str, PairShift]
    layer: int


@dataclass(frozen=True, kw_only=True)
class MemorisationResult(Diagnostic):
    """Gap of held-out and train loss beyond the base's, in nats a token, and membership AUC."""

    FILE_NAME: ClassVar[str] = "memorisation.json"
    gap_nats: float
    gap_interval: Interval
    auc: float
    auc_interval: Interval
    n_train: int
    n_held_out: int


@dataclass(frozen=True)
class ProbeCell:
    """One layer and pooling of the probe's table with its best C and that C's accuracy."""

    layer: int
    pooling: str
    C: float
    cv_accuracy: float


@dataclass(frozen=True, kw_only=True)
class ProbeResult(Diagnostic):
    """The probe's choice by cross-validation on the train rows; `refused` says why there is none.

    `majority` is what the commonest label among the train rows would score; `answered` names the
    suites that it was scored on, as the arm `probe`.
    """

    FILE_NAME: ClassVar[str] = "probe.json"
    table: tuple[ProbeCell, ...]
    chosen: ProbeCell | None
    labels: tuple[str, ...]
    majority: float | None
    train_rows: int
    refused: str | None = None
    answered: tuple[str, ...] = ()


@dataclass(frozen=True)
class CurvePoint:
    """One training of the curve: `loss` is the mean over the `n` items, `score` the suite's."""

    rows: int
    seed: int
    loss: float
    score: float
    n: int


@dataclass(frozen=True)
class Forecast:
    """What the law says at a number of rows, with its interval."""

    rows: int
    loss: float
    interval: Interval


@dataclass(frozen=True)
class PowerLaw:
    """L(n) = E + A n^-beta and what it says of two and four times the rows.

    `gain_at_2n` is L(n) - L(2n) with its interval; `n_need` are the rows at which the law reaches
    `target_loss`, None where it never does or no target was asked for.
    """

    E: float
    A: float
    beta: float
    at_n: Forecast
    at_2n: Forecast
    at_4n: Forecast
    gain_at_2n: float
    gain_interval: Interval
    target_loss: float | None = None
    n_need: float | None = None


@dataclass(frozen=True, kw_only=True)
class LearningCurveResult(Diagnostic):
    """Loss against rows on one suite.

    `fit` is the law of the loss, `score_fit` that of the suite's error (1 - score, or the score
    itself where lower is better). `refused` says why a law is not to be believed; `fit` is then
    None where there were too few points, or the law that shows no gain.
    """

    FILE_NAME: ClassVar[str] = "learning_curve.json"
    suite: str
    metric: str
    loss_name: str
    points: tuple[CurvePoint, ...]
    fit: PowerLaw | None
    score_fit: PowerLaw | None
    refused: str | None


def write_diagnostic(result: Diagnostic, diagnostics_dir: Path) -> Path:
    """Write a result whole or not at all and return its path."""
    path = diagnostics_dir / result.FILE_NAME
    values = TypeAdapter(type(result)).dump_python(result, mode="json")
    atomic_write_json(path, values | {"fingerprint": result.fingerprint})
    return path


def read_diagnostic(kind: type[DiagnosticT], diagnostics_dir: Path) -> DiagnosticT | None:
    """Read what `write_diagnostic` wrote; None where that was not measured.

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
            "and measure again: llmtune report RUN --full"
        ) from None
