"""runs and doctor: what is here."""

import json
from collections.abc import Sequence
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


@click.command()
@click.argument("directory", type=click.Path(path_type=Path), default=Path("runs"))
@with_output_options
def runs(directory: Path, quiet: bool, as_json: bool) -> None:
    """List runs with their state and verdict (default: runs).

    If a line of the terminal is too short for a table, each run is a paragraph.

    \b
      llmtune runs
      llmtune runs /data/runs --json
    """
    from llmtune.runs.listing import list_runs

    found = list_runs(directory)
    if as_json:
        click.echo(json.dumps([each.__dict__ for each in found], indent=2))
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
        facts = (each.state, each.verdict, each.minute)
        console.print(Text(f"  {', '.join(filter(None, facts))}"), soft_wrap=True)
        console.print(Text(f"  {each.base}"), soft_wrap=True)


def _table(found: "Sequence[RunSummary]") -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("run", "state", "verdict", "base", "created (UTC)"):
        table.add_column(heading, no_wrap=True)
    for each in found:
        cells = (each.path, each.state, each.verdict or "", each.base, each.minute)
        table.add_row(*map(Text, cells))
    return table


@click.command()
@with_output_options
def doctor(quiet: bool, as_json: bool) -> None:
    """Check this machine and say how to mend what is broken.

    \b
      llmtune doctor
    """
    from llmtune.runs.doctor import examine

    findings = examine()
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
