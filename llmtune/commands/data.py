"""init and data: from a file of rows to a config, and what is wrong with the rows."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmtune.commands.options import (
    COLUMNS_OPTION,
    CONFIG_ARGUMENT,
    OVERRIDES_ARGUMENT,
    Uncut,
    print_result,
    show_progress,
    stdout,
    with_output_options,
)
from llmtune.data.init_job import JOBS, JobName
from llmtune.data.init_suite import NoSuite
from llmtune.data.problems import name_first
from llmtune.errors import CheckFailed, LlmtuneError
from llmtune.io.run_dir import atomic_write_text

if TYPE_CHECKING:
    from llmtune.runs.rows import Draft

SHOWN_LEFT_OUT = 5


@click.command()
@click.argument("data")
@click.option("--base", help="The base model; with it lengths are counted in its tokens.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The config to write (llmtune.yaml); with --eval the suite (DATA_suite.yaml).",
)
@click.option("--eval", "is_eval", is_flag=True, help="Write a suite of all rows and no config.")
@click.option("--task", type=click.Choice(JOBS), help="What is to be learned; else it is guessed.")
@click.option("--format", help="What the rows are: messages, instruction, ...; else it is guessed.")
@COLUMNS_OPTION
@click.option("--ignore", multiple=True, metavar="COLUMN", help="A column to leave out.")
@click.option("--labels", help="Names of the labels 0, 1, ...: sadness,joy,love.")
@click.option("--test", help="A file of rows that the suite asks, in place of held-out ones.")
@click.option("--quantize", is_flag=True, help="Train on a base of 4 bits, though it would fit.")
@click.option("--force", is_flag=True, help="Replace the files that are written.")
@with_output_options
def init(  # noqa: PLR0913 (one argument an option)
    data: str,
    base: str | None,
    out: Path | None,
    is_eval: bool,
    task: JobName | None,
    format: str | None,
    columns: dict[str, str],
    ignore: tuple[str, ...],
    labels: str | None,
    test: str | None,
    quantize: bool,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Look at your rows and write a commented config and a suite for them.

    DATA is a file, a directory, a glob or a hub id: labeled texts, texts with JSON, chats,
    questions with answers, or documents. The suite asks the task itself on rows that the config
    holds out; without one a run ends without a verdict.

    \b
      llmtune init train.jsonl --base models/SmolLM2-135M-Instruct.Q4_1.gguf
      llmtune init train.csv --columns text=utterance,label=intent --test test.csv
      llmtune init train.jsonl --out my.yaml --force
      llmtune init math.csv --format instruction --columns instruction=problem,output=solution
      llmtune init test.jsonl --eval
    """
    from llmtune.data.init import Asked
    from llmtune.runs.rows import DEFAULT_OUT, draft_config, draft_eval_suite

    show_progress(quiet)
    asked = Asked(
        format=format,
        columns=columns,
        task=task,
        ignore=ignore,
        labels=tuple(name.strip() for name in labels.split(",")) if labels else (),
        test=test,
    )
    if is_eval:
        if test or quantize:
            raise LlmtuneError("--test and --quantize are for a config, and --eval writes none")
        out = out or Path(f"{Path(data).name.partition('.')[0]}_suite.yaml")
        written = draft_eval_suite(data, out, base=base, asked=asked, force=force)
        print_result(written.as_json(), as_json, written.describe)
        return
    out = out or Path(DEFAULT_OUT)
    draft = draft_config(data, out, base=base, asked=asked, quantize=quantize, force=force)
    found, suite = draft.found, draft.suite
    result = {
        "config": str(out),
        "suite": str(suite) if suite else None,
        "task": found.job.name,
        "labels": list(found.job.labels),
        "format": found.source.format,
        "rows": found.num_rows,
        "bad_rows": found.bad_rows,
        "max_length": found.max_length,
    }
    print_result(result, as_json, lambda: "\n".join(_init_lines(draft)))


