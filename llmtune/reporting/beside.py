"""Scores beside a suite's metric: what they are called, and if they contradict it."""

from dataclasses import dataclass

from llmtune.reporting.suites import SuiteReport

WRITTEN = "written_accuracy"
CUT_OFF = "cut_off"
LABELS = {
    WRITTEN: "Right in the written answer",
    "macro_f1": "Macro-F1",
    "calibration_error": "Calibration error (0 is best)",
    "brier": "Brier score (0 is best)",
    "strict": "Strict: the whole answer is right",
    "lenient": "Lenient: the right answer is in the text",
    CUT_OFF: "Cut off at the longest length",
    "corpus_bleu": "BLEU of all answers",
    "json_valid": "Valid JSON",
    "json_match": "Equal to the right JSON",
    "json_fields": "F1 of the fields",
}
"""The secondary scores that are shown, each a share from 0 to 1 (Brier: to 2)."""

CLEARLY = 0.1
"""Two changes of one suite that differ by more than this disagree."""
SHOWN_CLASSES = 12


@dataclass(frozen=True)
class Disagreement:
    """Two scores of one suite whose changes between the compared arms differ clearly.

    `main` and `beside` are the changes as fractions; `name` is the key of the second score.
    """

    name: str
    main: float
    beside: float
    sentence: str

    @property
    def is_about_writing(self) -> bool:
        """Whether the second score is of what the model writes, the first of the choices given."""
        return self.name == WRITTEN


@dataclass(frozen=True)
class BesideTable:
    """A suite's secondary scores: a value for each arm, and what to say about them."""

    suite: SuiteReport
    arms: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float | None, ...]], ...]
    sentences: tuple[str, ...]
    judged: str = "tuned"
    """The arm that classes and confusion are about: what ships."""
    classes: tuple[dict[str, object], ...] = ()
    """Of each label: n, precision, recall, F1."""
    confusion: tuple[tuple[int, ...], ...] = ()


def secondary_change(suite: SuiteReport, name: str) -> float | None:
    """Return how a secondary score differs between the compared arms; None if not measured."""
    if suite.compared is None:
        return None
    before, after = (suite.arms[arm].also.get(name) for arm in suite.compared)
    return None if before is None or after is None else float(after) - float(before)


def find_disagreements(suite: SuiteReport) -> tuple[Disagreement, ...]:
    """Return where a suite's scores say clearly different things about the same change."""
    found = []
    if suite.change is not None:
        main, written = suite.change.difference, secondary_change(suite, WRITTEN)
        if suite.metric == "accuracy" and written is not None and abs(main - written) > CLEARLY:
            holds = "scoring the choices" if main > written else "reading the written answer"
            sentence = (
                f"The two scores of {suite.name} disagree: the likeliest choice changes by "
                f"{format_points(main)}, the written answer by {format_points(written)}. What is "
                f"said about this suite holds for use by likelihood; the larger gain is in {holds}."
            )
            found.append(Disagreement(WRITTEN, main, written, sentence))
    strict, lenient = secondary_change(suite, "strict"), secondary_change(suite, "lenient")
    if strict is not None and lenient is not None and strict - lenient > CLEARLY:
        sentence = (
            f"Much of what {suite.name} gains is format: the whole answer is right in "
            f"{format_points(strict)}, the right answer is somewhere in the text in "
            f"{format_points(lenient)}. The base often knew the answer and wrote more around it."
        )
        found.append(Disagreement("lenient", strict, lenient, sentence))
    return tuple(found)


def tabulate_beside(suite: SuiteReport) -> BesideTable | None:
    """Return a suite's secondary scores, or None if it has none."""
    arms = tuple(name for name, arm in suite.arms.items() if arm.also)
    if not arms:
        return None
    rows = tuple(
        (label, tuple(suite.arms[arm].also.get(name) for arm in arms))
        for name, label in LABELS.items()
        if any(suite.arms[arm].also.get(name) is not None for arm in arms)
    )
    sentences = tuple(each.sentence for each in find_disagreements(suite))
    judged = suite.compared[1] if suite.compared else arms[-1]
    also = suite.arms[judged].also
    classes = tuple(also.get("classes") or ())
    if len(classes) > SHOWN_CLASSES:
        return BesideTable(suite, arms, rows, sentences, judged)
    confusion = tuple(tuple(row) for row in also.get("confusion") or ())
    return BesideTable(suite, arms, rows, sentences, judged, classes, confusion)


def format_points(fraction: float) -> str:
    """Format a change of a share in percentage points."""
    return f"{100 * fraction:+.1f} points"
