"""Whether the next token can be trained on this model, and whether all of its adapter would be."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from peft import PeftModel

from llmtune.adapters.bypassed import describe_bypassed, find_bypassed
from llmtune.adapters.inject import adapted_layers
from llmtune.errors import LlmtuneError
from llmtune.models.probing import ProbeFailedError, probing
from llmtune.scoring.batches import inference, model_device, pad_rows, run_forward
from llmtune.scoring.causal import sees_later_tokens

NUM_PROBED = 16
"""Tokens that the model is run on."""
QUANTIZED_MARK = "_is_quantized"
"""What transformers sets on the config of a quantized model, and some models' code asks for."""


def require_trainable(model: PeftModel, input_ids: Sequence[int]) -> None:
    """Run the adapted model on the beginning of a row, as it answers and as it trains.

    Args:
        model: with a fresh adapter; it is left as it was.
        input_ids: of any row.

    Raises:
        LlmtuneError: a position sees the tokens after it, so that every answer would be known
            before it is trained; adapted modules are not run, and would not be trained; or the
            library's own code fails on this model.
    """
    ids = list(input_ids[:NUM_PROBED])
    try:
        with probing():
            _require_trainable(model, ids)
    except ProbeFailedError as error:
        raise LlmtuneError(
            f"model.base: {type(model.get_base_model()).__name__} does not run in the installed "
            f"transformers, even before anything of it is replaced: {error}"
        ) from error


def _require_trainable(model: PeftModel, ids: Sequence[int]) -> None:
    if sees_later_tokens(model, ids):
        raise LlmtuneError(
            f"model.base: {model.config.model_type} lets a token see those after it, so the next "
            "token cannot be trained; choose a causal language model"
        )
    bypassed = _find_bypassed(model, ids)
    if bypassed:
        endings = {name.rpartition(".")[2] for name in bypassed}
        adapted = dict.fromkeys(name.rpartition(".")[2] for name in adapted_layers(model))
        raise LlmtuneError(
            f"adapter.target_modules: {describe_bypassed(bypassed)}. Leave it out: "
            f"target_modules=[{', '.join(name for name in adapted if name not in endings)}]"
        )


def _find_bypassed(model: PeftModel, ids: Sequence[int]) -> tuple[str, ...]:
    batch = pad_rows([ids], model_device(model), left=False)

    def answer_and_train() -> None:
        run_forward(model, batch)
        model.train()  # some fused kernels read weights then only
        run_forward(model, batch)

    with torch.random.fork_rng(), inference(model):
        found = find_bypassed(model, answer_and_train)
        with _as_if_dense(model) as is_quantized:
            if is_quantized:
                found += find_bypassed(model, lambda: _try_forward(model, batch))
    return tuple(dict.fromkeys(found))


@contextmanager
def _as_if_dense(model: PeftModel) -> Iterator[bool]:
    """Run the code that a 16-bit base runs; yield whether this one is quantized.

    Some models only read a weight themselves if it is not packed (Jamba's `dt_proj`). The merged
    model is not, so what is trained over the packed base is then not what is merged.
    """
    configs = [
        one
        for one in {id(own): own for own in _configs(model)}.values()
        if hasattr(one, QUANTIZED_MARK)
    ]
    before = [getattr(one, QUANTIZED_MARK) for one in configs]
    for one in configs:
        delattr(one, QUANTIZED_MARK)
    try:
        yield bool(configs)
    finally:
        for one, value in zip(configs, before, strict=True):
            setattr(one, QUANTIZED_MARK, value)


def _configs(model: PeftModel) -> Iterator[Any]:
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            yield config


def _try_forward(model: PeftModel, batch: Any) -> None:
    with suppress(ProbeFailedError), probing():
        run_forward(model, batch)
