"""The `protect` section: what keeps a tuned model near its base (light: knobs only)."""

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from llmtune.data.config import DataConfig, SourceConfig
from llmtune.errors import LlmtuneError
from llmtune.schema import Section

OWN_TEXT = "self"
"""The source that is not a file: text that the base itself writes before training."""
KEPT_ROWS = 64
"""Rows that the base writes for the KL penalty."""
KEPT_BYTES = 256 << 20
"""What the base's hidden states of the rows to be held on may take; beyond it they run again."""


def _path_as_source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) and value != OWN_TEXT else value


TextSource = Annotated[Literal["self"] | SourceConfig, BeforeValidator(_path_as_source)]


class ReplayConfig(Section):
    """General text among the training rows, trained like them (arXiv:2502.06042)."""

    source: TextSource
    """A file or hub id (as under `data.train`), or `self`: text that the base writes itself."""
    share: float = Field(default=0.05, gt=0, lt=1)
    """Share of an epoch's rows that are general text."""


class KlToBaseConfig(Section):
    """A penalty for moving away from the base on general text.

    weight * KL(base || tuned), the mean over the tokens of a few rows; the base is the same model
    with its adapter switched off.
    """

    weight: float = Field(default=1.0, gt=0)
    """Factor of the KL (nats/token) beside the training loss."""
    source: TextSource = "self"
    """Text to hold the model on: a file or hub id, or `self`, which the base writes before
    training."""
    rows: int = Field(default=4, ge=1)
    """Rows of that text at a time."""
    every: int = Field(default=1, ge=1)
    """Steps from one time to the next; the KL then counts for all of them, so that the penalty is
    as strong as if it ran in every step."""
    max_length: int = Field(default=128, ge=2)
    """Tokens of a row that are compared."""

    def kept_bytes(self, *, width: int, element_bytes: int, steps: int | None) -> int:
        """Return what the base's hidden states of rows that came together take, at most.

        Args:
            width: of a hidden state.
            element_bytes: of a number in it.
            steps: of the whole run; None if they are not known.
        """
        if steps is None:
            return KEPT_BYTES
        num_rows = steps // self.every * self.rows
        if self.source == OWN_TEXT:
            # Then the rows come together as they did before.
            num_rows = min(num_rows, math.lcm(KEPT_ROWS, self.rows))
        return min(num_rows * (self.max_length - 1) * width * element_bytes, KEPT_BYTES)


class ProtectConfig(Section):
    """What is done during training so that the base's abilities are kept."""

    replay: ReplayConfig | None = None
    """Mix general text into the training rows; null does not."""
    kl_to_base: KlToBaseConfig | None = None
    """Penalize divergence from the base; null does not."""
    l2: float = Field(default=0.0, ge=0)
    """Factor of the squared norm of the adapter's update of the weights, sum |scaling * B A|^2,
    beside the training loss."""

    @property
    def is_on(self) -> bool:
        """Whether anything is asked for."""
        return self != ProtectConfig()

    @property
    def needs_penalty(self) -> bool:
        """Whether a step's loss gets a term of its own."""
        return self.kl_to_base is not None or self.l2 > 0

    @property
    def needs_own_text(self) -> bool:
        """Whether the base must write text before training."""
        sources = [part.source for part in (self.replay, self.kl_to_base) if part is not None]
        return OWN_TEXT in sources


def add_replay(data: DataConfig, protect: ProtectConfig) -> DataConfig:
    """Return the data config with the replay file among its train sources.

    Raises:
        LlmtuneError: a train source is marked `replay` already.
    """
    replay = protect.replay
    if replay is None or isinstance(replay.source, str):
        return data
    if any(source.replay for source in data.train):
        raise LlmtuneError(
            "protect.replay and a data.train source with replay: true say the same thing; "
            "keep one of them"
        )
    return data.model_copy(
        update={
            "train": [*data.train, replay.source.model_copy(update={"replay": True})],
            "mixture": data.mixture.model_copy(update={"replay_share": replay.share}),
        }
    )
