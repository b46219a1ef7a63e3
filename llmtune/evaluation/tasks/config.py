"""The tasks that there are: a new one is its file and its entry here."""

from llmtune.evaluation.tasks.base import Metric, SuiteConfig
from llmtune.evaluation.tasks.chat import ChatSuite
from llmtune.evaluation.tasks.choice import ChoiceSuite
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
