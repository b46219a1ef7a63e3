"""Scoring by a new metric what models wrote for an older one, without asking them again."""

from dataclasses import replace
from pathlib import Path

from llmtune.errors import LlmtuneError
from llmtune.evaluation.main_arms import MAIN_ARMS
from llmtune.evaluation.results import ArmResult, Recipe, read_arm_result
from llmtune.evaluation.run import NOT_SCORING, summarize_items
from llmtune.evaluation.tasks.base import PromptedSuite, Suite

READS_ANSWERS = frozenset({"metric", "normalize", "extract", "answer_schema"})
"""Keys of a suite that say how a written answer is scored, and not how it is asked for."""


def rescore(results_dir: Path, suite: Suite) -> dict[str, ArmResult]:
    """Return what each arm's kept answers score by a suite that asks the same items the same way.

    Raises:
        LlmtuneError: the suite scores no texts, or no answers to its items are kept.
    """
    config = suite.config
    if not suite.asks or not isinstance(config, PromptedSuite):
        raise LlmtuneError(f"suite {suite.name}: {suite.task} scores no written answers")
    config.require_text_metric(suite.name)
    asked = _asking(config.model_dump(mode="json", exclude=NOT_SCORING))
    found: dict[str, ArmResult] = {}
    for path in sorted(results_dir.glob("*.json")):
        kept = read_arm_result(path)
        is_same = kept.recipe.get("items") == suite.items_fingerprint
        if kept.arm not in MAIN_ARMS or not is_same or _asking(kept.recipe.get("scoring")) != asked:
            continue
        items = {item.id: item for item in suite.items}
        scores = [
            replace(config.score_text(items[one.id], one.prediction or ""), cluster=one.cluster)
            for one in kept.items
            if one.id in items
        ]
        recipe: Recipe = {**kept.recipe, "scoring": config.model_dump(mode="json")}
        found[kept.arm] = summarize_items(
            suite, kept.arm, scores, recipe=recipe, model=kept.model, seconds=0.0
        )
    if not found:
        raise LlmtuneError(
            f"suite {suite.name}: {results_dir} keeps no answers to these items, asked so; only "
            "metric, normalize, extract and answer_schema may differ. Without --rescore the "
            "models are asked"
        )
    return found


def _asking(scoring: object) -> object:
    if not isinstance(scoring, dict):
        return None
    return {key: value for key, value in scoring.items() if key not in READS_ANSWERS}
