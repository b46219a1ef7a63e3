"""The adapter's trained tensors: written, read back strictly, checked for sense."""

from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from llmtune.errors import LlmtuneError

WEIGHTS_NAME = "adapter_model.safetensors"


def save_weights(model: PeftModel, directory: Path) -> None:
    """Write the adapter in stock PEFT's format, without asking the hub about the base."""
    state = {name: tensor.contiguous().cpu() for name, tensor in _state(model).items()}
    save_file(state, directory / WEIGHTS_NAME, metadata={"format": "pt"})
    model.peft_config[model.active_adapter].save_pretrained(str(directory))


def load_weights(model: PeftModel, directory: Path) -> None:
    """Read the adapter's tensors back into the model; every tensor must have its place.

    Raises:
        LlmtuneError: the file holds other tensors than the model's adapter.
    """
    state = load_file(directory / WEIGHTS_NAME)
    expected = _state(model)
    different = sorted(
        name
        for name in {*state, *expected}
        if name not in state or name not in expected or state[name].shape != expected[name].shape
    )
    if different:
        raise LlmtuneError(
            f"{directory / WEIGHTS_NAME} does not fit the adapter: {len(different)} tensors "
            f"differ, the first is {different[0]}. It was made with another adapter section; "
            "use another run_dir, or train.resume=never to start anew."
        )
    set_peft_model_state_dict(model, state, adapter_name=model.active_adapter)


@torch.no_grad()
def check_finite(model: PeftModel, step: int) -> None:
    """Refuse to save weights that are not finite.

    Raises:
        LlmtuneError: some trained tensor holds a NaN or an infinity.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    finite = torch.stack([p.isfinite().all() for _, p in trained]).tolist()
    broken = [name for (name, _), is_finite in zip(trained, finite, strict=True) if not is_finite]
    if broken:
        raise LlmtuneError(
            f"after step {step} {len(broken)} trained tensors hold NaN or infinity (the first is "
            f"{broken[0]}), so nothing was saved; earlier checkpoints are kept. Lower "
            "train.learning_rate, or check model.dtype."
        )


def _state(model: PeftModel) -> dict[str, torch.Tensor]:
    return get_peft_model_state_dict(
        model, adapter_name=model.active_adapter, save_embedding_layers=False
    )
