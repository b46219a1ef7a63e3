"""What training is given, where it starts, and what it gives back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from llmtune.data.example import Example
from llmtune.io.processes import ALONE, Processes
from llmtune.io.run_dir import RunDir
from llmtune.training.protect.penalties import ProtectionRequest

Technique = Literal["fused_lora", "fused_blocks", "frozen_head", "packing", "shared_beginnings"]


@dataclass(frozen=True)
class TrainRequest:
    """What is trained on what.

    `identity` names what the run is made of (data, base, config: name to hash). It is recorded in
    every checkpoint, and a run is only ever continued from one with the same identity.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    train: Sequence[Example]
    evaluation: Sequence[Example]
    run: RunDir
    seed: int
    identity: Mapping[str, str]
    packing: Literal["auto", "on", "off"] = "auto"
    quiet: bool = False
    without: frozenset[Technique] = frozenset()
    """Techniques to leave out, to measure what each gives or to find a fault."""
    reasons: Mapping[Technique, str] = field(default_factory=dict)
    """Why they are left out; "as asked" if nothing is said."""
    protection: ProtectionRequest | None = None
    """What holds the adapter near its base."""
    processes: Processes = ALONE
    """Those that share each step's rows; the first one writes."""
    is_sharded: bool = False
    """Whether they have a part each of the base, so that a forward pass is one of all of them."""

    def why_without(self, technique: Technique) -> str | None:
        """Return why a technique is left out, or None if it is not."""
        if technique not in self.without:
            return None
        return self.reasons.get(technique, "as asked")


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
    owes_evaluation: bool = False
    """Whether the evaluation of the last step was interrupted; it is made up on resume."""

    def is_done(self, steps: int, total_steps: int) -> bool:
        """Whether nothing is left to do after `steps`."""
        return not self.owes_evaluation and (steps >= total_steps or self.has_stopped_early)


@dataclass(frozen=True)
class Start:
    """Where a run begins: at a checkpoint, or at step 0."""

    checkpoint: Path | None
    steps: int
    total_steps: int
    totals: RunTotals
    identity: Mapping[str, str]
    """What the run is made of, its training section included; goes into every checkpoint."""

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do."""
        return self.totals.is_done(self.steps, self.total_steps)


@dataclass(frozen=True)
class TrainResult:
    """What came out: totals over the whole run, resumed parts included.

    `final_loss` is the last logged training loss and `final_eval_loss` the last evaluation's
    (nats a trained token); `peak_bytes` is allocated memory on a GPU and resident memory, loading
    included, on a CPU; `best_checkpoint` is relative to the run's directory;
    `choices` says in words what was chosen for this model and machine.
    """

    steps: int
    tokens: int
    trained_tokens: int
    seconds: float
    peak_bytes: int
    final_loss: float
    final_eval_loss: float | None
    best_checkpoint: str | None
    stopped_by: Literal["max_steps", "early_stopping"]
    interrupted_by: str | None = None
    """A signal that came while the last step was being done; the training is complete."""
    choices: dict[str, str] = field(default_factory=dict)
