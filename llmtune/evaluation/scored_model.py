"""What an evaluation is given: a loaded model, its tokenizer, and who they are."""

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerFast

from llmtune.models.turns import stop_token_ids


@dataclass(frozen=True)
class ModelIdentity:
    """What is scored, as the caller knows it: fingerprints of base and adapter, and precision."""

    base: str
    adapter: str | None
    dtype: str
    quantization: str
    strength: float | None = None
    """How much of the adapter is on; None is all of it."""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for JSON; a strength only where it is not the whole adapter."""
        values = asdict(self)
        if self.strength is None:
            del values["strength"]
        return values


@dataclass(frozen=True)
class ScoredModel:
    """A loaded model with what is needed to ask it and to name it in results.

    `stop_token_ids` end a written answer; None takes those of tokenizer and generation config.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerFast
    identity: ModelIdentity
    stop_token_ids: tuple[int, ...] | None = None

    @property
    def stops(self) -> tuple[int, ...]:
        """The ids that end a written answer."""
        if self.stop_token_ids is None:
            return stop_token_ids(self.tokenizer, getattr(self.model, "generation_config", None))
        return self.stop_token_ids
