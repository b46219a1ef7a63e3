"""The options of `eval` that run tasks of lm-evaluation-harness."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import click

from llmtune.errors import LlmtuneError

Command = TypeVar("Command", bound=Callable[..., Any])

OPTIONS = (
    click.option(
        "--lm-eval",
        "tasks",
        metavar="TASKS",
        help="Tasks of lm-evaluation-harness, comma-separated.",
    ),
    click.option(
        "--include-path",
        type=click.Path(exists=True, file_okay=False),
        help="Directory of task files of your own.",
    ),
    click.option("--num-fewshot", type=click.IntRange(min=0), help="Shots of those tasks."),
    click.option("--limit", type=click.IntRange(min=1), help="Items of each of those tasks."),
    click.option(
        "--chat-template", is_flag=True, help="Ask those tasks through the chat template."
    ),
    click.option(
        "--batch-size", type=click.IntRange(min=1), default=8, help="Rows at once, those tasks."
    ),
    click.option(
        "--arm",
        "arms",
        multiple=True,
        type=click.Choice(["base", "tuned", "merged"]),
        help="Model to run those tasks on; may be repeated.",
    ),
)


def with_lm_eval_options(command: Command) -> Command:
    """Add the options, and hand them over together as `harness`: None without `--lm-eval`."""

    @functools.wraps(command)
    def collected(**values: Any) -> Any:
        tasks, arms = values.pop("tasks"), values.pop("arms")
        names = ("include_path", "num_fewshot", "limit", "chat_template", "batch_size")
        settings = {name: values.pop(name) for name in names}
        if tasks is None:
            defaults = {"chat_template": False, "batch_size": 8}
            given = [name for name in names if settings[name] not in (None, defaults.get(name))]
            if given or arms:
                flag = (given or ["arm"])[0].replace("_", "-")
                raise LlmtuneError(f"--{flag}: is for --lm-eval TASKS; name the tasks as well")
            return command(harness=None, **values)
        chosen = tuple(name.strip() for name in tasks.split(",") if name.strip())
        if not chosen:
            raise LlmtuneError("--lm-eval: names no task; expected TASK or TASK,TASK")
        return command(harness={"tasks": chosen, **settings, "arms": arms}, **values)

    decorated: Any = collected
    for option in reversed(OPTIONS):
        decorated = option(decorated)
    return cast(Command, decorated)
