"""What every command shares: arguments, options, the layout of help, and how it prints."""

import json
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console

from llmtune.errors import LlmtuneError
from llmtune.io.progress import MessageHandler
from llmtune.launching.config import ENGINES

PIPED_WIDTH = 120

Command = TypeVar("Command", bound=Callable[..., Any])

CONFIG_ARGUMENT = click.argument("config", type=click.Path(path_type=Path))
TARGET_ARGUMENT = click.argument("target")
OVERRIDES_ARGUMENT = click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
ON_OPTION = click.option(
    "--on",
    type=click.Choice([engine.name for engine in ENGINES if engine.calls_functions]),
    help="Do the runs side by side on this engine, not here one after another.",
)
FORCE_OPTION = click.option("--force", is_flag=True, help="Do again what is finished.")


if TYPE_CHECKING:
    NumberType = click.ParamType[float]
else:
    NumberType = click.ParamType  # older versions of click have no type parameter


class NotNegative(NumberType):
    """A finite number that is not negative; click's own range lets nan through."""

    name = "number"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the number, or end the command with what was given."""
        number = click.FLOAT.convert(value, param, ctx)
        if not (math.isfinite(number) and number >= 0):
            self.fail(f"{value} is not a finite number of at least 0", param, ctx)
        return number


MAX_KL_OPTION = click.option(
    "--max-kl", type=NotNegative(), help="Largest KL that passes, in nats per token."
)


def _read_columns(text: str | None) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in text.split(",")] if text else []
    if not all(name.strip() and column.strip() for name, _, column in pairs):
        raise LlmtuneError(
            f"--columns {text}: expected NAME=COLUMN pairs, as in "
            "instruction=problem,output=solution"
        )
    return {name.strip(): column.strip() for name, _, column in pairs}


COLUMNS_OPTION = click.option(
    "--columns",
    callback=lambda _context, _option, value: _read_columns(value),
    help="Where the format's columns are: instruction=problem,output=solution.",
)


def with_output_options(command: Command) -> Command:
    """Add `--quiet` and `--json`, which work on every command."""
    command = click.option("--json", "as_json", is_flag=True, help="Print one JSON result.")(
        command
    )
    return click.option("-q", "--quiet", is_flag=True, help="No progress.")(command)


def print_result(result: Any, as_json: bool, render: Callable[[], Any]) -> None:
    """Print a result to stdout: as JSON, or as `render` shows it to people."""
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        shown = render()
        # A text may hold paths and names with brackets, which are not markup.
        stdout().print(shown, soft_wrap=True, markup=not isinstance(shown, str))


def stdout() -> Console:
    """Return the console for results: as wide as the terminal, or 120 columns."""
    return Console(highlight=False, width=None if has_width() else PIPED_WIDTH)


def has_width() -> bool:
    """Whether the output's lines have an end: it is a terminal, or the width is given."""
    return sys.stdout.isatty() or "COLUMNS" in os.environ


def show_progress(quiet: bool) -> None:
    """Send the package's own messages to stderr, or only its warnings with `--quiet`.

    Long work draws a bar there if it is a terminal and the command prints no JSON.
    """
    logger = logging.getLogger("llmtune")
    context = click.get_current_context(silent=True)
    is_for_people = context is None or not context.params.get("as_json")
    logger.handlers = [MessageHandler(sys.stderr, draws_bars=is_for_people)]
    logger.handlers[0].setFormatter(logging.Formatter("%(message)s"))
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.propagate = False


class Chapters(click.Group):
    """A group whose help lists its commands in chapters, in the order of use and uncut."""

    chapters: Mapping[str, Sequence[str]]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a list a chapter."""
        for title, names in self.chapters.items():
            with formatter.section(title):
                formatter.write_dl([(name, _first_sentence(self.commands[name])) for name in names])


class Uncut(click.Group):
    """A group whose help cuts no sentence."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one list of all commands."""
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, _first_sentence(self.commands[name])) for name in self.list_commands(ctx)]
            )


def _first_sentence(command: click.Command) -> str:
    paragraph = " ".join((command.help or "").split("\n\n")[0].split())
    return paragraph.split(". ")[0].rstrip(".") + "."
