"""A model made from a checkpoint's files: mapped as it is, or quantized weight by weight."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import EllipsisType, MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from llmtune.errors import LlmtuneError
from llmtune.io.json_files import blamed_on
from llmtune.io.safetensors import CheckpointIndex, TensorEntry
from llmtune.models.checkpoint import CONFIG_NAME, GENERATION_NAME

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)


EIGHT_BIT_FLOATS: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.float8_e8m0fnu,
    }
)
"""What only a quantized checkpoint has; transformers is not given them one by one."""


class StoredTensor:
    """A tensor in a safetensors file that is read when it is asked for with `[...]`.

    It is used in a state dict where transformers puts safetensors' slices. Those are views of a
    mapped file, whose pages stay resident until the last view is gone; this is memory of its own,
    free again as soon as the weight is quantized.
    """

    def __init__(self, entry: TensorEntry) -> None:
        self._entry = entry

    def get_dtype(self) -> str:
        """Return the dtype's name in the file, such as BF16."""
        return self._entry.dtype

    def get_shape(self) -> list[int]:
        """Return the tensor's sizes."""
        return list(self._entry.shape)

    def __getitem__(self, index: EllipsisType) -> Tensor:
        """Read the whole tensor.

        Raises:
            LlmtuneError: the file was cut short since its header was read.
        """
        assert index is ..., "a weight is read whole"
        entry = self._entry
        dtype = DTYPES.get(entry.dtype) or EIGHT_BIT_FLOATS[entry.dtype]
        tensor = torch.empty(entry.shape, dtype=dtype)
        buffer = memoryview(tensor.view(-1).view(torch.uint8).numpy()) if tensor.numel() else b""
        with entry.path.open("rb", buffering=0) as file:
            read = 0
            while read < entry.num_bytes:
                count = os.preadv(file.fileno(), [buffer[read:]], entry.start + read)
                if count == 0:
                    raise LlmtuneError(
                        f"{entry.path} is cut short: {entry.name} ends at byte {entry.stop}; "
                        "download or save it again"
                    )
                read += count
        return tensor


def build_model(
    directory: Path, keywords: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the causal LM in a checkpoint directory, and transformers' loading info.

    `keywords` are those of `from_pretrained`, with `output_loading_info`.

    A base that is quantized is read tensor by tensor: mapped, all of its 16-bit file would stay
    resident beside the quantized weights. What is not quantized is mapped and needs no copy.
    """
    config = tensors = None
    if "quantization_config" in keywords and _is_plain(keywords):
        config = AutoConfig.from_pretrained(str(directory), local_files_only=True)
        tensors = stored_tensors(directory)
    if tensors is None or not _has_own_class(config):
        model, info = AutoModelForCausalLM.from_pretrained(str(directory), **keywords)
        return model, info
    model, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
        None, config=config, state_dict=tensors, **keywords
    )
    model.name_or_path = model.config._name_or_path = str(directory)
    model.generation_config = _read_generation_config(directory)
    return model, info


def _is_plain(keywords: dict[str, Any]) -> bool:
    """Whether the weights are safetensors and the code is transformers' own."""
    return keywords["use_safetensors"] and not keywords["trust_remote_code"]


def _has_own_class(config: PreTrainedConfig | None) -> bool:
    """Whether a causal LM is built from this very config, and not from a part of it."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return False
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return getattr(model_class, "config_class", None) is type(config)


def _read_generation_config(directory: Path) -> GenerationConfig:
    """Return what transformers would: generation_config.json, else what config.json says of it."""
    if (directory / GENERATION_NAME).is_file():
        with blamed_on(directory / GENERATION_NAME, "transformers"):
            return GenerationConfig.from_pretrained(str(directory))
    return GenerationConfig.from_pretrained(
        str(directory), config_file_name=CONFIG_NAME, _from_model_config=True
    )


def stored_tensors(directory: Path) -> dict[str, StoredTensor] | None:
    """Return a checkpoint's tensors by name, none of them read yet.

    None if one has a dtype that torch has no counterpart for here.

    Raises:
        LlmtuneError: as `CheckpointIndex.open`.
    """
    tensors = CheckpointIndex.open(directory).tensors
    if any(entry.dtype not in DTYPES for entry in tensors.values()):
        return None
    return {name: StoredTensor(entry) for name, entry in tensors.items()}
