"""What the report says about one suite: its arms, the change and its parts, its slices."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypedDict

from llmtune.evaluation.answer_style import AnswerStyle
from llmtune.evaluation.compare import Comparison
from llmtune.evaluation.main_arms import MainArm
from llmtune.evaluation.stats import LONG_TAIL, LONG_TAIL_FACTOR
from llmtune.evaluation.tasks.base import Ability
from llmtune.evaluation.tasks.config import TASKS
from llmtune.io.fingerprint import JsonObject
from llmtune.models.quantization.config import is_quantized
from llmtune.reporting.numbers import FRACTION, Unit, unit_of_metric

ROLES = ("target", "transfer", "general")
ARM_WORDS = {
    "original": "the original base",
    "base": "the base",
    "tuned": "base + adapter",
    "merged": "the merged model",
}


def place_of(role: str, name: str) -> tuple[int, str]:
    """Return what sorts suites: targets first, unknown roles last, then by name."""
    return (ROLES.index(role) if role in ROLES else len(ROLES), name)


@dataclass(frozen=True)
class Thresholds:
    """What counts as broken; a general change beyond its bound with an interval clear of 0 does.

    `general_drop` is a fraction of 1, `general_loss_rise` in nats/token, `general_bits_rise` in
    bits/byte (0.2 nats/token at about four bytes a token). More than `contaminated_share` of a
    target suite's items among the training rows (exactly, nearly, or by many words in a row) block
    the verdict. A smaller strength is advised if the full one uses up more than `strength_share` of
    a bound. What is at most `as_good_drop` (a fraction of 1) worse than tuning, or at most
    `as_good_share` of tuning's gain, is as good. Open chat is also broken if the
    share of empty and one-word answers rises by `short_answers_rise`, or if answers have less than
    `answer_length` times the words of before, if the share that ends falls by `ended_answers_fall`,
    if of all words less than `distinct_words` times as large a share is distinct, or less than
    `shared_words` times as large a share is in the base's other answers. Merging may
    cost the shares `merging_share` of a target's gain and of a general suite's bound.
    """

    general_drop: float = 0.05
    general_loss_rise: float = 0.2
    general_bits_rise: float = 0.07
    short_answers_rise: float = 0.25
    answer_length: float = 0.5
    ended_answers_fall: float = 0.25
    distinct_words: float = 0.5
    shared_words: float = 0.3
    contaminated_share: float = 0.01
    strength_share: float = 0.5
    merging_share: Mapping[str, float] = field(
        default_factory=lambda: {"target": 0.25, "general": 0.5}
    )
    as_good_drop: float = 0.02
    as_good_share: float = 0.25

    def general_bound(self, unit: Unit) -> float:
        """Return the largest tolerated worsening of a general suite, in its raw unit."""
        bounds = {"nats/token": self.general_loss_rise, "bits/byte": self.general_bits_rise}
        return bounds.get(unit.name, self.general_drop)

    def as_good_margin(self, unit: Unit, gain: float) -> float:
        """Return by how much something may be worse than tuning, which gained so much, raw unit."""
        drop = self.as_good_drop if unit == FRACTION else 0.0
        return max(drop, self.as_good_share * gain)


@dataclass(frozen=True)
class ArmScore:
    """One arm's outcome on a suite; `mean` and `standard_error` in the metric's raw unit.

    `n` is the number of items it answered, `about` its own facts (shots, strength, layer).
    """

    mean: float
    standard_error: float | None = None
    unparseable: int = 0
    seconds: float | None = None
    n: int | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    also: Mapping[str, Any] = field(default_factory=dict)
    """Scores beside the suite's metric."""


@dataclass(frozen=True)
class Change:
    """A paired difference between two arms on the same items, with its interval, raw unit.

    `is_enough`: whether there are items and clusters enough for a claim. `harm_tail`: how skewed
    towards harm the changes of items are.
    """

    difference: float
    low: float
    high: float
    p_value: float
    standard_error: float | None = None
    is_enough: bool = True
    harm_tail: float = 0.0

    @property
    def gain_p(self) -> float:
        """The p-value that a claimed gain is held to: larger if a long tail of harm is likely."""
        factor = LONG_TAIL_FACTOR if self.harm_tail > LONG_TAIL else 1.0
        return min(1.0, factor * self.p_value)

    @classmethod
    def of(cls, found: Comparison) -> "Change":
        """Return a comparison's difference and interval."""
        return cls(
            found.difference,
            found.low,
            found.high,
            found.p_value,
            found.standard_error,
            found.is_enough,
            found.harm_tail,
        )


