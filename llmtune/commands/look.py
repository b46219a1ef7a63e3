"""runs and doctor: what is here."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from llmtune.commands.options import has_width, stdout, with_output_options

if TYPE_CHECKING:
    from llmtune.runs.listing import RunSummary

UNLIMITED_WIDTH = 10_000
SORT_KEYS = ("created", "score", "gain", "loss", "eval_loss", "learning_rate", "seconds", "bytes")


@click.command()
@click.argument("directory", type=click.Path(path_type=Path), default=Path("runs"))
@click.option(
    "--sort",
    type=click.Choice(SORT_KEYS),
    default="created",
    metavar="KEY",
    help=f"One of {', '.join(SORT_KEYS)}.",
)
@click.option(
    "--where", multiple=True, metavar="KEY=VALUE", help="Only runs with this config key or verdict."
)
@with_output_options
def runs(directory: Path, sort: str, where: tuple[str, ...], quiet: bool, as_json: bool) -> None:
    """List runs with their verdict, scores and settings (default: runs).

    If a line of the terminal is too short for a table, each run is a paragraph.

    \b
      llmtune runs
      llmtune runs --sort score --where adapter.rank=16
      llmtune runs /data/runs --json
    """
    from llmtune.runs.listing import list_runs

    found = list_runs(directory, sort=sort, where=where)
    if as_json:
        click.echo(json.dumps([asdict(each) for each in found], indent=2))
        return
    console = stdout()
    table = _table(found)
    needed = console.measure(table, options=console.options.update(width=UNLIMITED_WIDTH)).maximum
    if needed <= console.width or not has_width():
        console.width = needed
        console.print(table)
        return
    for each in found:
        console.print(Text(each.path, "bold"), soft_wrap=True)
        target = each.target.words if each.target else None
        states = filter(None, (each.state, each.verdict, target, each.minute))
        console.print(Text(f"  {', '.join(states)}"), soft_wrap=True)
        names = ("learning rate", "loss", "evaluation loss", "time", "size")
        facts = [f"{name} {cell}" for name, cell in zip(names, _numbers(each), strict=True) if cell]
        if each.adapter:
            console.print(Text(f"  {', '.join([each.adapter, *facts])}"), soft_wrap=True)
        console.print(Text(f"  {each.base}"), soft_wrap=True)


def _table(found: "Sequence[RunSummary]") -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    headings = (
        *("run", "state", "verdict", "target", "adapter"),
        *("LR", "loss", "eval loss", "time", "size"),
        *("base", "created (UTC)"),
    )
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    for each in found:
        target = each.target.words if each.target else ""
        cells = (each.path, each.state, each.verdict or "", target, each.adapter)
        table.add_row(*map(Text, (*cells, *_numbers(each), each.base, each.minute)))
    return table


def _numbers(run: "RunSummary") -> tuple[str, ...]:
    """Return learning rate, losses, time and size as they are shown; empty if not known."""
    from llmtune.reporting.numbers import format_bytes, format_seconds

    return (
        "" if run.learning_rate is None else f"{run.learning_rate:g}",
        "" if run.loss is None else f"{run.loss:.3f}",
        "" if run.eval_loss is None else f"{run.eval_loss:.3f}",
        "" if run.seconds is None else format_seconds(run.seconds),
        "" if run.bytes is None else format_bytes(run.bytes),
    )


@click.command()
@click.option(
    "--test",
    "is_test",
    is_flag=True,
    help="Also try every fast path against the plain one, and leave out what is wrong or slow.",
)
@with_output_options
def doctor(is_test: bool, quiet: bool, as_json: bool) -> None:
    """Check this machine and say how to mend what is broken.

    With --test, small random models are trained and scored in every precision of this machine, by
    the fast paths and by plain ones. What is wrong or slow is left out of later runs, which say
    so, until a test with newer versions finds it good.

    \b
      llmtune doctor
      llmtune doctor --test
    """
    from llmtune.runs.doctor import examine, try_machine

    findings = examine()
    if is_test:
        findings += try_machine(lambda line: None if quiet else click.echo(line, err=True))
    if as_json:
        click.echo(json.dumps([finding.__dict__ for finding in findings], indent=2))
    else:
        marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "broken": "[red]broken[/]"}
        for finding in findings:
            fix = f"\n        {finding.fix}" if finding.fix else ""
            line = escape(f"{finding.subject}: {finding.found}{fix}")
            stdout().print(f"{marks[finding.state]:>6}  {line}", soft_wrap=True)
    if any(finding.state == "broken" for finding in findings):
        raise click.exceptions.Exit(1)
