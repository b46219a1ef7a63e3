"""How a base's weights are kept: bitsandbytes' settings, the check after loading, the table."""

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from llmtune.errors import LlmtuneError
from llmtune.models.config import (
    Fp4Quantization,
    Int8Quantization,
    Nf4Quantization,
    QuantizationConfig,
)

EXPERT_DIMENSIONS = 3  # fused experts are one parameter [expert, out, in]
LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class QuantizationRow:
    """The parameters of like-named modules that are kept in one way."""

    pattern: str
    """Module name with layer numbers as `*`: `model.layers.*.self_attn.q_proj`."""
    count: int
    """How many modules."""
    kind: str
    """nf4, fp4, int8, or the dtype: bfloat16, float16, float32."""
    num_parameters: int
    """Logical parameters: a 4-bit weight counts one each, not one per two."""
    bytes: int
    """Memory for weights, biases and quantization scales."""


@dataclass(frozen=True)
class QuantizationTable:
    """What was quantized and what was not, largest memory first."""

    method: str
    rows: tuple[QuantizationRow, ...]

    @property
    def num_parameters(self) -> int:
        return sum(row.num_parameters for row in self.rows)

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.rows)

    @property
    def quantized_ratio(self) -> float:
        """Share of the parameters that are quantized, 0 to 1."""
        quantized = sum(row.num_parameters for row in self.rows if row.kind in _KINDS)
        return quantized / max(1, self.num_parameters)


_KINDS = ("nf4", "fp4", "int8")


def bitsandbytes_config(
    config: QuantizationConfig | None, dtype: torch.dtype
) -> BitsAndBytesConfig | None:
    """Translate the `quantization` section; None where nothing is quantized."""
    if isinstance(config, Nf4Quantization | Fp4Quantization):
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=config.method,
            bnb_4bit_use_double_quant=config.double_quant,
            bnb_4bit_compute_dtype=compute_dtype(config, dtype),
        )
    if isinstance(config, Int8Quantization):
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=config.outlier_threshold)
    return None


def keep_differentiable(model: PreTrainedModel) -> None:
    """Keep 4-bit weights in the layout that gradients pass through, on the CPU too.

    In eval mode bitsandbytes 0.50 repacks a 4-bit weight for AVX-512 at the first CPU forward,
    for good: that kernel has no backward, so a base that was evaluated once would train nothing.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def compute_dtype(config: Nf4Quantization | Fp4Quantization, dtype: torch.dtype) -> torch.dtype:
    """Return the precision of the 4-bit layers' products; auto is the model's own dtype."""
    return dtype if config.compute_dtype == "auto" else getattr(torch, config.compute_dtype)


def check_quantization(
    model: PreTrainedModel, config: QuantizationConfig | None, dtype: torch.dtype
) -> None:
    """Check that the loaded model is quantized as asked: a library that fell back is an error.

    Raises:
        LlmtuneError: quantization was asked for and the model has no linear layer to quantize, or
            a layer has another format, nesting or compute dtype than asked.
    """
    if not isinstance(config, Nf4Quantization | Fp4Quantization | Int8Quantization):
        return
    layers = {name: layer for name, layer in model.named_modules() if _kind(layer) in _KINDS}
    if not layers:
        raise LlmtuneError(
            f"model.quantization.method={config.method}: {type(model).__name__} has no linear "
            "layer that bitsandbytes can quantize. Set model.quantization=null."
        )
    for name, layer in layers.items():
        _check_shape(name, layer)
        _check_width(name, layer)
        found: tuple[Any, ...] = (_kind(layer),)
        wanted: tuple[Any, ...] = (config.method,)
        if not isinstance(config, Int8Quantization):
            found += (layer.weight.quant_state.nested, layer.compute_dtype)
            wanted += (config.double_quant, compute_dtype(config, dtype))
        if found != wanted:
            raise LlmtuneError(
                f"model.quantization: {name} was loaded as {found}, asked for was {wanted} "
                "(format, double quantization, compute dtype)."
            )


def _check_shape(name: str, layer: nn.Linear) -> None:
    """Compare a quantized weight with its layer; transformers does not."""
    state = getattr(layer.weight, "quant_state", None)
    found = tuple(layer.weight.shape if state is None else state.shape)
    if found != (layer.out_features, layer.in_features):
        raise LlmtuneError(
            f"{name}.weight is of another shape in the checkpoint, {found}, than config.json "
            f"says, {(layer.out_features, layer.in_features)}. Download or convert the base again."
        )


def _check_width(name: str, layer: nn.Linear) -> None:
    """Refuse what bitsandbytes 0.50 computes wrongly: on a CPU, a row that ends inside a block."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None or layer.weight.device.type != "cpu":
        return
    if layer.in_features % state.blocksize:
        raise LlmtuneError(
            f"model.quantization: {name} has {layer.in_features} inputs, not a multiple of "
            f"{state.blocksize}; bitsandbytes dequantizes such 4-bit rows wrongly on a CPU. Set "
            "model.quantization=null, or use a GPU."
        )


def describe_quantization(model: PreTrainedModel, method: str) -> QuantizationTable:
    """Group the model's modules by name and kind, with their parameters and bytes."""
    groups: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    seen: set[int] = set()
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen |= {id(parameter) for parameter in own}
        if own:
            key = (LAYER_NUMBER.sub("*", name), _kind(module) or _dtype_name(own[0].dtype))
            groups[key].append((sum(map(logical_size, own)), sum(map(_stored_bytes, own))))
    rows = [
        QuantizationRow(
            pattern=pattern,
            count=len(sizes),
            kind=kind,
            num_parameters=sum(parameters for parameters, _ in sizes),
            bytes=sum(stored for _, stored in sizes),
        )
        for (pattern, kind), sizes in groups.items()
    ]
    return QuantizationTable(method, tuple(sorted(rows, key=lambda row: -row.bytes)))


def logical_size(parameter: nn.Parameter) -> int:
    """Return how many weights a parameter stands for; two 4-bit ones share a stored byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(torch.Size(state.shape).numel())


def _stored_bytes(parameter: nn.Parameter) -> int:
    stored = parameter.numel() * parameter.element_size()
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        stored += _state_bytes(state)
    scales = getattr(parameter, "SCB", None)  # int8: one scale per row
    if scales is not None:
        stored += scales.numel() * scales.element_size()
    return stored


def _state_bytes(state: Any) -> int:
    tensors = [state.absmax]
    if state.nested:
        tensors.append(state.state2.absmax)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _kind(module: nn.Module) -> str | None:
    """Name bitsandbytes' format of a layer, read from the weight itself, not from a config."""
    weight: Any = getattr(module, "weight", None)
    if type(weight).__name__ == "Params4bit":
        return weight.quant_type
    if type(weight).__name__ == "Int8Params":
        return "int8"
    return None


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
