"""Try the report's statistics on made-up results of which the truth is known.

Every result goes the way of a real one: item scores -> `measure_suites` (and `measure_strengths`,
`fit_curve`) -> `decide`. Prints the table of docs/diagnosis.md.

    python scripts/planted_truths.py                        # about half an hour on one core
    python scripts/planted_truths.py --repetitions 50
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from llmtune.evaluation.diagnosis.curve_fit import Measured, fit_curve
from llmtune.evaluation.diagnosis.learning_curve import LearningCurveResult
from llmtune.evaluation.results import ArmResult, ItemScore
from llmtune.evaluation.stats import Resampling
from llmtune.reporting.diagnostics import Diagnostics
from llmtune.reporting.joint import measure_joint_suites
from llmtune.reporting.measure import measure_suites
from llmtune.reporting.sections.strengths import measure_strengths
from llmtune.reporting.suites import SuiteReport, Thresholds
from llmtune.reporting.verdict.caveats import worse_slices
from llmtune.reporting.verdict.evidence import Evidence
from llmtune.reporting.verdict.outcome import Verdict
from llmtune.reporting.verdict.rules import decide

RESAMPLING = Resampling(samples=1000)
NATS, EXACT = "nats_per_token", "exact_match"
Random = np.random.Generator
Arms = dict[str, np.ndarray]


@dataclass(frozen=True)
class Truth:
    """One made-up world: `draw` says of one repetition whether what is counted happened."""

    name: str
    counted: str
    allowed: tuple[float, float]
    draw: Callable[[Random], bool]
    times: int = 1
    """How many times the usual repetitions it takes: more if it is cheap and its bound is near."""


@dataclass(frozen=True)
class Seen:
    """How often it happened."""

    truth: Truth
    share: float
    repetitions: int
    seconds: float

    @property
    def is_allowed(self) -> bool:
        low, high = self.truth.allowed
        return low <= self.share <= high


def try_truth(truth: Truth, repetitions: int, seed: int = 0) -> Seen:
    """Draw a truth so many times."""
    started = time.perf_counter()
    random = np.random.default_rng([seed, *truth.name.encode()])
    share = float(np.mean([truth.draw(random) for _ in range(repetitions)]))
    return Seen(truth, share, repetitions, time.perf_counter() - started)


def iter_truths() -> Iterator[Truth]:
    """Yield every truth of the table."""
    yield from _null_effects()
    yield from _coverages()
    yield from _broken_generals()
    yield from _rescues()
    yield from _prompts()
    yield from _slices()
    yield from _forms()
    yield Truth("flat learning curve, seed noise 0.05", "MORE-DATA", (0, 0.05), _flat_curve)
    yield from _seeds()


def _null_effects() -> Iterator[Truth]:
    def truth(name: str, draw: Callable[[Random], bool]) -> Truth:
        return Truth(f"no effect, {name}", "any SHIP", (0, 0.025), draw, times=4)

    for n in (5, 20, 50, 300):
        yield truth(f"{n} items", lambda r, n=n: _ships([_right_wrong(r, n, 0.0)]))
    for count in (3, 10):
        yield truth(
            f"{count} targets of 100 items",
            lambda r, count=count: _ships([_right_wrong(r, 100, 0.0) for _ in range(count)]),
        )
    for clusters in (3, 5, 8, 12, 20, 40):
        yield truth(
            f"{clusters} clusters of 1 to 12 items",
            lambda r, clusters=clusters: _ships([_clustered(r, clusters, 0.0)]),
        )
    for n in (20, 30, 50, 100):
        yield truth(f"{n} weighted losses", lambda r, n=n: _ships([_loss(r, n, 0.0)]))
        strongly = truth(f"{n} losses of exponential skew", lambda r, n=n: _ships([_skewed(r, n)]))
        yield replace(strongly, times=16)
        yield truth(
            f"{n} losses of lognormal skew",
            lambda r, n=n: _ships([_skewed(r, n, r.lognormal(0, 1, n) - np.exp(0.5))]),
        )
    for count in (3, 10):
        yield truth(
            f"{count} targets of 50 losses of exponential skew",
            lambda r, count=count: _ships([_skewed(r, 50) for _ in range(count)]),
        )
    yield truth(
        "3 targets of 12 clusters", lambda r: _ships([_clustered(r, 12, 0.0) for _ in range(3)])
    )


def _coverages() -> Iterator[Truth]:
    def truth(name: str, effect: float, make: Callable[[Random], "Planted"]) -> Truth:
        def draw(random: Random) -> bool:
            [suite] = measure([make(random)])
            assert suite.change is not None
            return suite.change.low <= effect <= suite.change.high

        return Truth(f"interval, {name}", "covers the truth", (0.93, 0.97), draw, times=2)

    few = truth("20 items of which 4 change", 0.1, lambda r: _right_wrong(r, 20, 0.1))
    yield replace(few, allowed=(0.93, 1.0))
    for n in (20, 50, 300):
        make = lambda r, n=n: _right_wrong(r, n, 0.1, moved=0.4)  # noqa: E731
        yield truth(f"{n} items, 10 points", 0.1, make)
        yield truth(f"{n} losses of exponential skew", 0.0, lambda r, n=n: _skewed(r, n))
        yield truth(f"{n} weighted losses, 0.1 nats", 0.1, lambda r, n=n: _loss(r, n, 0.1))
    for clusters in (8, 12, 20, 40):
        yield truth(
            f"{clusters} clusters of 1 to 12 items, 10 points",
            0.1,
            lambda r, clusters=clusters: _clustered(r, clusters, 0.1),
        )


def _broken_generals() -> Iterator[Truth]:
    for n in (60, 240):
        for others in (0, 4):
            among = " among 5 suites" if others else ""

            def draw(r: Random, n: int = n, others: int = others) -> bool:
                generals = [_right_wrong(r, n, -0.075, role="general", name="broken", moved=0.15)]
                generals += [
                    _right_wrong(r, n, 0.0, role="general", name=f"g{i}", moved=0.15)
                    for i in range(others)
                ]
                return _ships([_gained(r), *generals], names=("SHIP",))

            yield Truth(f"general -7.5 points, {n} items{among}", "SHIP", (0, 0.05), draw)

    def draw_loss(r: Random) -> bool:
        return _ships([_gained(r), _loss(r, 60, 0.3, role="general")], names=("SHIP",))

    yield Truth("general +0.3 nats, 60 passages", "SHIP", (0, 0.05), draw_loss)


def _rescues() -> Iterator[Truth]:
    for n in (60, 240):

        def draw(r: Random, n: int = n) -> bool:
            base, half, full = _levels(r, n, (0.75, 0.675, 0.6))
            general = Planted("g", "general", {"base": base, "tuned": full, "strength-0.5": half})
            return _rescued([_gained_at_half(r, 300, 0.0), general])

        yield Truth(
            f"strength 0.5 still -7.5 points on {n} items", "SHIP at strength", (0, 0.05), draw
        )

    def draw_loss(r: Random) -> bool:
        return _rescued([_gained_at_half(r, 300, 0.0), _prose_at_half(r, 0.3, 0.6)])

    def draw_target(r: Random) -> bool:
        return _rescued([_gained_at_half(r, 100, -0.1), _prose_at_half(r, 0.05, 0.5)])

    yield Truth("strength 0.5 still +0.3 nats", "SHIP at strength", (0, 0.05), draw_loss)
    yield Truth(
        "strength 0.5 loses 10 of 20 points, 100 items", "SHIP at strength", (0, 0.05), draw_target
    )


def _prompts() -> Iterator[Truth]:
    for count in (1, 3, 10):

        def draw(r: Random, count: int = count) -> bool:
            base = (r.random(300) < 0.6).astype(float)
            tuned = _moved(r, base, 0.15, 0.25)
            arms = {"base": base, "tuned": tuned}
            arms |= {f"prompt-{i}": _moved(r, tuned, -0.05, 0.2) for i in range(count)}
            return _ships([Planted("t", "target", arms)], names=("USE-PROMPT",))

        yield Truth(
            f"{count} prompt{'s' * (count > 1)}, tuned 5 points better, 300 items",
            "USE-PROMPT",
            (0, 0.10),
            draw,
        )


def _slices() -> Iterator[Truth]:
    def draw(r: Random) -> bool:
        sizes = np.array([5, 8, 12, 20, 25, 30, 40, 50, 60, 100])
        columns = np.repeat(np.arange(len(sizes)).astype(str), sizes).tolist()
        base = (r.random(len(columns)) < 0.7).astype(float)
        planted = Planted(
            "t", "target", {"base": base, "tuned": _moved(r, base, 0.0, 0.2)}, slices=columns
        )
        return bool(worse_slices(measure([planted])[0], 0.05))

    yield Truth("no effect, ten slices of 5 to 100 items", "a slice lost", (0, 0.05), draw)


def _forms() -> Iterator[Truth]:
    """Whole answers gain 60 points; right ones anywhere in the text stay, fall or gain as much."""

    def truth(name: str, effect: float, n: int, counted: str, say: Callable[[Verdict], bool]):
        def draw(random: Random) -> bool:
            return say(decide(Evidence(measure([_formed(random, n, effect)]))))

        return Truth(
            f"whole answers +60 points, right ones {name}, {n} items", counted, (0, 0.05), draw
        )

    def is_form(verdict: Verdict) -> bool:
        named = ("format only", "as they are written only")
        return any(each in said for said in verdict.carries for each in named)

    def is_ship(verdict: Verdict) -> bool:
        return verdict.name.startswith("SHIP")

    for n in (50, 300):
        yield truth(
            "as before",
            0.0,
            n,
            "not SHIP of format only",
            lambda v: not (is_ship(v) and is_form(v)),
        )
        yield truth("+60", 0.6, n, "format only", is_form)
    yield truth(
        "-10", -0.1, 50, "SHIP that does not say so", lambda v: is_ship(v) and not is_form(v)
    )
    yield truth("-10", -0.1, 300, "any SHIP", is_ship)


def _formed(random: Random, n: int, effect: float) -> "Planted":
    """Return whole answers that gain 60 points; right ones anywhere change by `effect`.

    If both gain as much, the whole answer is what is right before and after.
    """
    chance = 0.2 if effect > 0 else 0.8
    before = (random.random(n) < chance).astype(float)
    after = _moved(random, before, effect, abs(effect) + 0.1)
    arms = {"base": before, "tuned": after}
    holds = dict(arms)
    if effect <= 0:
        is_whole = random.random(n) < 0.6 / (chance + effect)
        arms = {"base": np.zeros(n), "tuned": after * is_whole}
    return Planted("t", "target", arms, EXACT, lenient=holds)


def _flat_curve(random: Random) -> bool:
    items = random.normal(1.0, 0.3, 200)
    points = [
        Measured(rows, items + random.normal(0, 0.05) + random.normal(0, 0.05, 200), np.ones(200))
        for rows in (120, 120, 240, 480, 960)
    ]
    fit = fit_curve(points, seed=int(random.integers(2**31)))
    curve = LearningCurveResult(
        inputs={},
        suite="t",
        metric="accuracy",
        loss_name="loss",
        points=(),
        fit=fit.law,
        score_fit=None,
        refused=fit.refused,
    )
    suites = measure([_right_wrong(random, 100, 0.0)])
    return (
        decide(Evidence(suites, diagnostics=Diagnostics({"learning_curve": curve}))).name
        == "MORE-DATA"
    )


@dataclass(frozen=True)
class Planted:
    """A suite's scores by arm."""

    name: str
    role: str
    arms: Arms
    metric: str = "accuracy"
    weights: np.ndarray | None = None
    clusters: Sequence[str] | None = None
    slices: Sequence[str] | None = None
    lenient: Arms | None = None
    """Whether the right answer is anywhere in the text, if the score is that of whole answers."""