@dataclass(frozen=True)
class Rival:
    """An arm besides base and tuned, on the items that it has in common with them.

    `over_base` is the arm minus the base, `tuned_over` is tuned minus the arm, and `mde` the
    smallest such difference that `n` items show. `gap_closed`: which share of the arm's lead over
    the base the tuned model closed, for an arm that shows what is possible.
    """

    n: int
    over_base: Change | None
    tuned_over: Change | None
    mde: float | None
    gap_closed: float | None = None


@dataclass(frozen=True)
class CleanChange:
    """The compared arms and their change on the items that are not in the training rows."""

    n: int
    before: float
    after: float
    change: Change


class SliceJson(TypedDict):
    """A slice as report.json holds it."""

    column: str
    value: str
    n: int
    before: float
    after: float
    difference: float
    interval: list[float]
    p_value: float
    holm_p: float


@dataclass(frozen=True)
class SliceReport:
    """The change on the items that share one value of a metadata column."""

    column: str
    value: str
    n: int
    before: float
    after: float
    change: Change
    holm_p: float

    def as_json(self) -> SliceJson:
        """Return the slice as report.json holds it."""
        return {
            "column": self.column,
            "value": self.value,
            "n": self.n,
            "before": self.before,
            "after": self.after,
            "difference": self.change.difference,
            "interval": [self.change.low, self.change.high],
            "p_value": self.change.p_value,
            "holm_p": self.holm_p,
        }


class SuiteJson(TypedDict):
    """A suite as report.json holds it; what was not measured is null."""

    role: str
    task: str
    metric: str
    unit: str
    higher_is_better: bool
    description: str
    n: int
    clusters: int | None
    original: float | None
    base: float | None
    tuned: float | None
    merged: float | None
    compared: list[str] | None
    majority: float | None
    over_majority: JsonObject | None
    lenient: JsonObject | None
    chance: float | None
    difference: float | None
    interval: list[float] | None
    standard_error: float | None
    p_value: float | None
    mcnemar_p: float | None
    mde: float | None
    needed_items: int | None
    gained: int | None
    lost: int | None
    chain: dict[str, JsonObject]
    unparseable: dict[str, int]
    seconds: dict[str, float | None]
    slices: list[SliceJson]
    wide_columns: dict[str, int]
    arms: dict[str, JsonObject]
    clean: JsonObject | None
    trainings: int


