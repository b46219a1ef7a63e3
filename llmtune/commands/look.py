"""runs and doctor: what is here."""

import json
from pathlib import Path

import click
from rich.table import Table

from llmtune.commands.options import stdout, with_output_options


@click.command()
@click.argument("directory", type=click.Path(path_type=Path), default=Path("runs"))
@with_output_options
def runs(directory: Path, quiet: bool, as_json: bool) -> None:
    """List runs with their state and verdict (default: runs).

    \b
      llmtune runs
      llmtune runs /data/runs --json
    """
    from llmtune.run_list import list_runs

    found = list_runs(directory)
    if as_json:
        click.echo(json.dumps([each.__dict__ for each in found], indent=2))
        return
    table = Table("run", "state", "verdict", "base", "created")
    for each in found:
        table.add_row(each.path, each.state, each.verdict or "", each.base, each.created)
    stdout().print(table)


@click.command()
@with_output_options
def doctor(quiet: bool, as_json: bool) -> None:
    """Check this machine and say how to mend what is broken.

    \b
      llmtune doctor
    """
    from llmtune.doctor import examine

    findings = examine()
    if as_json:
        click.echo(json.dumps([finding.__dict__ for finding in findings], indent=2))
    else:
        marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "broken": "[red]broken[/]"}
        for finding in findings:
            fix = f"\n         {finding.fix}" if finding.fix else ""
            line = f"{marks[finding.state]:>6}  {finding.subject}: {finding.found}{fix}"
            stdout().print(line, soft_wrap=True)
    if any(finding.state == "broken" for finding in findings):
        raise click.exceptions.Exit(1)
