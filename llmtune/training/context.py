"""What a run carries along: its settings, its totals, and the steps just done."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from llmtune.io.interrupt import Interruption
from llmtune.io.run_dir import RunDir
from llmtune.training.checkpoint import read_progress
from llmtune.training.config import TrainConfig
from llmtune.training.loss import HeadChoice
from llmtune.training.metrics import ProgressLine
from llmtune.training.protect.penalties import Protection


@dataclass(frozen=True)
class StepRecord:
    """A step that was just done: its rows and losses, one entry a micro-batch."""

    step: int
    rows: list[list[int]]
    losses: list[Tensor]


@dataclass
class RunTotals:
    """What the run has done so far; it survives a resume."""

    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_eval_loss: float | None = None
    stale_evaluations: int = 0
    has_stopped_early: bool = False
    final_loss: float | None = None
    final_eval_loss: float | None = None

    def restore(self, checkpoint: Path) -> None:
        """Take over what a checkpoint recorded."""
        for name, value in read_progress(checkpoint)["totals"].items():
            setattr(self, name, value)


@dataclass(frozen=True)
class RunContext:
    """What the trainer needs besides trl's arguments."""

    config: TrainConfig
    run: RunDir
    identity: Mapping[str, str]
    head: HeadChoice
    autocast_dtype: torch.dtype | None
    progress: ProgressLine
    interruption: Interruption
    seed: int
    evaluation_rows: Mapping[str, list[int]]
    """Source -> its evaluation rows, as the collator numbers them."""
    train_sources: Mapping[int, str]
    """`Example.source_index` -> name, of the sources that are trained on."""
    choices: Mapping[str, str]
    totals: RunTotals = field(default_factory=RunTotals)
    protection: Protection | None = None