def measure(suites: Sequence[Planted]) -> tuple[SuiteReport, ...]:
    """Return what a report says about the suites."""
    return measure_suites(_results(suites), RESAMPLING)


def _ships(suites: Sequence[Planted], names: Sequence[str] = ()) -> bool:
    """Return whether the verdict is one of these, or any SHIP if none is named."""
    renamed = [
        Planted(**{**vars(suite), "name": f"{place}-{suite.name}"})
        for place, suite in enumerate(suites)
    ]
    verdict = decide(Evidence(measure(renamed))).name
    return verdict in names if names else verdict.startswith("SHIP")


def _rescued(suites: Sequence[Planted]) -> bool:
    thresholds, results = Thresholds(), _results(suites)
    measured = measure_suites(results, RESAMPLING)
    bounds = {s.name: thresholds.general_bound(s.unit) for s in measured if s.role == "general"}
    sweep = measure_strengths(results, bounds, RESAMPLING)
    return decide(Evidence(measured, strengths=sweep)).name.startswith("SHIP at strength")


def _seeds() -> Iterator[Truth]:
    """Several trainings of one recipe: the noise of training is in the interval."""
    for count, noise in ((3, 0.0), (3, 0.05), (3, 0.1), (5, 0.05)):
        name = f"{count} seeds of noise {noise:g}, 200 items"

        def ships(random: Random, count: int = count, noise: float = noise) -> bool:
            suites = _joint(random, count, noise, 0.0)
            return decide(Evidence(suites)).name.startswith("SHIP")

        def covers(random: Random, count: int = count, noise: float = noise) -> bool:
            change = _joint(random, count, noise, 0.1)[0].change
            assert change is not None
            return change.low <= 0.1 <= change.high

        yield Truth(f"no effect, {name}", "any SHIP", (0, 0.025), ships)
        yield Truth(f"interval, {name}", "covers the truth", (0.93, 0.98), covers)


