"""Scoring any target on any suites: a run's arms, an adapter, or a model alone."""

from collections.abc import Sequence

from llmtune.evaluation.compare import Resampling
from llmtune.evaluation.config import EvaluateConfig
from llmtune.evaluation.run import evaluate_arms, scoring_settings
from llmtune.evaluation.scores import Scores, summarize_scores
from llmtune.evaluation.suite import load_suite
from llmtune.models.config import Loadable
from llmtune.serving.live import load_live


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
