"""config: show what takes effect, list and copy recipes, print the schema."""

import json
from pathlib import Path

import click

from llmtune.commands.options import (
    CONFIG_ARGUMENT,
    OVERRIDES_ARGUMENT,
    Uncut,
    print_result,
    with_output_options,
)
from llmtune.errors import LlmtuneError
from llmtune.io.run_dir import atomic_write_text
from llmtune.io.yaml_source import shipped_files


@click.group("config", cls=Uncut)
def config_group() -> None:
    """Show a config as it takes effect, copy a recipe, or print the JSON schema of all keys."""


@config_group.command("show")
@CONFIG_ARGUMENT
@OVERRIDES_ARGUMENT
@with_output_options
def config_show(config: Path, overrides: tuple[str, ...], quiet: bool, as_json: bool) -> None:
    """Print every key's value and where it comes from.

    CONFIG is a YAML file or a run directory.

    \b
      llmtune config show configs/quickstart.yaml adapter.rank=8
    """
    from llmtune.runs.targets import read_effective_keys

    keys = read_effective_keys(str(config), overrides)
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
    recipes = shipped_files("configs")
    if recipe not in recipes:
        raise LlmtuneError(f"recipe {recipe!r}: expected one of {', '.join(recipes)}")
    try:
        with destination.open("x", encoding="utf-8") as file:
            file.write(recipes[recipe].read_text(encoding="utf-8"))
    except FileExistsError:
        raise LlmtuneError(f"{destination}: exists already; choose another name") from None
    print_result({"recipe": recipe, "path": str(destination)}, as_json, lambda: str(destination))


@config_group.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), help="The config to write (FILE_llmtune.yaml)."
)
@click.option("--force", is_flag=True, help="Replace it if it is there.")
@with_output_options
def config_import(file: Path, out: Path | None, force: bool, quiet: bool, as_json: bool) -> None:
    """Write our config for one of axolotl, LLaMA-Factory or TRL.

    FILE is YAML or JSON. What has no counterpart here, and what means something else, is listed.

    \b
      llmtune config import axolotl.yaml --out mine.yaml
    """
    from llmtune.runs.import_config import import_config

    found = import_config(file)
    out = out or file.with_name(f"{file.stem}_llmtune.yaml")
    if out.exists() and not force:
        raise LlmtuneError(f"{out}: exists already; choose a different --out, or give --force")
    if not out.absolute().parent.is_dir():
        raise LlmtuneError(f"{out}: its directory does not exist; make it first")
    atomic_write_text(out, found.render(file.name))
    result = {
        "config": str(out),
        "tool": found.tool.name,
        "changed": found.changed,
        "missing": found.missing,
        "skipped": found.skipped,
    }
    lines = [f"{out}: from {found.tool.title}", *found.describe(), f"next: llmtune plan {out}"]
    print_result(result, as_json, lambda: "\n".join(lines))


@config_group.command("schema")
@with_output_options
def config_schema(quiet: bool, as_json: bool) -> None:
    """Print the JSON schema of a config, for editors that complete and check YAML.

    \b
      llmtune config schema > llmtune.schema.json
    """
    from llmtune.config import RunConfig

    click.echo(json.dumps(RunConfig.model_json_schema(), indent=2))
