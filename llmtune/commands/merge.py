"""merge: one adapter, or several, added into their base."""

from collections.abc import Callable, Mapping, Sequence
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
from llmtune.io.manifest import MergeRecord
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
    asked = _Asked(out, given, MergeSettings(dtype, device), dry_run, force)
    if adapters:
        words = [*adapters, *([target] if target else []), *overrides]
        how = Combination(method, density, rank, seed)
        result, text = _combine(words, how, asked, to_adapter=to == "adapter")
    elif target is None:
        raise click.UsageError("give a TARGET, or --adapters")
    else:
        result, text = _merge_one(target, overrides, asked)
    print_result(result, as_json, text)


@dataclass(frozen=True)
class _Asked:
    """What was asked for with options, of one adapter as of several."""

    out: Path | None
    given: Mapping[str, Any]
    """Keys of the `merge` section."""
    settings: MergeSettings
    dry_run: bool
    force: bool


Shown = tuple[Mapping[str, Any], Callable[[], str]]
"""A result as JSON values, and how it is shown to people."""


def _merge_one(target: str, overrides: tuple[str, ...], asked: _Asked) -> Shown:
    from llmtune.runs.targets import resolve_target

    named = resolve_target(target, overrides)
    if named.config is not None:
        more = tuple(f"merge.{name}={value}" for name, value in asked.given.items())
        named = resolve_target(target, (*overrides, *more))
    if named.adapter_dir is None and named.config is None and not Path(target).exists():
        raise LlmtuneError(f"{target}: no such file or directory; expected a run or an adapter")
    knobs, settings = MergeConfig(**asked.given), asked.settings
    if asked.dry_run:
        from llmtune.runs import merge_apart

        planned = merge_apart.plan_merges(named, asked.out, knobs=knobs, settings=settings)
        return planned.to_dict(), planned.describe
    result: MergeRecord
    if asked.out is not None:
        from llmtune.runs import merge_apart

        result = merge_apart.merge_into(
            named, asked.out, knobs=knobs, settings=settings, force=asked.force
        ).to_record()
    elif named.config is not None:
        from llmtune.runs import pipeline

        result = pipeline.merge(named.config, force=asked.force, settings=settings)
    else:
        raise LlmtuneError(f"{target}: is not a run; say where the merged model goes with --out")
    return result, lambda: _format_merge(result)


def _combine(words: Sequence[str], how: Combination, asked: _Asked, *, to_adapter: bool) -> Shown:
    """Take `model.*=value` among the words for an override, and all others for adapters."""
    from llmtune.runs import merge_apart

    if asked.out is None:
        raise LlmtuneError("--adapters: say where the result goes with --out")
    if "strength" in asked.given:
        raise LlmtuneError("--strength cannot be used with --adapters; set each adapter's weight")
    combined = merge_apart.Combined(
        adapters=[word for word in words if not word.startswith("model.")],
        overrides=[word for word in words if word.startswith("model.")],
        how=how,
        out_dir=asked.out,
        knobs=MergeConfig(**asked.given),
        settings=asked.settings,
    )
    if to_adapter:
        if asked.dry_run:
            raise LlmtuneError("--dry-run plans a model; a new adapter is small, so just make it")
        new = merge_apart.combine_into_adapter(combined, force=asked.force)
        return new.to_dict(), new.describe
    if asked.dry_run:
        planned = merge_apart.plan_combination(combined)
        return planned.to_dict(), planned.describe
    merged = merge_apart.combine_into_model(combined, force=asked.force)
    return merged.to_dict(), merged.describe


def _format_merge(result: MergeRecord) -> str:
    """Say how close each base came if both were tried, and where the merged model is."""
    lines = [
        f"{name:<11} KL {score['kl']:.2e} nats/token, top-1 agreement "
        f"{score['top1_agreement']:.2%}, perplexity {score['perplexity']:.3f} "
        f"(live {score['live_perplexity']:.3f})"
        for name, score in result.get("candidates", {}).items()
    ]
    lines.append(f"merged model saved in {result['out_dir']} ({result['base']} base)")
    return "\n".join(lines)
