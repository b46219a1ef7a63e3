"""Configs of other tools: whose one is, and what their names are called here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

TABLE = Path(__file__).with_name("foreign_keys.yaml")
FEWEST_MARKS = 2
"""Keys that only one tool has, for a file to be taken for its config."""


@dataclass(frozen=True)
class ForeignKey:
    """What becomes of one key of a different tool."""

    to: str | None = None
    """Our key."""
    reading: str | None = None
    """How its value is read, if not as it is."""
    note: str | None = None
    """What it means here that it does not mean there."""
    none: str | None = None
    """Why it has no counterpart."""
    skip: str | None = None
    """Why it needs none."""
    part: str | None = None
    """What it is read for, together with other keys."""


@dataclass(frozen=True, eq=False)
class ForeignTool:
    """A tool whose configs can be imported."""

    name: str
    title: str
    marks: frozenset[str]
    needed: frozenset[str]
    keys: Mapping[str, ForeignKey] = field(repr=False)


@cache
def foreign_tools() -> tuple[ForeignTool, ...]:
    """Return the tools that are known."""
    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return tuple(
        ForeignTool(
            name,
            one["title"],
            frozenset(one["marks"]),
            frozenset(one["needed"]),
            {key: _read(value) for key, value in one["keys"].items()},
        )
        for name, one in table.items()
        if "title" in one
    )


def recognize_tool(values: Mapping[Any, Any]) -> ForeignTool | None:
    """Return the tool that a config is of, if it has what only that tool's configs have."""
    found = {
        tool: len(tool.marks & set(values))
        for tool in foreign_tools()
        if tool.needed <= set(values)
    }
    best = max(found, key=lambda tool: found[tool], default=None)
    return best if best is not None and found[best] >= FEWEST_MARKS else None


def our_name(foreign: str) -> str | None:
    """Say what the setting that other tools call `foreign` is called here; None if not known."""
    for tool in foreign_tools():
        key = tool.keys.get(foreign)
        if key is not None and key.to is not None:
            return f"{foreign} is {key.to} here"
        if key is not None and key.part in PARTS:
            return f"{foreign} is {PARTS[key.part]} here"
    return OTHERS.get(foreign)


PARTS = {
    "quantization": "model.quantization",
    "batch": "train.batch_size (rows of a whole optimizer step)",
    "length": "train.num_epochs or train.max_steps",
    "datasets": "data.train",
    "template": "the base's own chat template, or a file in model.chat_template",
    "longer_dropped": "data.max_length",
    "longer_cut": "data.max_length",
    "method": "adapter.method",
    "start": "adapter.init",
    "modules": "adapter.target_modules",
    "dtype": "model.dtype",
    "loss": "data.loss_on",
}
OTHERS = {"qlora": "qlora is model.quantization with adapter.method here", "lr": "lr is "
          "train.learning_rate here", "epochs": "epochs is train.num_epochs here"}  # fmt: skip


def _read(value: Any) -> ForeignKey:
    if isinstance(value, str):
        return ForeignKey(to=value)
    names = {"as": "reading"}
    return ForeignKey(**{names.get(key, key): given for key, given in value.items()})