@dataclass(frozen=True)
class SuiteReport:
    """One suite: `change` is the second of the `compared` arms minus the first.

    `chain` holds its parts by name (`main_arms.CHAIN`); a part is there if both its arms are.

    `arms` holds every arm that was measured, `rivals` how those beside the main ones
    compare. `majority` is the score of always answering the most frequent right answer, `chance`
    that of guessing; `mde` is the smallest difference that n items show with 80 % power at 5 %.
    """

    name: str
    role: str
    task: str
    metric: str
    higher_is_better: bool
    n: int
    description: str = ""
    clusters: int | None = None
    arms: Mapping[str, ArmScore] = field(default_factory=dict)
    majority: float | None = None
    chance: float | None = None
    change: Change | None = None
    over_majority: Change | None = None
    """What ships minus always giving the most frequent right answer, if that is known by item."""
    lenient: Change | None = None
    """The change in how often the right answer is anywhere in the text, if `change` is about whole
    answers."""
    compared: tuple[MainArm, MainArm] | None = None
    chain: Mapping[str, Change] = field(default_factory=dict)
    mde: float | None = None
    needed_items: int | None = None
    mcnemar_p: float | None = None
    gained: int | None = None
    lost: int | None = None
    slices: tuple[SliceReport, ...] = ()
    wide_columns: Mapping[str, int] = field(default_factory=dict)
    """Slice columns with too many values to break the change down by, and how many they have."""
    rivals: Mapping[str, Rival] = field(default_factory=dict)
    clean: CleanChange | None = None
    trainings: int = 1
    """Over how many trainings of one recipe the changes and their intervals are."""

    @property
    def unit(self) -> Unit:
        """Return how this suite's scores are written."""
        return unit_of_metric(self.metric)

    def score(self, arm: str) -> float | None:
        """Return an arm's mean, or None if the arm was not evaluated."""
        return self.arms[arm].mean if arm in self.arms else None

    @property
    def before(self) -> float | None:
        """The mean of the arm that is compared with: what the user had."""
        return self.score(self.compared[0]) if self.compared else None

    @property
    def after(self) -> float | None:
        """The mean of the arm that is judged: what ships."""
        return self.score(self.compared[1]) if self.compared else None

    @property
    def ability(self) -> Ability:
        """What the suite asks for, if it is a general one."""
        task = TASKS.get(self.task)
        return "knowledge" if task is None else task.ABILITY

    def answers(self, arm: str) -> AnswerStyle | None:
        """Return what an arm's own answers are like; None if the suite has none written."""
        return AnswerStyle.read(self.arms[arm].also) if arm in self.arms else None

    def has_collapsed(self, thresholds: Thresholds, arm: str | None = None) -> bool:
        """Return whether what ships, or an arm, hardly answers, or answers quite differently.

        That is, it does not end, repeats itself, or uses other words than before.
        """
        if self.compared is None:
            return False
        before, after = self.answers(self.compared[0]), self.answers(arm or self.compared[1])
        if before is None or after is None:
            return False
        return (
            after.has_collapsed(
                before, rise=thresholds.short_answers_rise, length=thresholds.answer_length
            )
            or after.runs_on(
                before, fall=thresholds.ended_answers_fall, distinct=thresholds.distinct_words
            )
            or after.speaks_otherwise(before, shared=thresholds.shared_words)
        )

    def gain(self, change: Change) -> tuple[float, float, float]:
        """Return a change and its interval turned so that positive is better."""
        if self.higher_is_better:
            return change.difference, change.low, change.high
        return -change.difference, -change.high, -change.low

    def as_json(self) -> SuiteJson:
        """Return the suite as report.json holds it; what was not measured is null."""
        change = self.change
        return {
            "role": self.role,
            "task": self.task,
            "metric": self.metric,
            "unit": self.unit.name,
            "higher_is_better": self.higher_is_better,
            "description": self.description,
            "n": self.n,
            "clusters": self.clusters,
            "original": self.score("original"),
            "base": self.score("base"),
            "tuned": self.score("tuned"),
            "merged": self.score("merged"),
            "compared": list(self.compared) if self.compared else None,
            "majority": self.majority,
            "over_majority": asdict(self.over_majority) if self.over_majority else None,
            "lenient": asdict(self.lenient) if self.lenient else None,
            "chance": self.chance,
            "difference": change.difference if change else None,
            "interval": [change.low, change.high] if change else None,
            "standard_error": change.standard_error if change else None,
            "p_value": change.p_value if change else None,
            "mcnemar_p": self.mcnemar_p,
            "mde": self.mde,
            "needed_items": self.needed_items,
            "gained": self.gained,
            "lost": self.lost,
            "chain": {name: asdict(part) for name, part in self.chain.items()},
            "unparseable": {name: arm.unparseable for name, arm in self.arms.items()},
            "seconds": {name: arm.seconds for name, arm in self.arms.items()},
            "slices": [each.as_json() for each in self.slices],
            "wide_columns": dict(self.wide_columns),
            "arms": {name: self._arm_as_json(name) for name in self.arms},
            "clean": asdict(self.clean) if self.clean else None,
            "trainings": self.trainings,
        }

    def _arm_as_json(self, name: str) -> JsonObject:
        rival = self.rivals.get(name)
        return asdict(self.arms[name]) | (asdict(rival) if rival else {})


def name_pairs(suites: Sequence[SuiteReport]) -> str:
    """Return which arm is compared with which, in formulas; with suites if they differ."""
    return "; ".join(
        f"{after} minus {before}{where}" for (before, after), where in _list_pairs(suites)
    )


def describe_compared(suites: Sequence[SuiteReport], quantization: str | None) -> str:
    """Return a sentence on what was compared with what, and what that leaves out.

    Args:
        quantization: how the base was quantized in training, none if it was not.
    """
    pairs = _list_pairs(suites)
    if not pairs:
        return ""
    was_quantized = is_quantized(quantization)
    words = ARM_WORDS | ({"base": f"the quantized base ({quantization})"} if was_quantized else {})
    compared = "; ".join(
        f"{words[after]} against {words[before]}{where}" for (before, after), where in pairs
    )
    befores, afters = ({pair[side] for pair, _ in pairs} for side in (0, 1))
    left_out = [
        sentence
        for sentence, is_so in (
            (
                "The original base was not measured: what quantization costs is not counted.",
                was_quantized and "base" in befores,
            ),
            (
                "The merged model was not measured: what merging costs is not counted.",
                "tuned" in afters,
            ),
        )
        if is_so
    ]
    return " ".join([f"Compared: {compared}, on the same items.", *left_out])


def _list_pairs(suites: Sequence[SuiteReport]) -> list[tuple[tuple[MainArm, MainArm], str]]:
    """Return the compared pairs, each once, and on which suites if there are several."""
    named: dict[tuple[MainArm, MainArm], list[str]] = {}
    for suite in suites:
        if suite.compared is not None:
            named.setdefault(suite.compared, []).append(suite.name)
    is_one = len(named) == 1
    return [(pair, "" if is_one else f" on {', '.join(on)}") for pair, on in named.items()]
