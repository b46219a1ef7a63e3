"""The formats that are read, which is their registry: a new one is listed here."""

from collections.abc import Mapping
from typing import Any

from llmtune.errors import LlmtuneError
from llmtune.io.fingerprint import JsonObject
from llmtune.models.stored.awq import AwqFormat
from llmtune.models.stored.base import StoredFormat
from llmtune.models.stored.bitsandbytes import BitsAndBytesFormat
from llmtune.models.stored.compressed_tensors import CompressedTensorsFormat
from llmtune.models.stored.fp8 import Fp8Format
from llmtune.models.stored.gptq import GptqFormat
from llmtune.models.stored.hqq import HqqFormat
from llmtune.models.stored.mxfp4 import Mxfp4Format
from llmtune.models.stored.torchao import TorchaoFormat

FORMATS: tuple[type[StoredFormat], ...] = (
    AwqFormat,
    BitsAndBytesFormat,
    CompressedTensorsFormat,
    Fp8Format,
    GptqFormat,
    HqqFormat,
    Mxfp4Format,
    TorchaoFormat,
)


def read_format(config: Mapping[str, Any], place: str) -> StoredFormat | None:
    """Return how the checkpoint that a config.json describes is quantized; None if it is not.

    Raises:
        LlmtuneError: in a way that is not read; `place` names the checkpoint.
    """
    knobs = stored_knobs(config)
    if not knobs:
        return None
    method = knobs.get("quant_method")
    if method is None and {"load_in_4bit", "load_in_8bit"} & knobs.keys():
        method = BitsAndBytesFormat.method  # as its first versions saved it
    for kind in FORMATS:
        if method in (kind.method, *kind.aliases):
            return kind(knobs, place)
    known = ", ".join(kind.method for kind in FORMATS)
    raise LlmtuneError(
        f"{place}: this base is stored quantized by {str(method)!r:.40}, which is not read (read "
        f"are {known}); give the 16-bit checkpoint that it was made from: model.base=..."
    )


def stored_knobs(config: Mapping[str, Any]) -> JsonObject | None:
    """Return what a config.json says of the checkpoint's quantization, if anything."""
    text = config.get("text_config")
    parts = (config, text if isinstance(text, dict) else {})
    found = [part["quantization_config"] for part in parts if part.get("quantization_config")]
    return found[0] if found and isinstance(found[0], dict) else None
