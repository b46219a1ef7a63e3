"""merge: one adapter, or several, added into their base."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from llmtune.commands.options import (
    FORCE_OPTION,
    MAX_KL_OPTION,
    OVERRIDES_ARGUMENT,
    NotNegative,
    print_result,
    show_progress,
    with_output_options,
)
from llmtune.errors import LlmtuneError
from llmtune.merging.config import (
    MERGE_BASES,
    MERGE_DTYPES,
    METHODS,
    Combination,
    MergeConfig,
    MergeSettings,
    Method,
)

SHARE = click.FloatRange(min=0, max=1, min_open=True)


@click.command()
@click.argument("target", required=False)
@OVERRIDES_ARGUMENT
@click.option("--base", type=click.Choice(MERGE_BASES), help="Which weights it is added to.")
@click.option(
    "--strength", type=NotNegative(), help="How much of the adapter is added (default 1)."
)
@click.option("--out", type=click.Path(path_type=Path), help="Where the merged model goes.")
@click.option("--dtype", type=click.Choice(MERGE_DTYPES), help="Default: the base's own.")
@click.option("--device", default="cpu", help="Where the sum is computed: cpu or cuda.")
@click.option(
    "--adapters",
    multiple=True,
    metavar="NAME_OR_PATH=WEIGHT ...",
    help="Combine several adapters of one base (runs or adapter directories).",
)
@click.option("--method", type=click.Choice(METHODS), default="linear", help="How (linear).")
@click.option("--density", type=SHARE, default=0.5, help="ties, dare: the share kept (0.5).")
@click.option("--rank", type=click.IntRange(min=1), help="svd, or any with --to adapter.")
@click.option("--seed", type=int, default=0, help="dare: the random choice.")
@click.option("--to", type=click.Choice(["model", "adapter"]), default="model", help="Of several.")
@MAX_KL_OPTION
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@FORCE_OPTION
@with_output_options
def merge(  # noqa: PLR0913 (one argument an option)
    target: str | None,
    overrides: tuple[str, ...],
    base: str | None,
    strength: float | None,
    out: Path | None,
    dtype: str | None,
    device: str,
    adapters: tuple[str, ...],
    method: Method,
    density: float,
    rank: int | None,
    seed: int,
    to: str,
    max_kl: float | None,
    dry_run: bool,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Add an adapter into its base and check the result.

    TARGET is a config, a run or an adapter directory. With --adapters several are combined into a
    model, or with --to adapter into a new adapter.

    \b
      llmtune merge runs/quickstart
      llmtune merge runs/quickstart/adapter --out merged --strength 0.7
      llmtune merge runs/quickstart --base auto --dry-run
      llmtune merge --adapters runs/a=0.6 runs/b=0.4 --method ties --out merged
    """
    show_progress(quiet)
    chosen = {"base": base, "strength": strength, "max_kl": max_kl}
    given = {name: value for name, value in chosen.items() if value is not None}
    settings = MergeSettings(dtype, device)
    if adapters:
        words = [*adapters, *([target] if target else []), *overrides]
        how = Combination(method, density, rank, seed)
        combined = _combine(words, how, given, settings, _Result(out, to, dry_run, force))
        print_result(combined, as_json, lambda: _describe_combined(combined, dry_run))
        return
    if target is None:
        raise click.UsageError("give a TARGET, or --adapters")
    result = _merge_one(target, overrides, given, settings, _Result(out, to, dry_run, force))
    print_result(result, as_json, lambda: _describe_one(result, dry_run))


@dataclass(frozen=True)
class _Result:
    """Where the result goes, or that there is to be none."""

    out: Path | None
    to: str
    dry_run: bool
    force: bool


def _merge_one(
    target: str,
    overrides: tuple[str, ...],
    given: Mapping[str, Any],
    settings: MergeSettings,
    wanted: _Result,
) -> Mapping[str, Any]:
    from llmtune.runs.targets import resolve_target

    named = resolve_target(target, overrides)
    if named.config is not None:
        more = tuple(f"merge.{name}={value}" for name, value in given.items())
        named = resolve_target(target, (*overrides, *more))
    if named.adapter_dir is None and named.config is None and not Path(target).exists():
        raise LlmtuneError(f"{target}: no such file or directory; expected a run or an adapter")
    knobs, out = MergeConfig(**given), wanted.out
    if wanted.dry_run:
        from llmtune.stages import merge_apart

        return merge_apart.plan_merges(named, out, knobs=knobs, settings=settings)
    if out is not None:
        from llmtune.stages import merge_apart

        force = wanted.force
        return merge_apart.merge_into(named, out, knobs=knobs, settings=settings, force=force)
    if named.config is None:
        raise LlmtuneError(f"{target}: is not a run; say where the merged model goes with --out")
    from llmtune.runs import pipeline

    return pipeline.merge(named.config, force=wanted.force, settings=settings)


def _combine(
    words: Sequence[str],
    how: Combination,
    given: Mapping[str, Any],
    settings: MergeSettings,
    wanted: _Result,
) -> Mapping[str, Any]:
    """Take `model.*=value` among the words for an override, and all others for adapters."""
    from llmtune.stages import merge_apart
    from llmtune.stages.merge_adapters import CombineRequest

    if wanted.out is None:
        raise LlmtuneError("--adapters: say where the result goes with --out")
    if "strength" in given:
        raise LlmtuneError("--strength: the adapters have their weights; leave it away")
    request = CombineRequest(
        adapters=[word for word in words if not word.startswith("model.")],
        overrides=[word for word in words if word.startswith("model.")],
        how=how,
        out_dir=wanted.out,
        to_adapter=wanted.to == "adapter",
        knobs=MergeConfig(**given),
        settings=settings,
    )
    if wanted.dry_run and not request.to_adapter:
        return merge_apart.plan_combination(request)
    if wanted.dry_run:
        raise LlmtuneError("--dry-run plans a model; a new adapter is small, so just make it")
    return merge_apart.combine(request, force=wanted.force)


def _describe_one(result: Mapping[str, Any], dry_run: bool) -> str:
    from llmtune.stages.merge_text import describe_plan, describe_result

    return describe_plan(result) if dry_run else describe_result(result)


def _describe_combined(result: Mapping[str, Any], dry_run: bool) -> str:
    from llmtune.stages.merge_text import describe_combined, describe_plan

    return describe_plan(result) if dry_run else describe_combined(result)