def _init_lines(draft: "Draft") -> Iterator[str]:
    from llmtune.data.init_config import first_length

    found, out, suite = draft.found, draft.config, draft.suite
    yield f"{out}: {found.count_rows()}, {found.reason}"
    yield f"understood as {found.job.describe()} (--task {'|'.join(JOBS)} if it is not)"
    if found.source.instruction is not None:
        yield f"each text is asked with: {found.source.instruction}"
    if found.job.labels and all(label.isdecimal() for label in found.job.labels):
        yield "the labels are numbers: name them with --labels NAME,NAME,... if they mean something"
    yield from found.notes
    if found.left_out:
        yield f"left out: {name_first(found.left_out, SHOWN_LEFT_OUT)}"
    if found.bad_rows:
        yield f"{found.bad_rows} rows cannot be used: left out; llmtune data check names them"
    epochs, batch_size = first_length(found)
    rate, reason = draft.training.learning_rate, draft.training.rate_reason
    seen = f"each {found.unit} is seen {'once' if epochs == 1 else f'{epochs} times'}"
    yield f"{seen}, {batch_size} a step; learning rate {rate:.1e} ({reason})"
    if draft.training.is_quantized:
        yield f"the base is trained in 4 bits: {draft.training.quantized_reason}"
    if suite is None:
        reason = found.suite.reason if isinstance(found.suite, NoSuite) else ""
        yield f"no suite asks about your task ({reason}): add one, or there is no verdict"
    else:
        asked = found.test.name if found.test is not None else "rows that are not trained on"
        yield f"{suite}: asks your task on {asked}"
    name = shlex.quote(str(out))
    yield f"next: llmtune data check {name}, then llmtune run {name}"


@click.group("data", cls=Uncut)
def data_group() -> None:
    """Check the rows of a config, or show what is trained on."""


@data_group.command("check")
@CONFIG_ARGUMENT
@OVERRIDES_ARGUMENT
@click.option(
    "--html",
    type=click.Path(path_type=Path),
    help="Also write a page with the first rows and all counts.",
)
@click.option("--no-near-duplicates", is_flag=True, help="Skip the search for near-duplicates.")
@click.option("--no-cache", is_flag=True, help="Do not read or keep prepared data.")
@with_output_options
def data_check(  # noqa: PLR0913 (one argument an option)
    config: Path,
    overrides: tuple[str, ...],
    html: Path | None,
    no_near_duplicates: bool,
    no_cache: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Read all rows as a run would and report every fault; no model is loaded.

    CONFIG is a YAML file or a run directory.
    Exit code 1 if a finding would stop a run; near-duplicates and style only warn.

    \b
      llmtune data check configs/quickstart.yaml
      llmtune data check configs/quickstart.yaml --html rows.html
    """
    from llmtune.data.check import check_data
    from llmtune.data.check_page import render_check_page
    from llmtune.runs.rows import open_rows

    show_progress(quiet)
    rows = open_rows(str(config), overrides, use_cache=not no_cache)
    report = check_data(
        rows.data,
        rows.tokenizer,
        limits=rows.find_limits(),
        near_duplicates=not no_near_duplicates,
    )
    if html is not None:
        atomic_write_text(html, render_check_page(report))
    print_result(report.to_json(), as_json, lambda: "\n".join(report.lines()))
    if not report.is_ok:
        raise click.exceptions.Exit(CheckFailed.exit_code)


@data_group.command("show")
@CONFIG_ARGUMENT
@OVERRIDES_ARGUMENT
@click.option("--row", type=click.IntRange(min=1), help="Only this row, counted from 1.")
@click.option(
    "--limit", type=click.IntRange(min=1), default=3, show_default=True, help="How many rows."
)
@click.option("--split", type=click.Choice(["train", "evaluation"]), default="train")
@click.option("--html", type=click.Path(path_type=Path), help="Write a page instead.")
@with_output_options
def data_show(  # noqa: PLR0913 (one argument an option)
    config: Path,
    overrides: tuple[str, ...],
    row: int | None,
    limit: int,
    split: Any,
    html: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Show rendered rows as tokens: trained ones colored, the rest plain.

    CONFIG is a YAML file or a run directory.
    With --json one object a row: input_ids, labels, text, source, line.

    \b
      llmtune data show configs/quickstart.yaml --row 1
      llmtune data show configs/quickstart.yaml --limit 20 --html rows.html
    """
    from llmtune.data.preview import preview_rows, render_page, render_terminal
    from llmtune.runs.rows import open_rows

    show_progress(quiet)
    rows = open_rows(str(config), overrides)
    previews = preview_rows(rows.data, rows.tokenizer, split=split, row=row, limit=limit)
    if html is not None:
        atomic_write_text(html, render_page(previews))
    if as_json:
        for preview in previews:
            click.echo(json.dumps(preview.to_json(), ensure_ascii=False))
    elif html is None:
        stdout().print(render_terminal(previews))
