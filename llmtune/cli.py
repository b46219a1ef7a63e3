"""The command line: verbs as sub-commands, a YAML file first, dotted overrides after it."""

import contextlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.table import Table

from llmtune.errors import LlmtuneError, RunInterrupted
from llmtune.version import __version__

EXIT_BUG = 70

Command = TypeVar("Command", bound=Callable[..., Any])

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def main() -> None:
    """Run the command line and end the process with its exit code."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code: 0, 1, 2, 3, or 70 for a bug of ours."""
    _prepare_process()
    try:
        cli(list(arguments), prog_name="llmtune", standalone_mode=False)
    except click.exceptions.Exit as exit_request:
        return exit_request.exit_code
    except click.ClickException as error:
        _print_error(error.format_message())
        return LlmtuneError.exit_code
    except LlmtuneError as error:
        _print_error(str(error))
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        _print_error("interrupted; the same command goes on from what is saved")
        return RunInterrupted.exit_code
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 (the reader left: end in silence)
        return 0
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        _print_error(f"{place}{error.strerror or error}")
        return LlmtuneError.exit_code
    except Exception:  # noqa: BLE001 (the last place: whatever arrives here is a bug of ours)
        traceback.print_exc()
        _print_error("this is a bug in llmtune; please report it with the lines above")
        return EXIT_BUG
    return 0


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="llmtune")
def cli() -> None:
    """Adapt a pretrained LLM to your task on one GPU, and know whether it worked.

    \b
      llmtune run configs/quickstart.yaml            train, merge, evaluate, report
      llmtune train my.yaml adapter.rank=8           override any key of the config
      llmtune chat runs/quickstart                   talk to base and tuned model
    """


def with_output_options(command: Command) -> Command:
    """Add `--quiet` and `--json`, which work on every command."""
    command = click.option("--json", "as_json", is_flag=True, help="Print one JSON result.")(
        command
    )
    return click.option("-q", "--quiet", is_flag=True, help="No progress.")(command)


CONFIG_ARGUMENT = click.argument("config", type=click.Path(path_type=Path))
TARGET_ARGUMENT = click.argument("target")
OVERRIDES_ARGUMENT = click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
FORCE_OPTION = click.option("--force", is_flag=True, help="Do again what is finished.")


@cli.command("run")
@CONFIG_ARGUMENT
@OVERRIDES_ARGUMENT
@FORCE_OPTION
@with_output_options
def run_all(
    config: Path, overrides: tuple[str, ...], force: bool, quiet: bool, as_json: bool
) -> None:
    """Train, merge, evaluate, report; skip what is finished.

    \b
      llmtune run configs/quickstart.yaml
      llmtune run configs/quickstart.yaml train.max_steps=20 run_dir=runs/short
      llmtune run configs/quickstart.yaml --force
    """
    from llmtune import pipeline
    from llmtune.reporting.terminal import render_terminal

    _show_progress(quiet)
    loaded = _load(config, overrides)
    report = pipeline.run(loaded, force=force)
    _print_result(report.as_json(), as_json, lambda: render_terminal(report))
    logging.getLogger("llmtune").info("report: %s", loaded.run.report_html_path)


@cli.command()
@CONFIG_ARGUMENT
@OVERRIDES_ARGUMENT
@FORCE_OPTION
@with_output_options
def train(
    config: Path, overrides: tuple[str, ...], force: bool, quiet: bool, as_json: bool
) -> None:
    """Fit the adapter; goes on from a checkpoint.

    \b
      llmtune train configs/quickstart.yaml
      llmtune train configs/quickstart.yaml adapter.rank=8 train.learning_rate=1e-4 run_dir=runs/r8
      llmtune train my.yaml data.train='[{path: mine.jsonl}]' run_dir=runs/mine
    """
    from llmtune import pipeline

    _show_progress(quiet)
    loaded = _load(config, overrides)
    result = pipeline.train(loaded, force=force)
    _print_result(
        result,
        as_json,
        lambda: (
            f"adapter saved in {loaded.run.adapter_dir}: {result['steps']} steps, "
            f"{result['tokens']} tokens, last loss {result['final_loss']:.4f}"
        ),
    )


