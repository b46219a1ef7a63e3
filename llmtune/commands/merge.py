"""merge: one adapter, or several, added into their base."""

import math
from pathlib import Path
from typing import Any

import click

from llmtune.commands.options import (
    FORCE_OPTION,
    OVERRIDES_ARGUMENT,
    TARGET_ARGUMENT,
    print_result,
    show_progress,
    with_output_options,
)
from llmtune.errors import LlmtuneError
from llmtune.merging.config import MERGE_BASES, MERGE_DTYPES, MergeConfig, MergeSettings


class Strength(click.ParamType):
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


@click.command()
@TARGET_ARGUMENT
@OVERRIDES_ARGUMENT
@click.option("--base", type=click.Choice(MERGE_BASES), help="Which weights it is added to.")
@click.option("--strength", type=Strength(), help="How much of the adapter is added (default 1).")
@click.option("--out", type=click.Path(path_type=Path), help="Where the merged model goes.")
@click.option("--dtype", type=click.Choice(MERGE_DTYPES), help="Default: the base's own.")
@click.option("--device", default="cpu", help="Where the sum is computed: cpu or cuda.")
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@FORCE_OPTION
@with_output_options
def merge(  # noqa: PLR0913 (one argument an option)
    target: str,
    overrides: tuple[str, ...],
    base: str | None,
    strength: float | None,
    out: Path | None,
    dtype: str | None,
    device: str,
    dry_run: bool,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Add an adapter into its base and check the result.

    TARGET is a config, a run or an adapter directory.

    \b
      llmtune merge runs/quickstart
      llmtune merge runs/quickstart/adapter --out merged --strength 0.7
      llmtune merge runs/quickstart --base auto --dry-run
    """
    from llmtune import pipeline
    from llmtune.targets import resolve_target

    show_progress(quiet)
    chosen = {"base": base, "strength": strength}
    given = {name: value for name, value in chosen.items() if value is not None}
    settings = MergeSettings(dtype, device)
    named = resolve_target(target, overrides)
    if named.config is not None:
        more = tuple(f"merge.{name}={value}" for name, value in given.items())
        named = resolve_target(target, (*overrides, *more))
    knobs = MergeConfig(**given)
    if dry_run:
        from llmtune.stages.merge_text import describe_plan

        planned = pipeline.plan_merges(named, out, knobs=knobs, settings=settings)
        print_result(planned, as_json, lambda: describe_plan(planned))
        return
    if out is not None:
        result = pipeline.merge_into(named, out, knobs=knobs, settings=settings, force=force)
    elif named.config is not None:
        result = pipeline.merge(named.config, force=force, settings=settings)
    else:
        raise LlmtuneError(f"{target}: is not a run; say where the merged model goes with --out")
    from llmtune.stages.merge_text import describe_result

    print_result(result, as_json, lambda: describe_result(result))
