"""export and verify: files for other programs, and proof that they answer as the adapter did."""

from pathlib import Path

import click

from llmtune.commands.options import (
    FORCE_OPTION,
    MAX_KL_OPTION,
    OVERRIDES_ARGUMENT,
    TARGET_ARGUMENT,
    print_result,
    show_progress,
    with_output_options,
)
from llmtune.exporting.config import EXPORT_KINDS, GGUF_TYPES, ExportSettings


@click.command()
@TARGET_ARGUMENT
@OVERRIDES_ARGUMENT
@click.option("--to", "kind", type=click.Choice(EXPORT_KINDS), required=True, help="What to make.")
@click.option("--type", "gguf_type", type=click.Choice(GGUF_TYPES), help="Numbers in a GGUF file.")
@click.option("--out", type=click.Path(path_type=Path), help="The file or directory to make.")
@click.option(
    "--runtime/--no-runtime",
    default=None,
    help="Compare with llama.cpp itself (default: where it is installed).",
)
@MAX_KL_OPTION
@click.option("--repo", help="For the hub: org/name.")
@click.option("--public", is_flag=True, help="For the hub: readable by everyone.")
@FORCE_OPTION
@with_output_options
def export(  # noqa: PLR0913 (one argument an option)
    target: str,
    overrides: tuple[str, ...],
    kind: str,
    gguf_type: str | None,
    out: Path | None,
    runtime: bool | None,
    max_kl: float | None,
    repo: str | None,
    public: bool,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write a model for another program, and check the file.

    TARGET is a config, a run, an adapter directory or a model.

    \b
      llmtune export runs/quickstart --to gguf --type q8_0
      llmtune export runs/quickstart --to ollama
      llmtune export runs/quickstart --to adapter-gguf
    """
    show_progress(quiet)
    settings = ExportSettings(
        to=kind,
        type=gguf_type,
        out=out,
        force=force,
        runtime=runtime,
        max_kl=max_kl,
        repo=repo,
        public=public,
    )
    from llmtune.stages.export import export_target

    result = export_target(target, overrides, settings)
    print_result(result, as_json, lambda: f"{kind} written to {result.get('out', repo)}")


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@OVERRIDES_ARGUMENT
@click.option("--against", required=True, help="The run (or model) that PATH was made from.")
@MAX_KL_OPTION
@with_output_options
def verify(  # noqa: PLR0913 (one argument an option)
    path: Path,
    overrides: tuple[str, ...],
    against: str,
    max_kl: float | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Reload a merged directory or a GGUF file and compare it with the adapter.

    A file is compared twice: with the merged model it was made from (is the file right?) and with
    base + adapter (does all of it together answer as trained?). Exit code 1 where one of them
    differs by more than its limit.

    \b
      llmtune verify runs/quickstart/merged --against runs/quickstart
      llmtune verify runs/quickstart/exports/quickstart-q8_0.gguf --against runs/quickstart
    """
    show_progress(quiet)
    from llmtune.stages.verify import VerifySettings, require_passed, verify_target
    from llmtune.stages.verify_text import describe_verification

    result = verify_target(path, against, overrides, VerifySettings(max_kl=max_kl))
    print_result(result, as_json, lambda: describe_verification(result))
    require_passed(result)
