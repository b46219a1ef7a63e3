"""report: the page of a run, two runs against each other, and budgets that set the exit code."""

import logging

import click

from llmtune.commands.options import print_result, show_progress, with_output_options
from llmtune.errors import LlmtuneError
from llmtune.io.run_dir import SEEDS_FILE, SWEEP_FILE, RunDir

FAIL_IF_OPTION = click.option(
    "--fail-if",
    "fail_if",
    multiple=True,
    metavar="EXPR",
    help="Exit with 1 if it holds or was not measured, as `general_loss>0.2`; may be repeated.",
)


@click.command()
@click.argument("target")
@click.argument("others", nargs=-1, metavar="[OTHER]...")
@FAIL_IF_OPTION
@click.option(
    "--across",
    multiple=True,
    help="With two runs: what their recipes may differ in (base, precision, template, versions).",
)
@click.option("--quick", "extent", flag_value="quick", help="First measure what is missing of it.")
@click.option("--full", "extent", flag_value="full", help="First measure all that is missing.")
@with_output_options
def report(  # noqa: PLR0913 (one argument an option)
    target: str,
    others: tuple[str, ...],
    fail_if: tuple[str, ...],
    across: tuple[str, ...],
    extent: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Rebuild the report of a run and print its tables, or compare runs.

    TARGET and OTHER are run directories, or their configs. Two runs are compared item by item.
    Three or more of one recipe with other seeds say how much training itself varies; runs that
    differ in other knobs are ranked, with ties. The directory of a sweep gives its ranking.

    \b
      llmtune report runs/quickstart
      llmtune report runs/quickstart --full
      llmtune report runs/quickstart --fail-if 'general_loss>0.2' --fail-if 'target_gain<0.05'
      llmtune report runs/quickstart runs/rank8
      llmtune report runs/quickstart runs/seed1 runs/seed2
    """
    show_progress(quiet)
    if others and (fail_if or extent):
        raise LlmtuneError("--fail-if, --quick and --full are about one run; give one run")
    if across and len(others) != 1:
        raise LlmtuneError("--across is for two runs; give two")
    if len(others) > 1:
        return _rank_or_compare_seeds((target, *others), as_json=as_json)
    if others:
        return _compare(target, others[0], across, as_json=as_json)
    return _rebuild(target, fail_if, extent, as_json=as_json)


def _rebuild(target: str, fail_if: tuple[str, ...], extent: str | None, *, as_json: bool) -> None:
    from llmtune.reporting.budgets import check_budgets, parse_budgets
    from llmtune.reporting.terminal import render_terminal
    from llmtune.runs import pipeline
    from llmtune.runs.targets import find_run_dir, require_run

    budgets = parse_budgets(fail_if)
    if extent is not None:
        pipeline.evaluate(require_run(target, (f"evaluate.extent={extent}",)))
    place = find_run_dir(target)
    if (place / SWEEP_FILE).is_file() and not (place / "manifest.json").is_file():
        from llmtune.experiments.sweep import render_ranking, report_sweep

        if budgets:
            raise LlmtuneError("--fail-if is about one run; give one run of the sweep")
        study = report_sweep(place)
        print_result(study.as_json(), as_json, lambda: render_ranking(study))
        return
    if (place / SEEDS_FILE).is_file() and not (place / "manifest.json").is_file():
        from llmtune.experiments.seeds import report_seeds

        built = report_seeds(place)
    else:
        built = pipeline.report(place)
    print_result(built.as_json(), as_json, lambda: render_terminal(built))
    check_budgets(built, budgets)


def _compare(target: str, other: str, across: tuple[str, ...], *, as_json: bool) -> None:
    from llmtune.experiments.versus import compare_runs, render_versus_table, write_versus
    from llmtune.runs.targets import find_run_dir

    first, second = (RunDir(find_run_dir(name)) for name in (target, other))
    versus = compare_runs(first, second, across=across)
    page = write_versus(versus, first.path)
    print_result(versus.as_json(), as_json, lambda: render_versus_table(versus))
    logging.getLogger("llmtune").info("comparison: %s", page)


def _rank_or_compare_seeds(targets: tuple[str, ...], *, as_json: bool) -> None:
    from llmtune.experiments.sweep import (
        deciding_knobs_of_run,
        differing_knobs,
        rank_runs,
        render_ranking,
    )
    from llmtune.runs.targets import find_run_dir

    paths = [find_run_dir(name) for name in targets]
    knobs = differing_knobs([deciding_knobs_of_run(RunDir(path)) for path in paths])
    if "seed" in knobs or len(set(paths)) < len(paths):
        _compare_seeds(targets, as_json=as_json)
        return
    study = rank_runs(paths)
    print_result(study.as_json(), as_json, lambda: render_ranking(study))


def _compare_seeds(targets: tuple[str, ...], *, as_json: bool) -> None:
    from llmtune.experiments.seeds import (
        compare_seeds,
        open_seed_run,
        write_seeds,
    )
    from llmtune.reporting.terminal import seeds_table
    from llmtune.runs.targets import find_run_dir

    runs = [open_seed_run(find_run_dir(name)) for name in targets]
    study = compare_seeds(runs)
    page = write_seeds(study, runs[0].run.path)
    print_result(study.as_json(), as_json, lambda: seeds_table(study))
    logging.getLogger("llmtune").info("seeds: %s", page)
