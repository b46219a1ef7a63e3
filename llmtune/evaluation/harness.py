"""What is asked of lm-evaluation-harness, and how its results are named among the suites."""

from dataclasses import dataclass

HARNESS_TASK = "lm-eval"
"""The `task` of a result that lm-evaluation-harness made."""


@dataclass(frozen=True)
class HarnessSettings:
    """Tasks of lm-evaluation-harness and how they are run.

    `limit` is the number of items of each task; `num_fewshot` None takes each task's own number;
    `role` says where the report puts the results.
    """

    tasks: tuple[str, ...]
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    chat_template: bool = False
    batch_size: int = 8
    role: str = "general"


def suite_name(task: str) -> str:
    """Return the name under which a task's results are kept: `lm_eval_<task>`."""
    return f"lm_eval_{task.replace('/', '_')}"
