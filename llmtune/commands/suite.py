"""suite: a first suite from rows, and what is wrong with one."""

from dataclasses import asdict
from pathlib import Path

import click

from llmtune.commands.options import (
    COLUMNS_OPTION,
    Uncut,
    print_result,
    show_progress,
    with_output_options,
)
from llmtune.data.init_job import JOBS, JobName


@click.group("suite", cls=Uncut)
def suite_group() -> None:
    """Write a suite for your rows, or check one."""


@suite_group.command("new")
@click.argument("data")
@click.option("--base", help="The base model; one without a chat template is asked in plain text.")
@click.option("--out", type=click.Path(path_type=Path), help="The suite (DATA_suite.yaml).")
@click.option("--task", type=click.Choice(JOBS), help="What is asked; else it is guessed.")
@click.option("--format", help="What the rows are; else it is guessed.")
@COLUMNS_OPTION
@click.option("--force", is_flag=True, help="Replace the files that are written.")
@with_output_options
def suite_new(  # noqa: PLR0913 (one argument an option)
    data: str,
    base: str | None,
    out: Path | None,
    task: JobName | None,
    format: str | None,
    columns: dict[str, str],
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write a suite that asks all rows of DATA, at most 300; nothing of them should be trained on.

    DATA is a file, a directory, a glob or a hub id.

    \b
      llmtune suite new test.jsonl
      llmtune suite new test.csv --columns text=utterance,label=intent --out intents.yaml
    """
    from llmtune.data.init import Asked
    from llmtune.runs.rows import draft_eval_suite

    show_progress(quiet)
    out = out or Path(f"{Path(data).name.partition('.')[0]}_suite.yaml")
    asked = Asked(format=format, columns=columns, task=task)
    written = draft_eval_suite(data, out, base=base, asked=asked, force=force)
    print_result(written.as_json(), as_json, written.describe)


@suite_group.command("check")
@click.argument("suites", nargs=-1, required=True)
@click.option("--base", help="A model; with it items are rendered and their length is checked.")
@with_output_options
def suite_check(suites: tuple[str, ...], base: str | None, quiet: bool, as_json: bool) -> None:
    """Read suites with all their items, and say what they ask.

    SUITES are files, or names of shipped ones. Exit code 2 if one cannot be used.

    \b
      llmtune suite check mine_suite.yaml
      llmtune suite check mine_suite.yaml general --base models/SmolLM2-135M-Instruct.Q4_1.gguf
    """
    from llmtune.runs.rows import check_suites

    show_progress(quiet)
    found = check_suites(suites, base)
    lines = [each.describe() for each in found]
    print_result([asdict(each) for each in found], as_json, lambda: "\n".join(lines))
