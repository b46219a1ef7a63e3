"""The rotary embedding of a config.json, old style or new, in llama.cpp's words."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DEFAULT_THETA = 10_000.0


@dataclass(frozen=True)
class Rope:
    """One rotary embedding: `kind` is transformers' rope_type, `scaling` its other numbers."""

    theta: float
    kind: str
    partial: float  # the share of a head's dimensions that turn
    scaling: Mapping[str, Any]


def read_rope(config: Mapping[str, Any]) -> Rope:
    """Read `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    values = dict(config.get("rope_parameters") or {})
    values |= {k: v for k, v in (config.get("rope_scaling") or {}).items() if k not in values}
    kind = values.pop("rope_type", None) or values.pop("type", None) or "default"
    values.pop("type", None)
    theta = values.pop("rope_theta", None) or config.get("rope_theta") or DEFAULT_THETA
    partial = values.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or 1
    return Rope(float(theta), kind, float(partial), values)


def rope_problem(rope: Rope) -> str | None:
    """Say what llama.cpp's file format cannot express of this embedding, or None."""
    allowed = {
        "default": set(),
        "linear": {"factor"},
        "yarn": {"factor", "original_max_position_embeddings"},
        "llama3": {
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        },
    }
    if rope.kind not in allowed:
        return f"rope scaling {rope.kind!r} is not supported; expected one of {sorted(allowed)}"
    unknown = {name for name, value in rope.scaling.items() if value is not None}
    unknown -= allowed[rope.kind]
    if unknown:
        return f"rope scaling {rope.kind!r} with {sorted(unknown)} is not supported"
    missing = allowed[rope.kind] - rope.scaling.keys() - {"original_max_position_embeddings"}
    if missing:
        return f"rope scaling {rope.kind!r} lacks {sorted(missing)}"
    return None


def llama3_factors(rope: Rope, head_dim: int, context_length: int) -> list[float]:
    """Return what each frequency is divided by under Llama 3.1's scaling, [head_dim / 2].

    Short waves stay, long ones are stretched by `factor`, those between are blended (the formula
    of transformers' `_compute_llama3_parameters`).
    """
    factor = float(rope.scaling["factor"])
    low, high = (float(rope.scaling[f"{name}_freq_factor"]) for name in ("low", "high"))
    old_length = rope.scaling.get("original_max_position_embeddings") or context_length
    factors = []
    for dimension in range(0, head_dim, 2):
        wave_length = 2 * math.pi * rope.theta ** (dimension / head_dim)
        if wave_length < old_length / high:
            factors.append(1.0)
        elif wave_length > old_length / low:
            factors.append(factor)
        else:
            smooth = (old_length / wave_length - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors
