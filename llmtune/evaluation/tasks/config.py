"""The tasks that there are: a new one is its file and its entry here."""

from collections.abc import Sequence
from pathlib import Path

from llmtune.evaluation.tasks.base import Metric, SuiteConfig
from llmtune.evaluation.tasks.chat import ChatSuite
from llmtune.evaluation.tasks.choice import ChoiceSuite, has_head_starts
from llmtune.evaluation.tasks.exact import ExactSuite
from llmtune.evaluation.tasks.perplexity import PerplexitySuite
from llmtune.evaluation.tasks.reply import ReplySuite

TASKS: dict[str, type[SuiteConfig]] = {
    "chat": ChatSuite,
    "choice": ChoiceSuite,
    "reply": ReplySuite,
    "exact": ExactSuite,
    "perplexity": PerplexitySuite,
}

METRICS: dict[str, Metric] = {
    metric.name: metric for task in TASKS.values() for metric in task.METRICS
}
"""The metrics of all tasks."""


def labelling_task(labels: Sequence[str], items: Path) -> SuiteConfig:
    """Return a task that chooses one of `labels` in answer to each row of a file."""
    return ChoiceSuite(
        task="choice",
        items=items,
        messages="messages",
        choices=tuple(labels),
        end_of_answer=has_head_starts(labels),
        written_tokens=0,
    )


def as_labelling_task(config: SuiteConfig) -> SuiteConfig | None:
    """Return a suite's task without its written answers; None if it has no labels of its own."""
    if not isinstance(config, ChoiceSuite) or config.choices is None:
        return None
    return config.model_copy(update={"written_tokens": 0})
