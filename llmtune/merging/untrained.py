"""The merge of an adapter that is not trained yet: planned from its names and shapes alone."""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict

from llmtune.adapters.base import Adapter
from llmtune.adapters.inject import inject_adapter
from llmtune.adapters.manifest import WEIGHTS_NAME
from llmtune.adapters.saved import check_found_again
from llmtune.errors import LlmtuneError, MergeRefused
from llmtune.io.safetensors import build_preamble, tensor_bytes
from llmtune.io.unfinished import require_space
from llmtune.merging.one_adapter import MergeRequest, plan_one
from llmtune.merging.planned import PlannedMerges
from llmtune.models.skeleton import build_skeleton

FLOAT32 = "F32"


def plan_untrained(request: MergeRequest, adapter: Adapter) -> PlannedMerges | None:
    """Plan the merge of the adapter that a training would make; no weight is read or trained.

    Args:
        request: the merge; what is in its adapter directory does not matter.
        adapter: how the adapter will be made.

    Returns:
        None if the model is of code that is not trusted, and cannot be loaded either.

    Raises:
        LlmtuneError: the adapter cannot be put on this model, or could not be loaded again.
        MergeRefused: it could not be merged then, or the merged model would not fit on the disk.
    """
    skeleton = build_skeleton(request.source, trust_remote_code=request.model.trust_remote_code)
    if skeleton is None:
        return None
    with torch.device("meta"):
        adapted = inject_adapter(skeleton, adapter.model_copy(update={"init_from": None})).model
        check_found_again(adapted)
    with tempfile.TemporaryDirectory(prefix="llmtune-merge-") as place:
        directory = Path(place)
        _write_names(adapted, directory)
        try:
            planned = plan_one(replace(request, adapter_dir=directory, is_untrained=True))
            require_space(request.out_dir, planned.needed_bytes, what="the merged model")
        except LlmtuneError as error:
            found = str(error).replace(f"{directory}: ", "").replace(str(directory), "its adapter")
            raise MergeRefused(
                f"merge: after training, this run's adapter could not be merged: {found}"
            ) from error
    return planned


def _write_names(model: PeftModel, directory: Path) -> None:
    """Write an adapter whose tensors have names and shapes, and nothing on the disk but holes."""
    tensors: Mapping[str, torch.Tensor] = get_peft_model_state_dict(
        model, save_embedding_layers=False
    )
    model.peft_config["default"].save_pretrained(str(directory))
    entries = [(name, FLOAT32, tuple(tensor.shape)) for name, tensor in tensors.items()]
    num_bytes = sum(tensor_bytes(dtype, shape) for _, dtype, shape in entries)
    preamble = build_preamble(entries, {})
    with (directory / WEIGHTS_NAME).open("wb") as file:
        file.write(preamble)
        file.truncate(len(preamble) + num_bytes)
