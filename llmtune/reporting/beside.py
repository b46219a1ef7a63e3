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

SAME = 1e-6
CLEARLY = 0.1
"""Two changes of one suite that differ by more than this disagree."""
SHOWN_CLASSES = 12


@dataclass(frozen=True)
class Disagreement:
    """Two scores of one suite whose changes between the compared arms differ clearly.

    `main` and `beside` are the changes as fractions; `name` is the key of the second score.
    `carried` is what a verdict to ship says of it in its headline; empty if it holds all the more.
    """

    name: str
    main: float
    beside: float
    sentence: str
    carried: str


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
    return tuple(filter(None, (_compare_with_written(suite), _compare_with_lenient(suite))))


def _compare_with_written(suite: SuiteReport) -> Disagreement | None:
    """Compare the likeliest choice with the one that the model writes."""
    written = secondary_change(suite, WRITTEN)
    if suite.change is None or suite.metric != "accuracy" or written is None:
        return None
    main = suite.change.difference
    if abs(main - written) <= CLEARLY:
        return None
    holds = "scoring the choices" if main > written else "reading the written answer"
    sentence = (
        f"The two scores of {suite.name} disagree: the likeliest choice changes by "
        f"{format_points(main)}, the written answer by {format_points(written)}. What is "
        f"said about this suite holds for use by likelihood; the larger gain is in {holds}."
    )
    carried = (
        f"on {suite.name} it holds for ranking the choices ({format_points(main)}); written "
        f"answers change by {format_points(written)}"
    )
    return Disagreement(WRITTEN, main, written, sentence, carried if main > written else "")


def _compare_with_lenient(suite: SuiteReport) -> Disagreement | None:
    """Compare whole answers with right answers anywhere in the text: what is gained is a form."""
    strict, lenient = secondary_change(suite, "strict"), secondary_change(suite, "lenient")
    if strict is None or lenient is None:
        return None
    whole = f"whole answers {format_points(strict)}"
    anywhere = f"right answers anywhere in the text {format_points(lenient)}"
    found = suite.lenient or suite.change  # the suite's own score may be that of the text
    if found is not None and abs(found.difference - lenient) <= SAME:
        anywhere += f" {suite.unit.interval(found.low, found.high)}"
    if has_fewer_answers(suite):
        sentence = (
            f"What {suite.name} gains holds for whole answers as they are written, and right "
            f"answers are lost ({whole}, {anywhere}). If you can take the answer out of the text, "
            "the model before is the better one."
        )
        carried = (
            f"on {suite.name} it holds for whole answers as they are written only ({whole}, "
            f"{anywhere}): with the answer taken out of its text the model before is better"
        )
    elif is_format_only(suite):
        sentence = (
            f"{suite.name} has a format-only gain: the whole answer is right in "
            f"{format_points(strict)}, and more right answers are not shown ({anywhere}). The "
            "model before knew as much and wrote more around it."
        )
        carried = (
            f"the gain on {suite.name} is one of format only ({whole}, {anywhere}): with the "
            "answer taken out of its text the model before may be as good"
        )
    elif strict - lenient > CLEARLY and _has_gained_whole_answers(suite, strict):
        sentence = (
            f"Much of what {suite.name} gains is format: the whole answer is right in "
            f"{format_points(strict)}, the right answer is somewhere in the text in "
            f"{format_points(lenient)}. The base often knew the answer and wrote more around it."
        )
        carried = f"much of the gain on {suite.name} is format ({whole}, {anywhere})"
    else:
        return None
    return Disagreement("lenient", strict, lenient, sentence, carried)


def _has_gained_whole_answers(suite: SuiteReport, strict: float) -> bool:
    """Return whether whole answers gained: clear of 0 if there is an interval of them."""
    if suite.lenient is None or suite.change is None:
        return strict > 0
    return suite.gain(suite.change)[1] > 0


def has_fewer_answers(suite: SuiteReport) -> bool:
    """Return whether whole answers gained and right ones were lost, both clear of 0."""
    if suite.lenient is None or suite.change is None:
        return False
    return suite.gain(suite.change)[1] > 0 and suite.gain(suite.lenient)[2] < 0


def is_format_only(suite: SuiteReport) -> bool:
    """Return whether whole answers gained clear of 0 and right answers in the text did not.

    They were also measured to gain less than half as much, so that a gain of both that few items
    cannot show is not called one of format. A suite that finds answers in the text itself (by
    `contains` or `extract`) has no interval of whole answers: they must have gained clearly.
    """
    if suite.change is None:
        return False
    if suite.lenient is not None:
        gain, low, _ = suite.gain(suite.change)
        more, from_, _ = suite.gain(suite.lenient)
        return low > 0 and from_ <= 0 and more < gain / 2
    strict = secondary_change(suite, "strict") or 0.0
    more, from_, _ = suite.gain(suite.change)
    return strict - more > CLEARLY and from_ <= 0 and more < strict / 2


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
