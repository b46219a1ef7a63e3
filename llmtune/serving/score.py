"""Score any target on any suites, or on tasks of lm-evaluation-harness."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmtune.errors import LlmtuneError
from llmtune.evaluation.config import EvaluateConfig
from llmtune.evaluation.lm_eval import LmEvalSettings, run_tasks, suite_name
from llmtune.evaluation.rescore import rescore
from llmtune.evaluation.results import ArmResult, save_arm_result
from llmtune.evaluation.run import evaluate_arms, scoring_settings
from llmtune.evaluation.scores import Scores, summarize_scores
from llmtune.evaluation.stats import Resampling
from llmtune.evaluation.suite import load_suite
from llmtune.models.hardware import release_memory
from llmtune.models.resolve import Loadable
from llmtune.scoring.live import as_arm, load_target

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
    live = load_target(target)
    results = evaluate_arms(
        live,
        loaded_suites,
        arms=tuple(reversed(live.arms)),
        settings=scoring_settings(chosen.token_budget),
    )
    resampling = Resampling(chosen.confidence, chosen.bootstrap_samples, chosen.seed)
    return summarize_scores(results, resampling)


def rescore_kept(results_dir: Path, suites: Sequence[str], chosen: EvaluateConfig) -> Scores:
    """Score the answers that a run keeps on suites that differ in how answers are scored."""
    loaded = [load_suite(each, seed=chosen.seed, limit=chosen.limit) for each in suites]
    results = {suite.name: rescore(results_dir, suite) for suite in loaded}
    resampling = Resampling(chosen.confidence, chosen.bootstrap_samples, chosen.seed)
    return summarize_scores(results, resampling)


def score_lm_eval(
    target: Loadable,
    settings: LmEvalSettings,
    knobs: EvaluateConfig,
    *,
    arms: Sequence[str] = (),
    results_dir: Path | None = None,
) -> Scores:
    """Run tasks on the target's arms; base and tuned are one loaded model.

    Args:
        knobs: how intervals are made.
        results_dir: where the results are kept; a run's next report then shows them.
        arms: base, tuned, merged; empty is base and tuned, or the model alone.

    Raises:
        LlmtuneError: the harness is not installed, the target has no such arm, or a task cannot
            be run.
    """
    chosen = _chosen_arms(target, arms)
    results: dict[str, dict[str, ArmResult]] = {}
    summaries: dict[str, dict[str, Any]] = {}
    for group in _by_loaded_model(chosen):
        live = load_target(target, "tuned" if "tuned" in group else group[0])
        for arm in group:
            with as_arm(live, arm) as scored:
                log.info("lm-eval: %s on %s", ", ".join(settings.tasks), arm)
                run = run_tasks(scored, arm, settings)
            for result in run.results:
                results.setdefault(result.suite, {})[arm] = result
                if results_dir is not None:
                    save_arm_result(result, results_dir)
            summaries[arm] = run.summary
        del live
        release_memory()
    resampling = Resampling(knobs.confidence, knobs.bootstrap_samples, knobs.seed)
    scores = summarize_scores(results, resampling)
    for arm, summary in summaries.items():
        for task, values in summary.items():
            if suite_name(task) in scores:
                scores[suite_name(task)]["arms"][arm]["lm_eval"] = _plain(values)
    return scores


def _chosen_arms(target: Loadable, arms: Sequence[str]) -> tuple[str, ...]:
    missing = [arm for arm in arms if arm not in target.arms]
    if missing:
        raise LlmtuneError(
            f"{target.name}: has no {missing[0]} model; there is: {', '.join(target.arms)}"
        )
    return tuple(arms) or tuple(arm for arm in ("base", "tuned") if arm in target.arms)


def _by_loaded_model(arms: Sequence[str]) -> list[tuple[str, ...]]:
    """Group arms by what must be loaded for them: base and tuned are one model."""
    live = tuple(arm for arm in arms if arm != "merged")
    return [group for group in (live, ("merged",) if "merged" in arms else ()) if group]


def _plain(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the harness's own numbers of a task, `metric,filter` -> value."""
    return {
        key: value
        for key, value in values.items()
        if "," in key
        and isinstance(value, int | float)
        and not key.split(",")[0].endswith("_stderr")
    }
