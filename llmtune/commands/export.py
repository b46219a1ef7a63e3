"""export and verify: files for other programs, and proof that they answer as the adapter did."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from llmtune.commands.options import (
    FORCE_OPTION,
    MAX_KL_OPTION,
    OVERRIDES_ARGUMENT,
    TARGET_ARGUMENT,
    NotNegative,
    print_result,
    show_progress,
    with_output_options,
)
from llmtune.exporting.base import ExportSettings
from llmtune.exporting.config import EXPORT_TYPES, EXPORTERS


def _exporter_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that the exporters read, each once."""
    options = {option.name: option for exporter in EXPORTERS for option in exporter.options}
    for option in reversed(options.values()):
        flag = f"--{option.name.replace('_', '-')}"
        if option.kind == "switch":
            add = click.option(f"{flag}/--no-{flag[2:]}", default=None, help=option.help)
        elif option.kind == "flag":
            add = click.option(flag, is_flag=True, help=option.help)
        else:
            type = NotNegative() if option.kind == "limit" else str
            add = click.option(flag, type=type, help=option.help)
        command = add(command)
    return command


@click.command()
@TARGET_ARGUMENT
@OVERRIDES_ARGUMENT
@click.option(
    "--to",
    "kind",
    type=click.Choice([exporter.name for exporter in EXPORTERS]),
    required=True,
    help="What to make.",
)
@click.option("--type", "chosen_type", type=click.Choice(EXPORT_TYPES), help="Numbers in the file.")
@click.option("--out", type=click.Path(path_type=Path), help="The file or directory to make.")
@_exporter_options
@FORCE_OPTION
@with_output_options
def export(  # noqa: PLR0913 (one argument an option)
    target: str,
    overrides: tuple[str, ...],
    kind: str,
    chosen_type: str | None,
    out: Path | None,
    force: bool,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Write a model for another program, and check the file.

    TARGET is a config, a run, an adapter directory or a model.

    \b
      llmtune export runs/quickstart --to gguf --type q8_0
      llmtune export runs/quickstart --to ollama
      llmtune export runs/quickstart --to adapter-gguf
    """
    show_progress(quiet)
    from llmtune.runs.export import export_target

    settings = ExportSettings(kind, chosen_type, out, force=force, options=options)
    exported = export_target(target, overrides, settings)
    print_result(exported.to_dict(), as_json, lambda: f"{kind} written to {exported.out}")


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@OVERRIDES_ARGUMENT
@click.option("--against", required=True, help="The run (or model) that PATH was made from.")
@MAX_KL_OPTION
@with_output_options
def verify(
    path: Path,
    overrides: tuple[str, ...],
    against: str,
    max_kl: float | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Reload a merged directory or a GGUF file and compare it with the adapter.

    A file is compared twice: with the merged model it was made from (is the file right?) and with
    base + adapter (does all of it together answer as trained?). Exit code 1 if one of them
    differs by more than its limit.

    \b
      llmtune verify runs/quickstart/merged --against runs/quickstart
      llmtune verify runs/quickstart/exports/quickstart-q8_0.gguf --against runs/quickstart
    """
    show_progress(quiet)
    from llmtune.checks.verification import Tolerances
    from llmtune.runs.verify import verify_target

    verified = verify_target(path, against, overrides, Tolerances(max_kl=max_kl))
    print_result(verified.to_dict(), as_json, verified.describe)
    verified.require_passed()
