"""plan: what a run will need, before it is started."""

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmtune.commands.options import (
    CONFIG_ARGUMENT,
    OVERRIDES_ARGUMENT,
    print_result,
    with_output_options,
)
from llmtune.io.sizes import format_apart, format_in, format_size

if TYPE_CHECKING:
    from llmtune.planning.plan import Plan

POSITIVE = click.FloatRange(min=0, min_open=True)


@click.command()
@CONFIG_ARGUMENT
@OVERRIDES_ARGUMENT
@click.option("--gpu", help="Plan for a different device: 24GB, or a name such as rtx4090 or h100.")
@click.option("--gpus", type=click.IntRange(1), help="GPUs of a machine that share each step.")
@click.option("--nodes", type=click.IntRange(1), help="Machines with as many GPUs each.")
@click.option("--link", type=POSITIVE, help="GB/s between the GPUs, of the slowest link.")
@click.option("--step-seconds", type=POSITIVE, help="A step on one such GPU, as you measured it.")
@click.option("--measure", is_flag=True, help="Time this CPU's matrix products for the estimate.")
@click.option("--merge", is_flag=True, help="Also plan the merge, as a run does before it trains.")
@with_output_options
def plan(  # noqa: PLR0913 - one argument for each option
    config: Path,
    overrides: tuple[str, ...],
    gpu: str | None,
    gpus: int | None,
    nodes: int | None,
    link: float | None,
    step_seconds: float | None,
    measure: bool,
    merge: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Say what a run needs: memory, disk, time; exit code 1 if it does not fit.

    CONFIG is a YAML file or a run directory.
    Nothing is loaded: the numbers are from config.json and the headers of the weights.

    \b
      llmtune plan configs/quickstart.yaml
      llmtune plan my.yaml --gpu 24GB
      llmtune plan my.yaml --gpu 80GB --gpus 8 --nodes 2
      llmtune plan my.yaml --merge
      llmtune plan my.yaml model.quantization=null data.max_length=4096 --gpu rtx4090 --json
    """
    from llmtune.runs import pipeline
    from llmtune.runs.targets import require_run

    run = require_run(str(config), overrides)
    spread = pipeline.read_spread(gpus, nodes, link, step_seconds)
    found = pipeline.plan(run, gpu=gpu, measure=measure, spread=spread)
    merged = pipeline.plan_merge(run) if merge else None
    num_merged = None if merged is None else merged.num_changed
    exports = pipeline.plan_exports(run)
    values = {**found.as_json(), **({"merge": merged.to_dict()} if merged else {})}
    values |= {"exports": list(exports)} if exports else {}
    print_result(values, as_json, lambda: _render(found, quiet, num_merged, exports))
    if not found.fits:
        raise click.exceptions.Exit(1)


def _render(
    found: "Plan", quiet: bool, num_merged: int | None, exports: tuple[str, ...]
) -> RenderableType:
    verdict = Text("fits" if found.fits else "does not fit", "green" if found.fits else "bold red")
    memory = found.memory
    needed, there = format_apart(memory.total_bytes, memory.memory_bytes)
    headline = Text.assemble(verdict, f": {needed} of {there} on {found.device.name}")
    if quiet:
        return headline
    parts: list[RenderableType] = [headline, Text(), _components(found)]
    parts += [Text(line) for line in _lines(found)]
    parts += [Text(f"note         {notice}", "yellow") for notice in found.notices]
    if num_merged is not None:
        parts.append(Text(f"merge        {num_merged} tensors of the base would get the adapter"))
    parts += [Text(f"export       {line}") for line in exports]
    if found.advice:
        parts.append(Text("\nWhat makes it fit:", "bold"))
        parts += [Text(f"  {line}") for line in found.advice]
    return Group(*parts)


def _components(found: "Plan") -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("memory")
    table.add_column("", justify="right")
    for name, size in found.memory.components.items():
        kept = ", ".join(f"{kind} {format_size(part)}" for kind, part in found.memory.base.items())
        label = f"base ({kept})" if name == "base" and len(found.memory.base) > 1 else name
        table.add_row(label, format_size(size))
    table.add_row("in all", format_size(found.memory.total_bytes), style="bold")
    return table


def _lines(found: "Plan") -> list[str]:
    memory, disk, rows = found.memory, found.disk, found.rows
    written = ", ".join(f"{name} {format_size(size)}" for name, size in disk.components.items())
    needed, free = format_apart(disk.total_bytes, disk.free_bytes)
    a_token = format_in(memory.bytes_a_token, "MiB", digits=2)
    lines = [
        "",
        f"model        {found.shape.num_parameters / 1e9:.3g} billion parameters"
        f"{_active(found)}, {found.adapter_parameters / 1e6:.1f} million trained",
        f"rows         longest {rows.longest} tokens, mean {rows.mean:.0f}: {rows.source}",
        f"micro-batch  {memory.tokens} tokens at once, {memory.recomputed_layers} of "
        f"{memory.layers} layers recomputed, {a_token} a token",
        f"disk         {needed} ({written}); {free} free{'' if disk.fits else ': too little'}",
    ]
    if found.seconds is not None:
        lines.append(
            f"time         {_duration(found.seconds)} for {found.tokens:,} tokens in "
            f"{found.steps} steps, training alone; {found.rate.source}"
        )
    else:
        lines.append("time         not known: the rows were not counted, and there is no max_steps")
    return lines if found.scaling is None else [*lines, *found.scaling.lines()]


def _active(found: "Plan") -> str:
    if not found.shape.experts:
        return ""
    return f" ({found.shape.active_parameters / 1e9:.3g} billion used by a token)"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 100 else f"{hours / 24:.0f} days"