def _joint(random: Random, count: int, noise: float, effect: float) -> tuple[SuiteReport, ...]:
    """Return a suite of 200 items after `count` trainings whose true effects vary by `noise`."""
    base = (random.random(200) < 0.6).astype(float)
    shared, is_shared = random.random(200), random.random((count, 200)) < 0.7
    luck = np.where(is_shared, shared, random.random((count, 200)))
    chances = np.clip(0.6 + effect + random.normal(0, noise, count), 0, 1)
    tuned = (luck < chances[:, None]).astype(float)
    trainings = [_results([Planted("t", "target", {"base": base, "tuned": row})]) for row in tuned]
    return tuple(each.report for each in measure_joint_suites(trainings, RESAMPLING))


def _results(suites: Sequence[Planted]) -> dict[str, dict[str, ArmResult]]:
    return {suite.name: {arm: _result(suite, arm) for arm in suite.arms} for suite in suites}


def _result(suite: Planted, arm: str) -> ArmResult:
    scores = suite.arms[arm]
    weights = np.ones(len(scores)) if suite.weights is None else suite.weights
    items = tuple(
        ItemScore(
            id=f"{suite.name}-{place}",
            score=score,
            prediction=None,
            answer=None,
            cluster=suite.clusters[place] if suite.clusters else None,
            weight=weight,
            slices={"kind": suite.slices[place]} if suite.slices else {},
            details={"strict": score, "lenient": float(suite.lenient[arm][place])}
            if suite.lenient
            else {},
        )
        for place, (score, weight) in enumerate(zip(scores.tolist(), weights.tolist(), strict=True))
    )
    return ArmResult(
        suite=suite.name,
        task="perplexity" if suite.metric == NATS else "choice",
        role=suite.role,
        description="",
        arm=arm,
        metric=suite.metric,
        higher_is_better=suite.metric != NATS,
        n=len(items),
        mean=float(np.average(scores, weights=weights)),
        standard_error=None,
        unparseable=0,
        majority=None,
        chance=None,
        recipe={},
        recipe_hash="",
        model={},
        seconds=0.0,
        items=items,
        also={
            "strict": float(scores.mean()),
            "lenient": float(suite.lenient[arm].mean()),
        }
        if suite.lenient
        else {},
    )


