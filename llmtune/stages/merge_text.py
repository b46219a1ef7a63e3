"""A merge and its plan in words, for the terminal."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from llmtune.io.sizes import MIB, format_apart

LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def describe_plan(planned: Mapping[str, Any]) -> str:
    """Say which tensors get which delta, one line for like-named ones, and what the disk needs."""
    lines: list[str] = []
    for plan in planned["plans"]:
        lines += _plan_lines(plan)
    needed, free = format_apart(planned["needed_bytes"], planned["free_bytes"])
    lines.append(f"on the disk: {needed} needed, {free} free")
    lines.append("nothing was written")
    return "\n".join(lines)


def describe_result(result: Mapping[str, Any]) -> str:
    """Say how close either base came where both were tried, and where the merged model lies."""
    lines = [
        f"{name:<11} KL {score['kl']:.2e} nats/token, top-1 agreement "
        f"{score['top1_agreement']:.2%}, perplexity {score['perplexity']:.3f} "
        f"(live {score['live_perplexity']:.3f})"
        for name, score in result.get("candidates", {}).items()
    ]
    lines.append(f"merged model saved in {result['out_dir']} ({result['base']} base)")
    return "\n".join(lines)


def describe_combined(result: Mapping[str, Any]) -> str:
    """Say what was made of several adapters, and what cutting the rank lost."""
    parts = " + ".join(f"{one['weight']:g} x {one['directory']}" for one in result["adapters"])
    if "method" in result:
        return f"{parts}: merged model saved in {result['out_dir']} ({result['method']})"
    ranks = ", ".join(f"{count} of rank {rank}" for rank, count in result["ranks"].items())
    lines = [f"{parts}: adapter saved in {result['out_dir']}, {ranks}"]
    if result["lost_energy"]:
        lines.append(
            f"cutting the rank lost {result['lost_energy']:.2%} of the deltas' energy, at most "
            f"{result['worst_lost_energy']:.2%} in {result['worst_module']}"
        )
    return "\n".join(lines)


def _plan_lines(plan: Mapping[str, Any]) -> Iterator[str]:
    adapters = ", ".join(f"{one['directory']} x {one['weight']:g}" for one in plan["adapters"])
    yield f"{adapters} into the {plan['base']} base {plan['base_dir']}"
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for tensor in plan["changed"]:
        key = (
            LAYER_NUMBER.sub("*", tensor["tensor"]),
            tensor["change"] + (" on dequantized" if _is_delta_on_dequantized(tensor) else ""),
            " x ".join(map(str, tensor["shape"])),
            tensor["dtype"],
            ", ".join(_delta_text(delta) for delta in tensor["deltas"]),
        )
        groups[key].append(tensor["bytes"])
    for (pattern, change, shape, dtype, deltas), sizes in groups.items():
        yield (
            f"  {len(sizes):>4} x {pattern} [{shape}] {dtype}: {change}"
            f"{', ' + deltas if deltas else ''}, {sum(sizes) / MIB:.1f} MiB"
        )
    untouched = plan["tensors"] - len(plan["changed"])
    yield f"  {untouched:>4} tensors copied; {plan['bytes'] / MIB:,.1f} MiB in all"
    yield from (f"  config.json: {key} = {value}" for key, value in plan["config_changes"].items())
    yield from (f"  {notice}" for notice in plan["notices"])


def _is_delta_on_dequantized(tensor: Mapping[str, Any]) -> bool:
    return tensor["is_dequantized"] and tensor["change"] != "dequantized"


def _delta_text(delta: Mapping[str, Any]) -> str:
    weight = f" x {delta['weight']:g}" if delta["weight"] != 1 else ""
    return f"rank {delta['rank']} scaling {delta['scaling']:g}{weight}"
