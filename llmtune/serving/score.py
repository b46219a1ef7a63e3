"""Scoring any target on any suites: a run's arms, an adapter, or a model alone."""

import logging
import time
from collections.abc import Sequence

from llmtune.evaluation.compare import Resampling
from llmtune.evaluation.config import EvaluateConfig
from llmtune.evaluation.run import Progress, ScoringSettings, evaluate_arms
from llmtune.evaluation.scores import Scores, summarize_scores
from llmtune.evaluation.suite import load_suite
from llmtune.models.config import Loadable
from llmtune.serving.live import load_live

log = logging.getLogger("llmtune")


def score_target(target: Loadable, suites: Sequence[str], chosen: EvaluateConfig) -> Scores:
    """Score the target's arms on `suites`: base and tuned with an adapter, else the model alone.

    Nothing is kept on disk; a run's own results and its report stay as they are.

    Args:
        chosen: how items are chosen and intervals are made.

    Raises:
        LlmtuneError: a suite or the target cannot be read or does not fit the other.
    """
    loaded_suites = [load_suite(each, seed=chosen.seed, limit=chosen.limit) for each in suites]
    live = load_live(target)
    results = evaluate_arms(
        live.scored,
        loaded_suites,
        arms=tuple(reversed(live.arms)),
        settings=scoring_settings(chosen),
    )
    resampling = Resampling(chosen.confidence, chosen.bootstrap_samples, chosen.seed)
    return summarize_scores(results, resampling)


def scoring_settings(config: EvaluateConfig) -> ScoringSettings:
    """Return how items are scored, with progress to the log."""
    budget = config.token_budget
    return ScoringSettings(
        token_budget=None if budget == "auto" else budget, on_progress=ProgressLog()
    )


class ProgressLog:
    """Says how far a suite is when it begins, every few seconds, and when it ends."""

    interval_seconds = 10.0

    def __init__(self) -> None:
        self._last = 0.0

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if progress.done == progress.total or now - self._last >= self.interval_seconds:
            self._last = now
            log.info(
                "evaluate: %s, %s: %d of %d items",
                progress.suite,
                progress.arm,
                progress.done,
                progress.total,
            )
