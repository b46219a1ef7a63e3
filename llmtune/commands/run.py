"""run, train, eval: the stages of a run."""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from llmtune.commands.options import (
    CONFIG_ARGUMENT,
    FORCE_OPTION,
    ON_OPTION,
    OVERRIDES_ARGUMENT,
    TARGET_ARGUMENT,
    print_result,
    show_progress,
    with_output_options,
)
from llmtune.commands.report import FAIL_IF_OPTION
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


@click.command("run")
@CONFIG_ARGUMENT
@OVERRIDES_ARGUMENT
@click.option(
    "--seeds",
    metavar="N|A,B,C",
    help="Train and judge so many seeds (or these), and give one joint verdict.",
)
@ON_OPTION
@FORCE_OPTION
@FAIL_IF_OPTION
@with_output_options
def run_all(  # noqa: PLR0913 (one argument an option)
    config: Path,
    overrides: tuple[str, ...],
    seeds: str | None,
    on: str | None,
    force: bool,
    fail_if: tuple[str, ...],
    quiet: bool,
    as_json: bool,
) -> None:
    """Train, merge, evaluate, report; skip what is finished.

    CONFIG is a YAML file, or a run directory to continue with.

    \b
      llmtune run configs/quickstart.yaml
      llmtune run configs/quickstart.yaml train.max_steps=20 run_dir=runs/short
      llmtune run configs/quickstart.yaml --force
      llmtune run configs/quickstart.yaml --seeds 3 run_dir=runs/three
      llmtune run configs/quickstart.yaml --fail-if 'general_loss>0.2'
    """
    from llmtune.reporting.budgets import check_budgets, parse_budgets, require_known_names
    from llmtune.reporting.terminal import render_terminal
    from llmtune.runs import pipeline
    from llmtune.runs.evaluate import suite_names
    from llmtune.runs.targets import require_run

    show_progress(quiet)
    loaded = require_run(str(config), overrides)
    budgets = parse_budgets(fail_if)
    if budgets:
        require_known_names(budgets, suite_names(loaded.evaluate))
    if on is not None and seeds is None:
        raise LlmtuneError(f"--on {on}: is for --seeds; one run goes there by: llmtune launch")
    if seeds is not None:
        from llmtune.experiments.fan_out import find_caller
        from llmtune.experiments.seeds import parse_seeds, run_seeds

        chosen = parse_seeds(seeds, loaded.seed)
        report = run_seeds(loaded, chosen, force=force, engine=find_caller(on))
    else:
        report = pipeline.run(loaded, force=force)
    print_result(report.as_json(), as_json, lambda: render_terminal(report))
    logging.getLogger("llmtune").info("report: %s", loaded.run.report_html_path)
    check_budgets(report, budgets)


@click.command()
@CONFIG_ARGUMENT
@OVERRIDES_ARGUMENT
@FORCE_OPTION
@with_output_options
def train(
    config: Path, overrides: tuple[str, ...], force: bool, quiet: bool, as_json: bool
) -> None:
    """Fit the adapter; continues from a checkpoint.

    CONFIG is a YAML file, or a run directory to continue with.

    \b
      llmtune train configs/quickstart.yaml
      llmtune train configs/quickstart.yaml adapter.rank=8 train.learning_rate=1e-4 run_dir=runs/r8
      llmtune train my.yaml data.train='[{path: mine.jsonl}]' run_dir=runs/mine
    """
    from llmtune.runs import pipeline
    from llmtune.runs.targets import require_run

    show_progress(quiet)
    loaded = require_run(str(config), overrides)
    result = pipeline.train(loaded, force=force)
    print_result(
        result,
        as_json,
        lambda: (
            f"adapter saved in {loaded.run.adapter_dir}: {result['steps']} steps, "
            f"{result['tokens']} tokens, last loss {result['final_loss']:.4f}"
        ),
    )


@click.command("eval")
@TARGET_ARGUMENT
@OVERRIDES_ARGUMENT
@click.option("--suite", "suites", multiple=True, help="A suite file or a shipped suite's name.")
@click.option(
    "--rescore", is_flag=True, help="Score a run's kept answers on --suite, asking no model."
)
@with_lm_eval_options
@FORCE_OPTION
@with_output_options
def evaluate(  # noqa: PLR0913 (one argument an option)
    target: str,
    overrides: tuple[str, ...],
    suites: tuple[str, ...],
    rescore: bool,
    harness: dict[str, Any] | None,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Score on the suites of a run, on --suite, or on tasks of lm-evaluation-harness.

    TARGET is a config, a run, an adapter directory or a model.

    \b
      llmtune eval runs/quickstart
      llmtune eval runs/quickstart --suite general
      llmtune eval path/to/model --suite general --json
      llmtune eval runs/quickstart --suite by_other_metric.yaml --rescore
      llmtune eval runs/quickstart --lm-eval my_task --include-path tasks
    """
    from llmtune.reporting.terminal import render_scores

    show_progress(quiet)
    if harness is not None and suites:
        raise LlmtuneError("give --suite or --lm-eval, one at a time")
    if rescore and not suites:
        raise LlmtuneError("--rescore: is for --suite; name the suite with the new metric")
    if harness is not None:
        from llmtune.runs.evaluate import score_lm_eval

        scores = score_lm_eval(target, overrides, **harness)
    elif suites:
        from llmtune.runs.evaluate import score

        # Such scores are printed and not kept, so there is nothing that --force would redo.
        scores = score(target, overrides, suites, rescored=rescore)
    else:
        from llmtune.runs import pipeline
        from llmtune.runs.targets import require_run

        scores = pipeline.evaluate(require_run(target, overrides), force=force)
    print_result(scores, as_json, lambda: render_scores(scores))
