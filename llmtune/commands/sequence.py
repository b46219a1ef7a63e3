"""sequence: tasks one after another on one adapter."""

import logging
from pathlib import Path

import click
from rich import box
from rich.table import Table
from rich.text import Text

from llmtune.commands.options import print_result, show_progress, with_output_options
from llmtune.io.run_dir import RunDir

log = logging.getLogger("llmtune")


@click.command()
@click.argument("configs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Where the runs are kept."
)
@with_output_options
def sequence(configs: tuple[Path, ...], out: Path, quiet: bool, as_json: bool) -> None:
    """Train tasks one after another, and say what is kept of each.

    CONFIGS are two or more YAML files with one base; each adapter goes on from the one before.

    \b
      llmtune sequence movies.yaml intents.yaml --out runs/both
      llmtune report runs/both
    """
    from llmtune.config import load_config
    from llmtune.experiments.sequence import train_sequence
    from llmtune.reporting.sequence import SequenceResult

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
    log.info("report of the last task: %s", RunDir(out / result.runs[-1]).report_html_path)