def _moved(random: Random, scores: np.ndarray, effect: float, moved: float) -> np.ndarray:
    """Return right/wrong scores of which a share `moved` changed, with a mean change of `effect`.

    A right one turns wrong and a wrong one right with chances that give these on average.
    """
    right = float(scores.mean())
    up, down = (moved + effect) / 2, (moved - effect) / 2
    chance = np.where(scores == 0, up / max(1 - right, 1e-9), down / max(right, 1e-9))
    return np.where(random.random(len(scores)) < chance, 1 - scores, scores)


def _right_wrong(
    random: Random,
    n: int,
    effect: float,
    *,
    role: str = "target",
    name: str = "t",
    moved: float = 0.2,
) -> Planted:
    """Return a suite whose differences are +1, -1 and 0 with chances that give this effect."""
    up, down = (moved + effect) / 2, (moved - effect) / 2
    change = random.choice([1.0, -1.0, 0.0], size=n, p=[up, down, 1 - up - down])
    kept = (random.random(n) < 0.7).astype(float)
    base = np.where(change > 0, 0.0, np.where(change < 0, 1.0, kept))
    return Planted(name, role, {"base": base, "tuned": base + change})


def _clustered(random: Random, count: int, effect: float) -> Planted:
    """Return right/wrong scores in clusters of 1 to 12 items, at least 20, that move together."""
    sizes = random.integers(1, 13, count)
    while sizes.sum() < 20:
        sizes = sizes + 1
    of_cluster = np.repeat(random.uniform(-0.25, 0.25, count), sizes)
    up, down = (0.45 + effect + of_cluster) / 2, (0.45 - effect - of_cluster) / 2
    drawn = random.random(len(up))
    change = np.where(drawn < up, 1.0, np.where(drawn < up + down, -1.0, 0.0))
    kept = (random.random(len(up)) < 0.7).astype(float)
    base = np.where(change > 0, 0.0, np.where(change < 0, 1.0, kept))
    names = np.repeat(np.arange(count).astype(str), sizes).tolist()
    return Planted("t", "target", {"base": base, "tuned": base + change}, clusters=names)


