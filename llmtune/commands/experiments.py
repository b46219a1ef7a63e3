"""learning-curve and sequence: several runs for one question."""

import logging
from pathlib import Path

import click
from rich import box
from rich.table import Table
from rich.text import Text

from llmtune.commands.options import (
    FORCE_OPTION,
    ON_OPTION,
    OVERRIDES_ARGUMENT,
    TARGET_ARGUMENT,
    print_result,
    show_progress,
    with_output_options,
)
from llmtune.errors import CheckFailed
from llmtune.io.run_dir import RunDir


@click.command("learning-curve")
@TARGET_ARGUMENT
@OVERRIDES_ARGUMENT
@click.option("--suite", help="The suite it is measured on (default: the first target suite).")
@click.option("--target-score", type=float, help="Also say how many rows would reach this score.")
@with_output_options
def learning_curve(
    target: str,
    overrides: tuple[str, ...],
    suite: str | None,
    target_score: float | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Train on 1/8, 1/4 and 1/2 of a run's rows and say what 2 and 4 times would give.

    TARGET is a finished run, or its config. Costs about as much as the run's training did; the
    same command continues with what is missing.

    \b
      llmtune learning-curve runs/quickstart
      llmtune learning-curve runs/quickstart --suite movies --target-score 0.95
    """
    from dataclasses import asdict

    from llmtune.experiments.learning_curve import measure_learning_curve
    from llmtune.reporting.terminal import iter_lines
    from llmtune.runs.targets import require_run

    show_progress(quiet)
    loaded = require_run(target, overrides)
    found = measure_learning_curve(loaded, suite=suite, target_score=target_score)
    print_result(asdict(found), as_json, lambda: "\n".join(iter_lines(found)))


@click.command()
@TARGET_ARGUMENT
@click.argument("grid", nargs=-1, required=True, metavar="KEY=A,B...")
@click.option("--dry-run", is_flag=True, help="List the runs, and start none.")
@ON_OPTION
@FORCE_OPTION
@with_output_options
def sweep(  # noqa: PLR0913 (one argument an option)
    target: str,
    grid: tuple[str, ...],
    dry_run: bool,
    on: str | None,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Run a grid of settings, and rank the runs with ties.

    TARGET is a config, or a run. Each KEY=A,B makes a run for every value, in a folder of its own
    below run_dir; KEY=A holds for all. Half of the target suite's items choose the winner and the
    others judge it. A run that fails is named and the rest continue; the same command continues
    with what is missing.

    \b
      llmtune sweep mine.yaml train.learning_rate=1e-4,3e-4 adapter.rank=8,16
      llmtune sweep mine.yaml adapter.rank=4,64 run_dir=runs/ranks --dry-run
      llmtune sweep mine.yaml adapter.rank=4,8,16,64 --on ray
    """
    from llmtune.experiments.fan_out import find_caller
    from llmtune.experiments.sweep import plan_sweep, render_ranking, run_sweep

    show_progress(quiet)
    points = plan_sweep(target, grid)
    if dry_run:
        listed = [
            {"run_dir": str(point.config.run_dir), "settings": dict(point.settings)}
            for point in points
        ]
        lines = (f"{each['run_dir']}" for each in listed)
        print_result(listed, as_json, lambda: "\n".join([*lines, f"{len(points)} runs"]))
        return
    study = run_sweep(points, force=force, engine=find_caller(on))
    print_result(study.as_json(), as_json, lambda: render_ranking(study))
    if study.failed:
        raise click.exceptions.Exit(CheckFailed.exit_code)


@click.command()
@click.argument("configs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Where the runs are kept."
)
@with_output_options
def sequence(configs: tuple[Path, ...], out: Path, quiet: bool, as_json: bool) -> None:
    """Train tasks one after another, and say what is kept of each.

    CONFIGS are two or more YAML files with one base; each adapter continues from the one before.

    \b
      llmtune sequence movies.yaml intents.yaml --out runs/both
      llmtune report runs/both
    """
    from llmtune.config import load_config
    from llmtune.experiments.sequence import train_sequence
    from llmtune.reporting.sections.sequence import SequenceResult

    show_progress(quiet)
    result = train_sequence([load_config(path) for path in configs], out)

    def render(found: SequenceResult) -> Table:
        table = Table(
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            caption_justify="left",
            caption=f"average at the end {found.accuracy:.3f}, backward transfer "
            f"{found.backward_transfer:+.3f} (below 0: forgotten), forward transfer "
            f"{found.forward_transfer:+.3f}",
        )
        table.add_column("score on ->")
        for task in found.tasks:
            table.add_column(Text(task), justify="right")
        table.add_row("untrained", *(f"{score:.3f}" for score in found.untrained))
        for task, row in zip(found.tasks, found.matrix, strict=True):
            table.add_row(Text(f"after {task}"), *(f"{score:.3f}" for score in row))
        return table

    print_result(result.as_json(), as_json, lambda: render(result))
    logging.getLogger("llmtune").info(
        "report of the last task: %s", RunDir(out / result.runs[-1]).report_html_path
    )
