"""launch: a run as a job of a cluster."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmtune.commands.options import (
    CONFIG_ARGUMENT,
    OVERRIDES_ARGUMENT,
    print_result,
    show_progress,
    with_output_options,
)
from llmtune.launching.config import ENGINES, LaunchSettings, engine_options

if TYPE_CHECKING:
    from llmtune.runs.launch import Launched


def _engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that the engines read, each once."""
    for option, engines in reversed(engine_options()):
        flag = f"--{option.name.replace('_', '-')}"
        command = click.option(
            flag, help=f"{option.help} ({engines})", is_flag=option.kind == "flag"
        )(command)
    return command


@click.command()
@CONFIG_ARGUMENT
@OVERRIDES_ARGUMENT
@click.option(
    "--on",
    type=click.Choice([engine.name for engine in ENGINES]),
    required=True,
    help="The engine that starts it.",
)
@click.option("--nodes", type=click.IntRange(1), default=1, show_default=True, help="Machines.")
@click.option(
    "--gpus",
    type=click.IntRange(0),
    default=1,
    show_default=True,
    help="On each machine; 0 runs on its CPU.",
)
@click.option(
    "--package",
    metavar="SOURCE",
    help="Where the machines get llmtune from: a wheel, git+URL@COMMIT, or `installed`.",
)
@click.option(
    "--store",
    metavar="PLACE",
    help="Where the run is kept meanwhile. "
    + " ".join(f"{each.name}: {each.store_help}." for each in ENGINES if each.store_help),
)
@click.option(
    "--env",
    multiple=True,
    metavar="NAME",
    help="An environment variable the job needs, such as HF_TOKEN; its value is never written.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder of the job's files (launch/RUN-ENGINE)."
)
@click.option("--dry-run", "is_dry", is_flag=True, help="Write the files, and hand nothing in.")
@_engine_options
@with_output_options
def launch(  # noqa: PLR0913 (one argument an option)
    config: Path,
    overrides: tuple[str, ...],
    on: str,
    nodes: int,
    gpus: int,
    package: str | None,
    store: str | None,
    env: tuple[str, ...],
    out: Path | None,
    is_dry: bool,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Run a config on a cluster: SkyPilot, Slurm, Kubernetes or Ray.

    Writes the engine's own file, which installs llmtune, brings config, data and base, runs
    `llmtune run` (by torchrun if there are several processes) and continues after a preemption.
    Then the engine's command hands it in.

    \b
      llmtune launch mine.yaml --on slurm --gpus 8 --package dist/llmtune-0.1.0-py3-none-any.whl
      llmtune launch mine.yaml --on k8s --store my-claim --package git+URL@COMMIT --dry-run
    """
    from llmtune.runs.launch import launch as start
    from llmtune.runs.targets import require_run

    show_progress(quiet)
    given = {
        name: "true" if value is True else str(value)
        for name, value in options.items()
        if value not in (None, False)
    }
    settings = LaunchSettings(on, package, nodes, gpus, store, env, out, is_dry, given)
    launched = start(require_run(str(config), overrides), settings)
    print_result(launched.as_json(), as_json, lambda: _render(launched))


def _render(launched: "Launched") -> str:
    import shlex

    lines = [f"{launched.files[1]} is written, beside {launched.files[0].name}"]
    command = shlex.join(launched.command)
    lines.append(f"handed in with: {command}" if launched.is_submitted else f"next: {command}")
    return "\n".join([*lines, *launched.notes])
