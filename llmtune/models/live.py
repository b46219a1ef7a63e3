"""One loaded model: what answers, who it is, and what is known of how it was loaded (light)."""

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from llmtune.io.fingerprint import JsonObject
from llmtune.models.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerFast

    from llmtune.models.quantization.describe import QuantizationTable


def is_sharded(weight: object) -> bool:
    """Whether several processes have a part each of a weight, which is whole while it is used."""
    return hasattr(weight, "device_mesh")  # a DTensor, whose class takes half a second to import


@dataclass(frozen=True)
class ModelIdentity:
    """What a result is of: fingerprints of base and adapter, and precision."""

    base: str
    adapter: str | None
    dtype: str
    quantization: str
    strength: float | None = None
    """How much of the adapter is on; None is all of it."""

    def as_dict(self) -> JsonObject:
        """Return the fields for JSON; a strength only if it is not the whole adapter."""
        values = asdict(self)
        if self.strength is None:
            del values["strength"]
        return values


@dataclass(frozen=True)
class LiveModel:
    """A base, alone or with an adapter on it, or a merged model, in memory."""

    model: "nn.Module"
    """Whole on `device`, in eval mode, its generation config valid; with an adapter, peft's model
    around the base."""
    tokenizer: "PreTrainedTokenizerFast"
    source: Checkpoint
    """What the base was loaded from."""
    identity: ModelIdentity
    device: "torch.device"
    dtype: "torch.dtype"
    """Of everything that is not quantized, and of the activations."""
    attention: str
    """sdpa, eager or flash_attention_2: what transformers in fact uses."""
    quantized: "QuantizationTable"
    stop_token_ids: tuple[int, ...]
    """Every token that ends an answer; also in the model's generation config."""
    notices: tuple[str, ...] = ()
    """What the user should know: choices made by `auto`, repairs."""
    arms: tuple[str, ...] = ("base",)
    """What it can answer as without loading anything more; the first is the model as it is."""

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the base's weights, as `Checkpoint.fingerprint` gives it."""
        return self.identity.base

    def identity_as(self, arm: str | None, strength: float | None = None) -> ModelIdentity:
        """Return the identity of an arm: the base has no adapter, a weakened adapter a strength."""
        if arm == "base":
            return replace(self.identity, adapter=None)
        return replace(self.identity, strength=strength)
