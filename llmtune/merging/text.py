"""Merges and their plans in words, for the terminal."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmtune.io.sizes import MIB, format_apart
from llmtune.io.unfinished import free_bytes

if TYPE_CHECKING:
    from llmtune.merging.changes import WeightedAdapter
    from llmtune.merging.checked import PlannedMerges
    from llmtune.merging.several_adapters import CombinedMerge, NewAdapter

LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def format_plans(planned: "PlannedMerges") -> str:
    """Say which tensors get which delta, one line for like-named ones, and what the disk needs."""
    lines: list[str] = []
    for plan in planned.plans:
        lines += _plan_lines(plan.to_dict())
    needed, free = format_apart(planned.needed_bytes, free_bytes(planned.out_dir))
    lines.append(f"on the disk: {needed} needed, {free} free")
    lines.append("nothing was written")
    return "\n".join(lines)


def format_merge(result: Mapping[str, Any]) -> str:
    """Say how close each base came if both were tried, and where the merged model is.

    Args:
        result: `CheckedMerge` as JSON, which a run's manifest also keeps.
    """
    lines = [
        f"{name:<11} KL {score['kl']:.2e} nats/token, top-1 agreement "
        f"{score['top1_agreement']:.2%}, perplexity {score['perplexity']:.3f} "
        f"(live {score['live_perplexity']:.3f})"
        for name, score in result.get("candidates", {}).items()
    ]
    lines.append(f"merged model saved in {result['out_dir']} ({result['base']} base)")
    return "\n".join(lines)


def format_combined_merge(combined: "CombinedMerge") -> str:
    """Say what a model of several adapters was made of."""
    out_dir = combined.merged.result.out_dir
    parts = _format_parts(combined.adapters)
    return f"{parts}: merged model saved in {out_dir} ({combined.method})"


def format_new_adapter(new: "NewAdapter") -> str:
    """Say what a new adapter was made of, and what cutting the rank lost."""
    made = new.made
    ranks = ", ".join(f"{count} of rank {rank}" for rank, count in made.ranks.items())
    lines = [f"{_format_parts(new.adapters)}: adapter saved in {made.out_dir}, {ranks}"]
    if made.lost_energy:
        lines.append(
            f"cutting the rank lost {made.lost_energy:.2%} of the deltas' energy, at most "
            f"{made.worst_lost_energy:.2%} in {made.worst_module}"
        )
    return "\n".join(lines)


def _format_parts(adapters: Sequence["WeightedAdapter"]) -> str:
    return " + ".join(f"{one.weight:g} x {one.directory}" for one in adapters)


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
    return bool(tensor["is_dequantized"]) and tensor["change"] != "dequantized"


def _delta_text(delta: Mapping[str, Any]) -> str:
    weight = f" x {delta['weight']:g}" if delta["weight"] != 1 else ""
    return f"rank {delta['rank']} scaling {delta['scaling']:g}{weight}"
