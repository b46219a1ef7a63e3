"""What a run leaves on disk, and the room there is."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmtune.planning.weights import FLOAT32, STATES_PER_WEIGHT
from llmtune.training.config import TrainConfig

TOKENIZER_BYTES = 8 << 20
"""Tokenizer and small files beside an adapter or a merged model."""


@dataclass(frozen=True)
class DiskEstimate:
    """Bytes a run writes, by what they are, and what is free where it writes."""

    components: Mapping[str, int]
    free_bytes: int

    @property
    def total_bytes(self) -> int:
        """Return the bytes of all components."""
        return sum(self.components.values())

    @property
    def fits(self) -> bool:
        """Say whether the free space is enough."""
        return self.total_bytes <= self.free_bytes


def estimate_disk(
    train: TrainConfig, *, adapter_parameters: int, merged_bytes: int, run_dir: Path
) -> DiskEstimate:
    """Estimate checkpoints, adapter and merged model.

    One checkpoint more than are kept exists while it is written, and another with early stopping.
    """
    checkpoint = adapter_parameters * (FLOAT32 + STATES_PER_WEIGHT[train.optimizer])
    kept = train.keep_checkpoints + 1 + (1 if train.early_stopping else 0)
    place = run_dir.absolute()
    while not place.exists():
        place = place.parent
    return DiskEstimate(
        {
            "checkpoints": round(kept * checkpoint),
            "adapter": FLOAT32 * adapter_parameters + TOKENIZER_BYTES,
            "merged model": merged_bytes + TOKENIZER_BYTES,
        },
        shutil.disk_usage(place).free,
    )
