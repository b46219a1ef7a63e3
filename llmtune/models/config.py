"""The `model` section: which base, in which numbers, on which device."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PrivateAttr, field_validator

from llmtune.models.quantization.base import Quantization
from llmtune.models.quantization.config import DENSE, QuantizationConfig, members
from llmtune.schema import Section

TemplateArgument = bool | int | float | str | None
DtypeName = Literal["auto", "bfloat16", "float16", "float32"]


def _check_device(device: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        is_other = device.split(":")[0] in ("mps", "xpu", "npu", "rocm", "tpu")
        untried = f"; llmtune was not tried on {device} and does not run there" if is_other else ""
        raise ValueError(f"expected auto, cpu, cuda or cuda:N, found {device!r}{untried}")
    return device


WEIGHT_ONLY = frozenset({"int8_weight_only", "float8_weight_only", "int4_weight_only", "quanto"})
"""What other tools train over, beside the formats that a base is stored in; not offered here."""


class ModelConfig(Section):
    """The base model and how it is loaded."""

    base: str
    """A checkpoint directory, a `.gguf` file, or a hub id `org/name`; a path wins if it exists."""
    revision: str | None = None
    """Hub branch, tag or commit; the commit that it names is recorded. Only for hub ids."""
    quantization: QuantizationConfig | None = None
    """How the frozen base weights are kept while training; null keeps them in `dtype`."""
    cache_quantized: bool = True
    """Keep the quantized base in the cache directory: the next load reads it, quantizing nothing.
    The four used last are kept."""
    dtype: DtypeName = "auto"
    """Precision of the base; auto is bfloat16; float16 on a GPU that has no bfloat16, float32 on a
    CPU that only emulates it."""
    device: Annotated[str, AfterValidator(_check_device)] = "auto"
    """auto (the first GPU, else the CPU), cpu, cuda, or one GPU such as cuda:1."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention kernel; auto is sdpa, or eager for models whose formula sdpa does not compute."""
    trust_remote_code: bool = False
    """Run Python code shipped with the model; a hub id then needs a pinned revision."""
    chat_template: Path | None = None
    """A Jinja chat template file to use instead of the tokenizer's own."""
    template_arguments: dict[str, TemplateArgument] = Field(default_factory=dict)
    """What the chat template is called with, such as {enable_thinking: false}. It becomes the
    default of the template that the adapter and the merged model are saved with."""
    weights: Literal["safetensors", "any"] = "safetensors"
    """`any` also reads pickled .bin weights, through PyTorch's restricted unpickler."""

    _system: str | None = PrivateAttr(default=None)

    @field_validator("quantization", mode="before")
    @classmethod
    def _refuse_not_offered(cls, value: Any) -> Any:
        """Name a quantization that is known, and not offered for training, with what is."""
        from llmtune.models.stored.formats import FORMATS

        named = value.get("method") if isinstance(value, dict) else value
        stored = {name for format in FORMATS for name in (format.method, *format.aliases)}
        if isinstance(named, str) and named in stored | WEIGHT_ONLY:
            offered = [one.model_fields["method"].default for one in members() if one.is_quantized]
            raise ValueError(
                f"{named} is not offered for training; give {{method: {' | '.join(offered)}}}. A "
                "base that is stored quantized needs none: it is made 16-bit first (docs/bases.md)"
            )
        return value

    def with_system(self, system: str | None) -> "ModelConfig":
        """Return the section with the system prompt that the data asks for."""
        made = self.model_copy()
        made._system = system
        return made

    @property
    def template(self) -> "TemplateChoice":
        """The chat template that the config asks for."""
        arguments = tuple(self.template_arguments.items())
        return TemplateChoice(self.chat_template, arguments, self._system)

    @property
    def storage(self) -> Quantization:
        """How the weights are kept: the quantization, or none of it."""
        return DENSE if self.quantization is None else self.quantization

    @property
    def quantization_method(self) -> str:
        """The name of the quantization, or none."""
        return self.storage.method


@dataclass(frozen=True)
class TemplateChoice:
    """A chat template in place of a checkpoint's own, and what it is called with."""

    file: Path | None = None
    """A Jinja file; None is the checkpoint's own."""
    arguments: tuple[tuple[str, TemplateArgument], ...] = ()
    system: str | None = None
    """The system prompt of chats that have none; None leaves it to the template."""


OWN_TEMPLATE = TemplateChoice()
