"""A first config for a user's rows, as commented YAML."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llmtune.adapters.config import DEFAULT_ADAPTER
from llmtune.data.config import SourceConfig
from llmtune.data.init import DataDescription
from llmtune.data.init_suite import NoSuite
from llmtune.models.quantization.config import DENSE, SMALLEST
from llmtune.schema import default_of

BATCH_SIZES = ((200, 4), (1000, 8), (math.inf, 16))
"""Below so many rows, so many in a step."""
FEWEST_STEPS = 300
"""Optimizer steps after which most small tasks are learned; fewer rows are seen more often."""
MOST_EPOCHS = {"text": 3, "instruct": 4, "chat": 6}
"""Passes after which open answers are rather learned by heart; by the job, else `EPOCHS_ELSE`."""
EPOCHS_ELSE = 10
SHOWN_KNOBS = ("method", "rank", "alpha", "target_modules")
"""What a first config says of its adapter, so that one sees what to change."""
DEFAULT_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
WRITTEN_KEYS = (
    "columns",
    "ignore",
    "instruction",
    "labels",
    "render",
    "encoding",
    "delimiter",
    "split",
)


@dataclass(frozen=True)
class FirstTraining:
    """What a first config says beside the data, and why."""

    learning_rate: float = 2e-4
    rate_reason: str = "common for LoRA; with --base it follows the base"
    is_quantized: bool = False
    quantized_reason: str = "the base would not fit otherwise"


def first_length(found: DataDescription) -> tuple[int, int]:
    """Return the passes over the rows and the rows of a step, enough to learn a small task."""
    rows = found.num_trained_rows
    batch_size = next(size for most, size in BATCH_SIZES if rows < most)
    wanted = math.ceil(FEWEST_STEPS * batch_size / rows)
    return min(MOST_EPOCHS.get(found.job.name, EPOCHS_ELSE), max(1, wanted)), batch_size


def render_config(
    found: DataDescription,
    *,
    base: str | None = None,
    suite: str | None = None,
    training: FirstTraining | None = None,
    name: str | None = None,
) -> str:
    """Return a commented YAML config for the data, ready for `llmtune run`.

    `suite` is where the drafted suite is written; None if there is none. `name` is that of the run;
    None takes the file's.
    """
    training = training or FirstTraining()
    name = name or Path(found.train_path).name.split(".")[0]
    name = re.sub(r"[^\w-]+", "-", name).strip("-") or "run"
    knobs = DEFAULT_ADAPTER.model_dump(mode="json")
    adapter = {name: knobs[name] for name in SHOWN_KNOBS if name in knobs}
    lines = [
        _comment(
            f"Written by llmtune init from {found.train_path}: {found.count_rows()}, "
            f"{found.reason}."
        ),
        _comment(f"The job: {found.job.describe()}."),
        "# Look at what is trained with: llmtune data show THIS_FILE",
        f"run_dir: {_yaml(f'runs/{name}')}",
        "seed: 0",
        "",
        "model:",
        f"  base: {_yaml(base or DEFAULT_BASE)}   # a directory, a .gguf file or a hub id",
        _quantization_line(training),
        "",
        f"adapter: {_yaml(adapter)}",
        "",
        *_data_lines(found),
        "",
        *_train_lines(found, training),
        "",
        "protect:",
        "  kl_to_base: {weight: 1.0}   # hold the model near its base, so that it still chats",
        "",
        "merge:",
        "  base: auto   # whichever base weights come closer to what was trained",
        "",
        "evaluate:",
        "  suites:",
        *_suite_lines(found, suite),
        "    - general   # general knowledge that ships with llmtune: what was forgotten?",
        "    # - knowledge_hard   # harder; add it if the base scores over 85 % on general",
        "    - chat   # open chat, held to the base's own answers: does it still answer?",
    ]
    return "\n".join(lines) + "\n"


def _quantization_line(training: FirstTraining) -> str:
    if training.is_quantized:
        why = training.quantized_reason
        return f"  quantization: {{method: {SMALLEST.method}}}   # {SMALLEST.bits} bits: {why}"
    return (
        f"  quantization: null   # {DENSE.bits} bits; {{method: {SMALLEST.method}}} if memory is "
        "short"
    )


def _data_lines(found: DataDescription) -> list[str]:
    measured = "counted with the base's tokenizer" if found.is_measured else "guessed from the text"
    lines = ["data:", "  train:", f"    - {_source_yaml(found.source)}"]
    if found.evaluation is not None:
        lines += ["  evaluation:", f"    - {_source_yaml(found.evaluation)}"]
    else:
        share = found.evaluation_share
        lines.append(
            f"  evaluation_share: {share}   # held out by a hash of each row"
            if share
            else "  evaluation_share: 0   # too few rows to hold some out; give a file of them"
        )
    lines += ["  " + _comment(note) for note in found.notes]
    lines += ["  " + _comment(f"left out: {name}") for name in found.left_out]
    lines.append(
        f"  max_length: {found.max_length}   # tokens; the longest row has {found.longest:,} "
        f"({measured})"
    )
    if found.is_split:
        lines.append("  length_policy: split   # longer documents, into pieces")
    if found.is_too_long:
        lines.append(
            f"  length_policy: drop   # the base has {found.positions:,} positions, and longer "
            "rows are left out"
        )
    lines.append(f"  loss_on: {'assistant' if found.has_answers else 'all'}")
    if found.bad_rows:
        lines += [
            f"  on_bad_row: drop   # {found.bad_rows} of {found.num_rows} rows cannot be used, see "
            "llmtune data check; the first:",
            "  " + _comment(found.first_bad_row or ""),
        ]
    return lines


def _train_lines(found: DataDescription, training: FirstTraining) -> list[str]:
    epochs, batch_size = first_length(found)
    steps = epochs * math.ceil(found.num_trained_rows / batch_size)
    times = "once" if epochs == 1 else f"{epochs} times"
    return [
        "train:",
        f"  learning_rate: {training.learning_rate:.1e}   # {training.rate_reason}",
        f"  num_epochs: {epochs}   # each {found.unit} is seen {times}: about {steps:,} steps",
        f"  batch_size: {batch_size}",
    ]


def _suite_lines(found: DataDescription, path: str | None) -> list[str]:
    draft = found.suite
    if isinstance(draft, NoSuite) or path is None:
        reason = f" ({draft.reason})" if isinstance(draft, NoSuite) else ""
        return [
            f"    # your own task's suite is missing{reason}: without one there is no verdict;",
            "    # a suite is a short YAML file, see docs/evaluation.md",
        ]
    asked = "items of the test rows" if found.test is not None else "held-out items"
    return [f"    - {_yaml(path)}   # {len(draft.items)} {asked}: did it learn the task?"]


def _source_yaml(source: SourceConfig) -> str:
    written: dict[str, Any] = {"path": source.path, "format": source.format}
    for key in WRITTEN_KEYS:
        value = getattr(source, key)
        if value != default_of(SourceConfig, key):
            written[key] = list(value) if isinstance(value, tuple) else value
    return _yaml(written)


def _yaml(value: Any) -> str:
    """Return a value as YAML on one line, whatever characters it holds."""
    text = yaml.safe_dump(
        value, default_flow_style=True, allow_unicode=True, width=math.inf, sort_keys=False
    )
    return text.removesuffix("...\n").strip()


def _comment(text: str) -> str:
    """Return text as one comment: what would end the line is a space in it."""
    return "# " + " ".join("".join(c if c.isprintable() else " " for c in text).split())
