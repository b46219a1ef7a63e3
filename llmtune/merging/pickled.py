"""Old `pytorch_model*.bin` checkpoints: where each tensor's bytes are, without loading them."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llmtune.errors import LlmtuneError
from llmtune.io.json_files import read_weight_map
from llmtune.io.safetensors import CheckpointIndex, SafetensorsFile, TensorEntry
from llmtune.models.checkpoint import PICKLE_NAMES

DTYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}


def open_pickled(directory: Path) -> CheckpointIndex:
    """List the tensors of `pytorch_model.bin`, or of every shard its index names.

    The restricted unpickler reads the structure alone; no code of the file runs and no weight is
    read. File names are those of the safetensors files that take their place.

    Raises:
        LlmtuneError: a file is of the format before PyTorch 1.6, is damaged, or holds something
            else than tensors.
    """
    single, index = (directory / name for name in PICKLE_NAMES)
    if single.is_file():
        names, metadata = [single.name], None
    else:
        weight_map, metadata = read_weight_map(index)
        names = sorted(set(weight_map.values()))
    shards = tuple(_read_structure(directory / name) for name in names)
    tensors = {entry.name: entry for shard in shards for entry in shard.tensors}
    return CheckpointIndex(directory, shards, MappingProxyType(tensors), metadata)


def _read_structure(path: Path) -> SafetensorsFile:
    try:
        with FakeTensorMode():
            # gives every storage its place in the file (PyTorch's notes on serialization)
            state = torch.load(path, weights_only=True, map_location="cpu")
        if not isinstance(state, Mapping):
            raise TypeError(f"it holds a {type(state).__name__}")
        entries = [_entry(path, name, tensor) for name, tensor in state.items()]
    except (RuntimeError, pickle.UnpicklingError, TypeError, AttributeError, KeyError) as error:
        raise LlmtuneError(
            f"{path}: cannot be read as pickled weights ({str(error).splitlines()[0]}); load it "
            "with transformers and `save_pretrained` it elsewhere, which writes safetensors"
        ) from error
    entries.sort(key=lambda entry: entry.start)
    return SafetensorsFile(path, tuple(entries), MappingProxyType({"format": "pt"}), b"")


def _entry(path: Path, name: str, tensor: torch.Tensor) -> TensorEntry:
    offset = tensor.untyped_storage()._checkpoint_offset
    if offset is None:
        raise TypeError("its tensors' places are not known: a file from before PyTorch 1.6")
    if not tensor.is_contiguous():
        raise TypeError(f"{name!r} is stored transposed")
    start = offset + tensor.storage_offset() * tensor.element_size()
    num_bytes = tensor.numel() * tensor.element_size()
    return TensorEntry(name, DTYPES[tensor.dtype], tuple(tensor.shape), path, start, num_bytes)
