"""The optimizers a run can use, which parameters get which learning rate, and its course."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from llmtune.errors import LlmtuneError
from llmtune.training.config import OptimizerName, TrainConfig

FLOAT32 = 4
BLOCK = 256  # weights that share one float32 scale in bitsandbytes' 8-bit states
EIGHT_BIT = 1 + FLOAT32 / BLOCK


@dataclass(frozen=True)
class OptimizerKind:
    """An optimizer: what transformers calls it, and the bytes it keeps for a trained weight."""

    library_name: str
    state_bytes: float
    needs_gpu: bool = False


OPTIMIZERS: Mapping[OptimizerName, OptimizerKind] = MappingProxyType(
    {
        "adamw": OptimizerKind("adamw_torch_fused", 2 * FLOAT32),
        "adamw_8bit": OptimizerKind("adamw_bnb_8bit", 2 * EIGHT_BIT),
        "paged_adamw_8bit": OptimizerKind("paged_adamw_8bit", 2 * EIGHT_BIT, needs_gpu=True),
        "lion": OptimizerKind("lion_32bit", FLOAT32),
        "lion_8bit": OptimizerKind("lion_8bit", EIGHT_BIT),
        # A row and a column for a matrix: a quarter of its size at rank 4, less above.
        "adafactor": OptimizerKind("adafactor", FLOAT32 / 4),
    }
)


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a peak learning rate and a weight decay."""

    names: tuple[str, ...]
    learning_rate: float
    weight_decay: float


def group_parameters(
    names: Sequence[str], decayed: Sequence[str], config: TrainConfig
) -> list[ParameterGroup]:
    """Split the trained parameters into groups: by learning rate, those with decay first.

    Args:
        names: every trained parameter, in the model's order.
        decayed: those of them that weight decay applies to.

    Raises:
        LlmtuneError: a key of `learning_rates` is in no parameter's name.
    """
    keys = sorted(config.learning_rates, key=lambda key: (-len(key), key))
    unused = [key for key in config.learning_rates if not any(key in name for name in names)]
    if unused:
        raise LlmtuneError(
            f"train.learning_rates: {', '.join(unused)} is in no trained parameter's name; names "
            f"are such as {names[0]} and {names[-1]}"
        )
    has_decay = set(decayed)
    rates = [config.learning_rate, *(config.learning_rates[key] for key in keys)]
    members: dict[tuple[float, float], list[str]] = {
        pair: [] for pair in itertools.product(rates, (config.weight_decay, 0.0))
    }
    for name in names:
        key = next((key for key in keys if key in name), None)
        rate = config.learning_rate if key is None else config.learning_rates[key]
        members[rate, config.weight_decay if name in has_decay else 0.0].append(name)
    return [
        ParameterGroup(tuple(group), rate, decay)
        for (rate, decay), group in members.items()
        if group
    ]


def learning_rate_factor(config: TrainConfig, step: int, total_steps: int) -> float:
    """Return the share of the peak learning rate that the step after `step` steps uses.

    The warm-up starts at 1 / (warmup steps + 1), not at 0: no step is wasted. After it the rate
    follows the schedule, which would reach `min_lr_ratio` right after the last step.
    """
    warmup_steps = config.num_warmup_steps(total_steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * _height(config, progress)


def _height(config: TrainConfig, progress: float) -> float:
    """Return the height of the schedule, 1 at its peak, after this share of it."""
    match config.schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - progress
        case "warmup_stable_decay":
            return min(1.0, (1.0 - progress) / config.decay_ratio)
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        case "cosine_with_restarts":
            if progress >= 1:
                return 0.0
            return 0.5 * (1.0 + math.cos(math.pi * (config.num_cycles * progress % 1.0)))
