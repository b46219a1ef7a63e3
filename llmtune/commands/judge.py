"""judge: the whole report for an adapter or a model that llmtune did not train."""

import logging
from pathlib import Path

import click

from llmtune.commands.options import (
    FORCE_OPTION,
    print_result,
    show_progress,
    with_output_options,
)
from llmtune.commands.report import FAIL_IF_OPTION


@click.command()
@click.argument("target")
@click.argument("words", nargs=-1, metavar="[SUITE]... [KEY.PATH=VALUE]...")
@click.option("--base", help="The model it was made from (default: what the adapter names).")
@click.option(
    "--suites",
    "suites",
    multiple=True,
    metavar="SUITE...",
    help="Suite files, or names of shipped suites.",
)
@click.option(
    "--merged",
    type=click.Path(path_type=Path),
    help="The adapter merged into its base by another tool; otherwise it is merged here.",
)
@click.option("--no-merge", is_flag=True, help="Judge base + adapter alone, without a merge.")
@click.option(
    "--quantization",
    metavar="METHOD",
    help="How the base was quantized in training, as model.quantization.method.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Where the judgment is kept (default: runs/NAME-judged).",
)
@FAIL_IF_OPTION
@FORCE_OPTION
@with_output_options
def judge(  # noqa: PLR0913 (one argument an option)
    target: str,
    words: tuple[str, ...],
    base: str | None,
    suites: tuple[str, ...],
    merged: Path | None,
    no_merge: bool,
    quantization: str | None,
    out: Path | None,
    fail_if: tuple[str, ...],
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Judge an adapter or a model that any tool made.

    TARGET is a PEFT adapter, a whole model, a hub id of either, or an earlier judgment. What is
    finished is skipped. An adapter is compared with its base in every form it has (original,
    quantized, tuned, merged), a whole model with --base.

    \b
      llmtune judge out/adapter --suites mine.yaml general chat
      llmtune judge out/adapter --base models/base --quantization nf4 --suites mine.yaml
      llmtune judge out/model --base models/base --suites mine.yaml --fail-if 'general_drop>0.05'
      llmtune judge runs/out-judged evaluate.extent=full data.train='[{path: train.jsonl}]'
    """
    from llmtune.reporting.budgets import check_budgets, parse_budgets, require_known_names
    from llmtune.reporting.terminal import render_terminal
    from llmtune.runs.evaluate import suite_names
    from llmtune.runs.judge import Asked, prepare_judgment
    from llmtune.runs.judge import judge as judge_it

    show_progress(quiet)
    budgets = parse_budgets(fail_if)
    named = [name for given in suites for name in given.split(",")]
    asked = Asked(
        name=target,
        base=base,
        suites=[*named, *(word for word in words if "=" not in word)],
        merged=merged,
        is_merged=not no_merge,
        quantization=quantization,
        out=out,
        overrides=[word for word in words if "=" in word],
    )
    judgment = prepare_judgment(asked)
    if budgets:
        require_known_names(budgets, suite_names(judgment.evaluate))
    report = judge_it(judgment, force=force)
    print_result(report.as_json(), as_json, lambda: render_terminal(report))
    logging.getLogger("llmtune").info("report: %s", judgment.as_run().run.report_html_path)
    check_budgets(report, budgets)
