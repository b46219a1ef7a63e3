"""learning-curve: what more rows would give."""

import click

from llmtune.commands.options import (
    OVERRIDES_ARGUMENT,
    TARGET_ARGUMENT,
    print_result,
    show_progress,
    with_output_options,
)


@click.command("learning-curve")
@TARGET_ARGUMENT
@OVERRIDES_ARGUMENT
@click.option("--suite", help="The suite it is measured on (default: the first target suite).")
@click.option("--target-score", type=float, help="Also say how many rows would reach this score.")
@with_output_options
def learning_curve(  # noqa: PLR0913 (one argument an option)
    target: str,
    overrides: tuple[str, ...],
    suite: str | None,
    target_score: float | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Train on 1/8, 1/4 and 1/2 of a run's rows and say what 2 and 4 times would give.

    TARGET is a finished run, or its config. Costs about as much as the run's training did; the
    same command goes on with what is missing.

    \b
      llmtune learning-curve runs/quickstart
      llmtune learning-curve runs/quickstart --suite movies --target-score 0.95
    """
    from dataclasses import asdict

    from llmtune.experiments.learning_curve import measure_learning_curve
    from llmtune.reporting.curve_lines import curve_lines
    from llmtune.runs.targets import require_run

    show_progress(quiet)
    loaded = require_run(target, overrides)
    found = measure_learning_curve(loaded, suite=suite, target_score=target_score)
    print_result(asdict(found), as_json, lambda: "\n".join(curve_lines(found)))
