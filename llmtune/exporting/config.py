"""What can be exported, as which types, and the settings of one export (light)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from llmtune.schema import Section

ExportKind = Literal["gguf", "ollama", "adapter-gguf", "nf4", "hub"]
OwnType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
QuantizerType = Literal[
    "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k"
]
"""What only llama.cpp's own quantizer makes."""

EXPORT_KINDS: tuple[str, ...] = get_args(ExportKind)
OWN_TYPES: tuple[str, ...] = get_args(OwnType)
QUANTIZER_TYPES: tuple[str, ...] = get_args(QuantizerType)
GGUF_TYPES: tuple[str, ...] = OWN_TYPES + QUANTIZER_TYPES
WITH_TYPES = frozenset({"gguf", "ollama", "adapter-gguf"})
"""The kinds that are written in a GGUF type."""
ADAPTER_TYPES = ("f32", "f16", "bf16")

ConfiguredKind = Literal["gguf", "ollama", "adapter-gguf", "nf4"]
"""What a run can make by itself; a push to the hub is asked for by its own command."""


class ExportConfig(Section):
    """What `run` exports at its end, and is checked for before it trains."""

    to: tuple[ConfiguredKind, ...] = ()
    """gguf, ollama, adapter-gguf, nf4: any of them, into the run's `exports/`."""
    type: OwnType | QuantizerType | None = None
    """Numbers in the file, for gguf and ollama; null is q8_0."""

    def type_for(self, kind: str) -> str | None:
        """Return the type that a kind is written in; None is its default."""
        return self.type if kind in ("gguf", "ollama") else None


DEFAULT_TYPE = "q8_0"
DEFAULT_ADAPTER_TYPE = "f16"


@dataclass(frozen=True)
class ExportSettings:
    """One export as asked for on the command line."""

    to: str
    """One of `EXPORT_KINDS`."""
    type: str | None = None
    """One of `GGUF_TYPES`; None is q8_0 for a model and f16 for an adapter."""
    out: Path | None = None
    """The file (gguf, adapter-gguf) or directory to make; None is `exports/` of the run."""
    force: bool = False
    """Replace what is there."""
    runtime: bool | None = None
    """Run the file in llama.cpp and compare with transformers; None does so where it is
    installed."""
    max_kl: float | None = None
    """Largest KL(model || file) after a prompt, in nats, with which a GGUF file is kept; None is
    the bound of its type."""
    repo: str | None = None
    """For the hub: `org/name`."""
    public: bool = False
    """For the hub: readable by everyone."""
