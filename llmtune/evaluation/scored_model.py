"""What an evaluation is given: a loaded model, its tokenizer, and who they are."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerFast

from llmtune.data.template import stop_token_ids


@dataclass(frozen=True)
class ModelIdentity:
    """What is scored, as the caller knows it: fingerprints of base and adapter, and precision."""

    base: str
    adapter: str | None
    dtype: str
    quantization: str


@dataclass(frozen=True)
class ScoredModel:
    """A loaded model with what is needed to ask it and to name it in results.

    `stop_token_ids` end a written answer: all of a loaded model's (its generation config may name
    more than its tokenizer); None takes the tokenizer's.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerFast
    identity: ModelIdentity
    stop_token_ids: tuple[int, ...] | None = None

    @property
    def stops(self) -> tuple[int, ...]:
        """The ids that end a written answer."""
        if self.stop_token_ids is None:
            return tuple(stop_token_ids(self.tokenizer))
        return self.stop_token_ids