def _skewed(random: Random, n: int, change: np.ndarray | None = None) -> Planted:
    base = random.normal(3, 0.5, n)
    change = random.exponential(0.3, n) - 0.3 if change is None else change
    return Planted("t", "target", {"base": base, "tuned": base + change}, NATS)


def _loss(random: Random, n: int, rise: float, *, role: str = "target") -> Planted:
    base = random.normal(3, 0.5, n)
    tuned = base + random.normal(rise, 0.3, n)
    weights = random.integers(20, 400, n).astype(float)
    return Planted("prose", role, {"base": base, "tuned": tuned}, NATS, weights)


def _gained(random: Random) -> Planted:
    return _right_wrong(random, 300, 0.2, moved=0.3)


def _levels(random: Random, n: int, levels: Sequence[float]) -> list[np.ndarray]:
    """Return scores whose chances are these, each moved from the one before."""
    scores = [(random.random(n) < levels[0]).astype(float)]
    for before, after in pairwise(levels):
        change = after - before
        scores.append(_moved(random, scores[-1], change, abs(change) + 0.05))
    return scores


def _gained_at_half(random: Random, n: int, behind: float) -> Planted:
    base = (random.random(n) < 0.6).astype(float)
    full = _moved(random, base, 0.2, 0.3)
    half = _moved(random, full, behind, abs(behind) + 0.05)
    return Planted("t", "target", {"base": base, "tuned": full, "strength-0.5": half})


def _prose_at_half(random: Random, half: float, full: float) -> Planted:
    base = random.normal(3, 0.5, 100)
    arms = {
        "base": base,
        "tuned": base + random.normal(full, 0.3, 100),
        "strength-0.5": base + random.normal(half, 0.3, 100),
    }
    return Planted("prose", "general", arms, NATS, random.integers(20, 400, 100).astype(float))


def format_row(seen: Seen) -> str:
    """Return a row of the table."""
    low, high = seen.truth.allowed
    low, high = round(low, 3), round(high, 3)
    allowed = f"{100 * low:g} to {100 * high:g} %" if low else f"at most {100 * high:g} %"
    share = f"{100 * seen.share:.1f} %"
    return (
        f"| {seen.truth.name} | {seen.truth.counted} | {share} | {allowed} | {seen.repetitions} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=2000)
    parser.add_argument("--only", default="", help="truths whose name contains this")
    asked = parser.parse_args()
    print("| truth | counted | seen | allowed | repetitions |")
    print("|---|---|---|---|---|")
    for truth in iter_truths():
        if asked.only in truth.name:
            seen = try_truth(truth, truth.times * asked.repetitions)
            mark = "" if seen.is_allowed else "  <- not allowed"
            print(format_row(seen) + mark, flush=True)


if __name__ == "__main__":
    main()
