"""Scores of any target on suites or on tasks of lm-evaluation-harness, beside a run's own."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmtune.runs.targets import resolve_target

if TYPE_CHECKING:
    from llmtune.evaluation.scores import Scores


def score(name: str, overrides: Sequence[str], suites: Sequence[str]) -> "Scores":
    """Score a target's arms on `suites`; nothing is kept, a run's own results stay as they are.

    If the target is a run, its `evaluate` section says how items are chosen and intervals made.

    Raises:
        LlmtuneError: a suite or the target cannot be read, or they do not fit each other.
    """
    from llmtune.serving.score import score_target

    target = resolve_target(name, overrides)
    return score_target(target, suites, target.evaluate)


def score_lm_eval(  # noqa: PLR0913 (one argument an option of the harness)
    name: str,
    overrides: Sequence[str],
    tasks: tuple[str, ...],
    *,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    chat_template: bool = False,
    batch_size: int = 8,
    arms: Sequence[str] = (),
) -> "Scores":
    """Run tasks of lm-evaluation-harness on a target; a run keeps them, its next report shows them.

    Args:
        arms: base, tuned, merged; empty is base and tuned, or the model alone.

    Raises:
        LlmtuneError: the harness is not installed, the target has no such arm, or a task cannot
            be run.
    """
    from llmtune.evaluation.lm_eval import LmEvalSettings
    from llmtune.serving import score as serving

    target = resolve_target(name, overrides)
    settings = LmEvalSettings(tasks, include_path, num_fewshot, limit, chat_template, batch_size)
    results_dir = target.results_dir
    return serving.score_lm_eval(
        target, settings, target.evaluate, arms=arms, results_dir=results_dir
    )
