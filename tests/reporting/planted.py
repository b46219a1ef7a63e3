"""Run directories with planted numbers, written by the very functions that a real run uses."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmtune.evaluation.results import ArmResult, ItemScore, save_arm_result
from llmtune.io.manifest import Manifest
from llmtune.io.run_dir import RunDir, atomic_write_json, atomic_write_text

SAMPLES = 1000


@dataclass(frozen=True)
class PlantedSuite:
    """Scores item by item for each arm; `clusters` and `slices` name a group per item.

    `ids` names the items of an arm that answers other than all of them; `choices` makes every item
    one with these choices, of which the first is right, and log-likelihoods that fit the scores.
    """

    name: str
    role: str
    arms: Mapping[str, Sequence[float]]
    metric: str = "accuracy"
    majority: float | None = None
    weights: Sequence[float] | None = None
    clusters: Sequence[str] | None = None
    slices: Sequence[dict[str, str]] | None = None
    unparsed: dict[str, int] | None = None
    about: dict[str, dict] | None = None
    ids: dict[str, Sequence[str]] | None = None
    choices: tuple[str, ...] | None = None
    answers: Sequence[str] | None = None
    """The right answer of each item."""
    lenient: Mapping[str, Sequence[float]] | None = None
    """Of each arm: whether its answer to an item holds the right one somewhere."""


def plant_run(
    path: Path, suites: Sequence[PlantedSuite] = (), *, manifest: Manifest | None = None
) -> RunDir:
    """Write a run directory: every suite's results, and the manifest (evaluated, if it is not)."""
    run = RunDir(path)
    config = {"run_dir": str(path), "evaluate": {"bootstrap_samples": SAMPLES}}
    made = {suite.name: dict.fromkeys(suite.arms, 0.0) for suite in suites}
    manifest = manifest or Manifest(config=config)
    if suites:
        evaluated: dict[str, Any] = {"evaluate": {"finished": "now", "result": {"suites": made}}}
        manifest = replace(manifest, stages={**evaluated, **manifest.stages})
    manifest.save(run)
    for suite in suites:
        for arm in suite.arms:
            save_arm_result(_result(suite, arm), run.evaluations_dir)
    return run


def right_wrong(n: int, right: float, seed: int) -> list[float]:
    """Return n scores of 0 and 1 of which a share `right` (rounded) are 1, in a seeded order."""
    ones = round(n * right)
    scores = [1.0] * ones + [0.0] * (n - ones)
    random.Random(seed).shuffle(scores)
    return scores


def improve(scores: Sequence[float], share: float, seed: int) -> list[float]:
    """Return the scores with a share of all items turned from wrong to right, if there are any."""
    wrong = [index for index, score in enumerate(scores) if score == 0]
    chosen = set(random.Random(seed).sample(wrong, min(len(wrong), round(len(scores) * share))))
    return [1.0 if index in chosen else score for index, score in enumerate(scores)]


def worsen(scores: Sequence[float], share: float, seed: int) -> list[float]:
    """Return the scores with a share of all items turned from right to wrong."""
    return [1.0 - score for score in improve([1.0 - score for score in scores], share, seed)]


def plant_log(run: RunDir, losses: Sequence[float], evaluated: dict[int, float]) -> None:
    """Write metrics.jsonl with one training line a step and lines of evaluation between them."""
    lines = []
    for step, loss in enumerate(losses, start=1):
        lines.append({"step": step, "loss": loss, "learning_rate": 3e-4})
        if step in evaluated:
            lines.append({"step": step, "eval_loss": evaluated[step], "eval_tokens": 100})
    atomic_write_text(run.metrics_path, "".join(json.dumps(line) + "\n" for line in lines))


def plant_generations(run: RunDir, rows: Sequence[dict]) -> None:
    """Write generations.json."""
    atomic_write_json(run.generations_path, list(rows))


def _result(suite: PlantedSuite, arm: str) -> ArmResult:
    scores = suite.arms[arm]
    weights = suite.weights or [1.0] * len(scores)
    unparsed = (suite.unparsed or {}).get(arm, 0)
    ids = (suite.ids or {}).get(arm) or item_ids(suite.name, len(scores))
    items = tuple(
        ItemScore(
            id=ids[index],
            score=float(score),
            prediction=None,
            answer=_answer(suite, index),
            cluster=suite.clusters[index] if suite.clusters else None,
            weight=weights[index],
            parsed=index >= unparsed,
            slices=suite.slices[index] if suite.slices else {},
            details=_details(suite, arm, index),
        )
        for index, score in enumerate(scores)
    )
    return ArmResult(
        suite=suite.name,
        task="perplexity" if suite.metric.endswith(("token", "byte")) else "choice",
        role=suite.role,
        description=f"planted {suite.name}",
        arm=arm,
        metric=suite.metric,
        higher_is_better=not suite.metric.endswith(("token", "byte")),
        n=len(items),
        mean=sum(w * s for w, s in zip(weights, scores, strict=True)) / sum(weights),
        standard_error=None,
        unparseable=unparsed,
        majority=suite.majority,
        chance=None,
        recipe={
            "num_items": len(next(iter(suite.arms.values()))),
            "scoring": {"choices": suite.choices},
            "base": "merged" if arm == "merged" else "original",
            "precision": {"dtype": "bfloat16" if arm == "merged" else "nf4"},
        },
        recipe_hash="0" * 64,
        model={"arm": arm},
        seconds=1.5,
        items=items,
        about=(suite.about or {}).get(arm, {}),
        also=_also(suite, arm),
    )


def _details(suite: PlantedSuite, arm: str, index: int) -> dict[str, Any]:
    score = suite.arms[arm][index]
    if suite.lenient:
        return {"strict": score, "lenient": suite.lenient[arm][index]}
    return {"log_likelihoods": [score - 1.5, -1.0]} if suite.choices else {}


def _also(suite: PlantedSuite, arm: str) -> dict[str, float]:
    if not suite.lenient:
        return {}
    kept = {"strict": suite.arms[arm], "lenient": suite.lenient[arm]}
    return {name: sum(scores) / len(scores) for name, scores in kept.items()}


def _answer(suite: PlantedSuite, index: int) -> str | None:
    if suite.answers:
        return suite.answers[index]
    return suite.choices[0] if suite.choices else None


def item_ids(suite: str, n: int) -> list[str]:
    """Return the ids that a planted suite of n items has."""
    return [f"{suite}-{index}" for index in range(n)]
