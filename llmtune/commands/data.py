"""init and data: from a file of rows to a config, and what is wrong with the rows."""

import json
from pathlib import Path
from typing import Any

import click

from llmtune.commands.options import (
    CONFIG_ARGUMENT,
    OVERRIDES_ARGUMENT,
    print_result,
    show_progress,
    stdout,
    with_output_options,
)
from llmtune.errors import CheckFailed, LlmtuneError


@click.command()
@click.argument("data")
@click.option("--base", help="The base model; with it lengths are counted in its tokens.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("llmtune.yaml"),
    show_default=True,
    help="The config to write.",
)
@with_output_options
def init(data: str, base: str | None, out: Path, quiet: bool, as_json: bool) -> None:
    """Look at your rows and write a commented config for them.

    DATA is a file, a directory, a glob or a hub id.

    \b
      llmtune init train.jsonl --base models/SmolLM2-135M-Instruct.Q4_1.gguf
      llmtune init train.jsonl --out my.yaml
    """
    from llmtune.data.init import describe_data, render_config
    from llmtune.models.config import ModelConfig
    from llmtune.models.resolve import resolve_base
    from llmtune.models.tokenizer import load_tokenizer

    show_progress(quiet)
    tokenizer = load_tokenizer(resolve_base(ModelConfig(base=base)).dir) if base else None
    found = describe_data(data, tokenizer=tokenizer)
    text = render_config(found, base=base)
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise LlmtuneError(f"{out}: exists already; choose another name with --out") from None
    result = {
        "config": str(out),
        "format": found.format,
        "rows": found.num_rows,
        "max_length": found.max_length,
    }
    print_result(
        result,
        as_json,
        lambda: f"{out}: {found.num_rows:,} rows, {found.reason}",
    )


@click.group("data")
def data_group() -> None:
    """Check the rows of a config, or show what is trained on."""


@data_group.command("check")
@CONFIG_ARGUMENT
@OVERRIDES_ARGUMENT
@click.option("--html", type=click.Path(path_type=Path), help="Also write a page.")
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

    Exit code 1 where a finding would stop a run; near-duplicates and style only warn.

    \b
      llmtune data check configs/quickstart.yaml
      llmtune data check configs/quickstart.yaml --html rows.html
    """
    from llmtune.data.check import check_data
    from llmtune.data.check_page import render_check_page
    from llmtune.run_dir import atomic_write_text

    show_progress(quiet)
    loaded, tokenizer = _open(config, overrides, no_cache=no_cache)
    is_silent = quiet or as_json
    report = check_data(
        loaded.mixed_data,
        tokenizer,
        near_duplicates=not no_near_duplicates,
        advance=None if is_silent else _Progress("read"),
        compare=None if is_silent else _Progress("looked at for near duplicates"),
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
@click.option("--limit", default=3, show_default=True, help="How many rows.")
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
    """Show rendered rows as tokens: trained ones coloured, the rest plain.

    With --json one object a row: input_ids, labels, text, source, line.

    \b
      llmtune data show configs/quickstart.yaml --row 1
      llmtune data show configs/quickstart.yaml --limit 20 --html rows.html
    """
    from llmtune.data.preview import preview_rows, render_page, render_terminal
    from llmtune.run_dir import atomic_write_text

    show_progress(quiet)
    loaded, tokenizer = _open(config, overrides)
    previews = preview_rows(loaded.mixed_data, tokenizer, split=split, row=row, limit=limit)
    if html is not None:
        atomic_write_text(html, render_page(previews))
    if as_json:
        for preview in previews:
            click.echo(json.dumps(preview.to_json(), ensure_ascii=False))
    elif html is None:
        stdout().print(render_terminal(previews))


class _Progress:
    """Says on stderr what was done with how many rows."""

    every_rows = 10_000

    def __init__(self, done: str) -> None:
        self._done = done
        self._count = 0

    def __call__(self, num_rows: int) -> None:
        before, self._count = self._count, self._count + num_rows
        if self._count // self.every_rows > before // self.every_rows:
            click.echo(f"{self._count:,} rows {self._done}", err=True)


def _open(config: Path, overrides: tuple[str, ...], *, no_cache: bool = False) -> tuple[Any, Any]:
    from llmtune.config import load_config
    from llmtune.models.resolve import resolve_base
    from llmtune.models.tokenizer import load_tokenizer

    more = ("data.cache=false",) if no_cache else ()
    loaded = load_config(config, (*overrides, *more))
    source = resolve_base(loaded.model)
    return loaded, load_tokenizer(source.dir, chat_template=loaded.model.chat_template)
