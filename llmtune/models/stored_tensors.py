"""A checkpoint's tensors read one at a time, so that loading holds no more than one of them."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import EllipsisType, MappingProxyType

import torch
from torch import Tensor

from llmtune.errors import LlmtuneError
from llmtune.io.safetensors import CheckpointIndex, TensorEntry

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
        tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
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