@cli.command()
@TARGET_ARGUMENT
@OVERRIDES_ARGUMENT
@click.option("--strength", type=float, help="How much of the adapter is added (default 1).")
@click.option("--out", type=click.Path(path_type=Path), help="Where the merged model goes.")
@FORCE_OPTION
@with_output_options
def merge(  # noqa: PLR0913 (one argument an option)
    target: str,
    overrides: tuple[str, ...],
    strength: float | None,
    out: Path | None,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Add an adapter into its base and check the result.

    TARGET is a config, a run or an adapter directory.

    \b
      llmtune merge runs/quickstart
      llmtune merge runs/quickstart/adapter --out merged --strength 0.7
    """
    from llmtune import pipeline
    from llmtune.targets import require_run, resolve_target

    _show_progress(quiet)
    named = resolve_target(target, overrides)
    if out is None and named.config is None:
        raise LlmtuneError(f"{target}: is not a run; say where the merged model goes with --out")
    if out is not None:
        chosen = 1.0 if strength is None else strength
        result = pipeline.merge_adapter_dir(named, out, strength=chosen, force=force)
    else:
        more = () if strength is None else (f"merge.strength={strength}",)
        result = pipeline.merge(require_run(target, (*overrides, *more)), force=force)
    _print_result(result, as_json, lambda: f"merged model saved in {result['out_dir']}")


@cli.command("eval")
@TARGET_ARGUMENT
@OVERRIDES_ARGUMENT
@click.option("--suite", "suites", multiple=True, help="A suite file or a shipped suite's name.")
@FORCE_OPTION
@with_output_options
def evaluate(  # noqa: PLR0913 (one argument an option)
    target: str,
    overrides: tuple[str, ...],
    suites: tuple[str, ...],
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Score on the suites of a run, or on --suite.

    TARGET is a config, a run, an adapter directory or a model.

    \b
      llmtune eval runs/quickstart
      llmtune eval runs/quickstart --suite general
      llmtune eval path/to/model --suite general --json
    """
    from llmtune.reporting.scores import render_scores

    _show_progress(quiet)
    if suites:
        from llmtune.answering.score import score_target

        scores = score_target(target, overrides, suites)
    else:
        from llmtune import pipeline
        from llmtune.targets import require_run

        scores = pipeline.evaluate(require_run(target, overrides), force=force)
    _print_result(scores, as_json, lambda: render_scores(scores))


@cli.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@with_output_options
def report(run_dir: Path, quiet: bool, as_json: bool) -> None:
    """Rebuild the report of a run and print its table.

    \b
      llmtune report runs/quickstart
    """
    from llmtune import pipeline
    from llmtune.reporting.terminal import render_terminal

    _show_progress(quiet)
    built = pipeline.report(run_dir)
    _print_result(built.as_json(), as_json, lambda: render_terminal(built))


@cli.command()
@TARGET_ARGUMENT
@OVERRIDES_ARGUMENT
@click.option("--arm", type=click.Choice(["base", "tuned", "merged"]), help="Who answers first.")
@click.option("--system", help="A system prompt.")
@click.option("--max-new-tokens", default=256, show_default=True, help="Longest answer, in tokens.")
@click.option("--temperature", default=0.0, show_default=True, help="0 takes the likeliest token.")
@with_output_options
def chat(  # noqa: PLR0913 (one argument an option)
    target: str,
    overrides: tuple[str, ...],
    arm: str | None,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    quiet: bool,
    as_json: bool,
) -> None:
    """Talk to a model in the terminal.

    TARGET is a config, a run, an adapter directory or a model.

    /base and /tuned switch who answers, /clear starts over, /quit ends.

    \b
      llmtune chat runs/quickstart
      llmtune chat runs/quickstart/merged --temperature 0.7
    """
    from llmtune.answering.chat import ChatSettings, run_chat

    _show_progress(quiet)
    run_chat(target, overrides, ChatSettings(arm, system, max_new_tokens, temperature, as_json))


@cli.command()
@TARGET_ARGUMENT
@OVERRIDES_ARGUMENT
@click.option("--input", "input_path", required=True, type=click.Path(path_type=Path))
@click.option("--output", "output_path", required=True, type=click.Path(path_type=Path))
@click.option("--arm", type=click.Choice(["base", "tuned", "merged"]), help="Who answers.")
@click.option("--max-new-tokens", default=256, show_default=True, help="Longest answer, in tokens.")
@click.option("--temperature", default=0.0, show_default=True, help="0 takes the likeliest token.")
@with_output_options
def predict(  # noqa: PLR0913 (one argument an option)
    target: str,
    overrides: tuple[str, ...],
    input_path: Path,
    output_path: Path,
    arm: str | None,
    max_new_tokens: int,
    temperature: float,
    quiet: bool,
    as_json: bool,
) -> None:
    """Answer a JSONL of prompts in batches. A row holds `prompt` (text) or `messages`.

    Each output line is the input row with `answer` and `stopped` added, in the same order.

    \b
      llmtune predict runs/quickstart --input prompts.jsonl --output answers.jsonl
      llmtune predict runs/quickstart --arm base --input prompts.jsonl --output base.jsonl
    """
    from llmtune.answering.predict import PredictSettings, run_predict

    _show_progress(quiet)
    result = run_predict(
        target,
        overrides,
        PredictSettings(input_path, output_path, arm, max_new_tokens, temperature),
    )
    _print_result(
        result,
        as_json,
        lambda: f"{result['rows']} answers by the {result['arm']} model in {output_path}",
    )


@cli.group("config")
def config_group() -> None:
    """Show a config as it takes effect, or the JSON schema of all keys."""


@config_group.command("show")
@CONFIG_ARGUMENT
@OVERRIDES_ARGUMENT
@with_output_options
def config_show(config: Path, overrides: tuple[str, ...], quiet: bool, as_json: bool) -> None:
    """Print every key's value and where it comes from.

    \b
      llmtune config show configs/quickstart.yaml adapter.rank=8
    """
    from llmtune.config import RunConfig, effective_keys, read_config_tree
    from llmtune.validation import validate_section

    tree = read_config_tree(config, overrides)
    keys = effective_keys(validate_section(RunConfig, tree), tree)
    if as_json:
        click.echo(json.dumps([key.__dict__ for key in keys], indent=2))
        return
    width = max(len(f"{key.path}: {json.dumps(key.value)}") for key in keys)
    for key in keys:
        click.echo(f"{f'{key.path}: {json.dumps(key.value)}':<{min(width, 60)}}  # {key.origin}")


@config_group.command("list")
@with_output_options
def config_list(quiet: bool, as_json: bool) -> None:
    """List the recipes that ship with llmtune.

    \b
      llmtune config list
    """
    from llmtune.shipped import shipped_files

    recipes = shipped_files("configs")
    about = {name: path.read_text().splitlines()[0].lstrip("# ") for name, path in recipes.items()}
    if as_json:
        click.echo(json.dumps(about, indent=2))
        return
    for name, line in about.items():
        click.echo(f"{name:<16} {line}")


@config_group.command("copy")
@click.argument("recipe")
@click.argument("destination", type=click.Path(path_type=Path))
@with_output_options
def config_copy(recipe: str, destination: Path, quiet: bool, as_json: bool) -> None:
    """Copy a shipped recipe to a file of your own.

    \b
      llmtune config copy qlora-8b-24gb my.yaml
    """
    from llmtune.shipped import shipped_files

    recipes = shipped_files("configs")
    if recipe not in recipes:
        raise LlmtuneError(f"recipe {recipe!r}: expected one of {', '.join(recipes)}")
    try:
        with destination.open("x", encoding="utf-8") as file:
            file.write(recipes[recipe].read_text(encoding="utf-8"))
    except FileExistsError:
        raise LlmtuneError(f"{destination}: exists already; choose another name") from None
    _print_result({"recipe": recipe, "path": str(destination)}, as_json, lambda: str(destination))


@config_group.command("schema")
@with_output_options
def config_schema(quiet: bool, as_json: bool) -> None:
    """Print the JSON schema of a config, for editors that complete and check YAML.

    \b
      llmtune config schema > llmtune.schema.json
    """
    from llmtune.config import RunConfig

    click.echo(json.dumps(RunConfig.model_json_schema(), indent=2))


@cli.command()
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
    _stdout().print(table)


@cli.command()
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
            _stdout().print(line, soft_wrap=True)
    if any(finding.state == "broken" for finding in findings):
        raise click.exceptions.Exit(1)


def _load(config: Path, overrides: Sequence[str]) -> Any:
    from llmtune.config import load_config

    return load_config(config, overrides)


def _print_result(result: Any, as_json: bool, render: Callable[[], Any]) -> None:
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        _stdout().print(render(), soft_wrap=True)


def _stdout() -> Console:
    return Console(highlight=False)


def _print_error(message: str) -> None:
    console = Console(stderr=True, highlight=False)
    console.print("error: ", style="bold red", end="")
    console.print(message, style="red", markup=False, soft_wrap=True)


def _prepare_process() -> None:
    """Set what must stand before the big libraries are imported: no telemetry, no noise."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").addHandler(logging.NullHandler())
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]


def _show_progress(quiet: bool) -> None:
    """Send the package's own messages to stderr, or only its warnings with `--quiet`."""
    logger = logging.getLogger("llmtune")
    logger.handlers = [logging.StreamHandler(sys.stderr)]
    logger.handlers[0].setFormatter(logging.Formatter("%(message)s"))
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.propagate = False
