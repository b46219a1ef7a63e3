"""What is quantized of a base: before it is loaded, checked after loading, and as a table."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llmtune.errors import LlmtuneError
from llmtune.io.json_files import blamed_on
from llmtune.models.checkpoint import CONFIG_NAME, Checkpoint
from llmtune.models.config import ModelConfig
from llmtune.models.hardware import choose_device, choose_dtype
from llmtune.models.quantization.base import Quantization, RoundTrip
from llmtune.models.quantization.config import members
from llmtune.models.quiet import quiet_loading

HELD_MARK = "held_weight"
"""Attribute of the forward of a layer whose dense weight is held."""
EXPERT_DIMENSIONS = 3  # fused experts are one parameter [expert, out, in]
LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def expert_stacks(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the fused experts' weights, [expert, out, in]; not kernels of convolutions."""
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == EXPERT_DIMENSIONS and min(parameter.shape[1:]) > 1:
                yield f"{prefix}.{name}", parameter


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
        """Return the parameters of all rows."""
        return sum(row.num_parameters for row in self.rows)

    @property
    def bytes(self) -> int:
        """Return the bytes of all rows."""
        return sum(row.bytes for row in self.rows)

    @property
    def quantized_ratio(self) -> float:
        """Share of the parameters that are quantized, 0 to 1."""
        kinds = {member.model_fields["method"].default for member in members()}
        quantized = sum(row.num_parameters for row in self.rows if row.kind in kinds)
        return quantized / max(1, self.num_parameters)


@dataclass(frozen=True)
class QuantizedBase:
    """Which weights of a base are quantized when it is loaded, and how."""

    method: str
    weights: Mapping[str, bool]
    """Parameter name in memory -> whether the checkpoint holds it transposed ([in, out])."""
    round_trip: RoundTrip
    dtype: torch.dtype
    """Of what is not quantized."""


def describe_quantized_base(config: ModelConfig, source: Checkpoint) -> QuantizedBase | None:
    """Say what `load_model` would quantize, from the skeleton of the model; no weight is read.

    Returns:
        None if `config` quantizes nothing.

    Raises:
        LlmtuneError: this machine does not have the device asked for.
    """
    quantization = config.storage
    if not quantization.is_quantized:
        return None
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device, source.model_type)
    remote = {"trust_remote_code": config.trust_remote_code}
    with (
        blamed_on(source.directory / CONFIG_NAME, "the installed transformers"),
        quiet_loading(),
        torch.device("meta"),
    ):
        model_config = AutoConfig.from_pretrained(
            str(source.directory), local_files_only=True, **remote
        )
        skeleton = AutoModelForCausalLM.from_config(model_config, dtype=dtype, **remote)
        weights = quantization.quantized_weights(skeleton, dtype)
    if not weights:
        raise LlmtuneError(
            f"{source.origin}: has no linear layer that {quantization.method} quantizes; "
            "set model.quantization=null"
        )
    return QuantizedBase(
        quantization.method, weights, quantization.round_trip(device, dtype), dtype
    )


def dense_weight(layer: nn.Module) -> Callable[[], Tensor] | None:
    """Return a function that gives the dense weight [out, in] of a quantized layer; else None."""
    held: Tensor | None = getattr(layer.__dict__.get("forward"), HELD_MARK, None)
    if held is not None:
        return lambda: held
    return next(filter(None, (member.dense_weight(layer) for member in members())), None)


def compute_densely(model: PreTrainedModel, dtype: torch.dtype, *, of: PreTrainedModel) -> None:
    """Put plain layers of the same weights in place of quantized ones of a freshly loaded model.

    What is computed is then exact in `dtype`. Layers whose method does not give its dense weights
    are left as they are. `of` has the quantized layers: `model` itself, or the same base again.
    """
    for name, layer in list(of.named_modules()):
        read = dense_weight(layer)
        if read is None:
            continue
        weight = read().to(dtype)
        dense = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        dense.weight = nn.Parameter(weight, requires_grad=False)
        dense.bias = getattr(model.get_submodule(name), "bias", None)
        model.set_submodule(name, dense, strict=True)
    for parameter in model.parameters():  # a base stored in 4 bits comes with the rest in its own
        if parameter.is_floating_point() and parameter.dtype.itemsize < dtype.itemsize:
            parameter.data = parameter.data.to(dtype)


@dataclass(frozen=True)
class DenseWeights:
    """The dense weights of a model's quantized layers, and how to compute with them.

    `layers` gives each layer's weight [out, in], dequantized; empty if there are none whose output
    is exactly the product with it.
    """

    layers: Mapping[nn.Module, Callable[[], Tensor]]
    bytes: int

    def hold(self) -> None:
        """Dequantize every weight once and compute with it from now on, bit for bit as before.

        The weights are freed with the model.
        """
        for layer, read in self.layers.items():
            layer.forward = _dense_forward(layer, read())


def find_dense_weights(model: nn.Module) -> DenseWeights:
    """Return the quantized layers of a model that compute with their dequantized weight.

    Only on a CPU: there every pass dequantizes the whole model. GPUs have kernels that do not, and
    round differently.
    """
    layers: dict[nn.Module, Callable[[], Tensor]] = {}
    size = 0
    for layer in model.modules():
        if is_dequantized_product(layer):
            read = dense_weight(layer)
            assert read is not None, "it has just been asked"
            layers[layer] = read
            size += logical_size(layer.weight) * layer.compute_dtype.itemsize
    return DenseWeights(layers, size)


def is_dequantized_product(layer: nn.Module) -> bool:
    """Whether a quantized layer's output is exactly the product with its dequantized weight."""
    if layer._parameters.get("weight") is None:  # what is wrapped around a layer shows its weight
        return False
    exact = (member.dense_weight(layer) for member in members() if member.is_exact)
    if not any(exact) or layer.weight.device.type != "cpu":
        return False
    return bool(layer.compute_dtype == layer.weight.quant_state.dtype)


def _dense_forward(layer: nn.Module, weight: Tensor) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        bias = None if layer.bias is None else layer.bias.to(weight.dtype)
        return nn.functional.linear(x.to(weight.dtype), weight, bias).to(x.dtype)

    setattr(forward, HELD_MARK, weight)
    return forward


def keep_differentiable(model: PreTrainedModel) -> None:
    """Keep 4-bit weights in the layout that gradients pass through, on the CPU too.

    In eval mode bitsandbytes 0.50 repacks a 4-bit weight for AVX-512 at the first CPU forward,
    for good: that kernel has no backward, so a base that was evaluated once would train nothing.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def check_quantization(
    model: PreTrainedModel, quantization: Quantization, dtype: torch.dtype
) -> None:
    """Check that the loaded model is quantized as asked: a library that fell back is an error.

    Raises:
        LlmtuneError: quantization was asked for and the model has no linear layer to quantize, or
            a layer has a different format, nesting or compute dtype than asked.
    """
    if not quantization.is_quantized:
        return
    layers = {name: layer for name, layer in model.named_modules() if _kind(layer) is not None}
    if not layers:
        raise LlmtuneError(
            f"model.quantization.method={quantization.method}: {type(model).__name__} has no "
            "linear layer that it can quantize. Set model.quantization=null."
        )
    for name, layer in layers.items():
        _check_shape(name, layer)
        _check_width(name, layer)
        found = (_kind(layer),)
        wanted = quantization.wanted_settings(dtype)
        if found[0] == wanted[0]:
            found = quantization.settings_of(layer)
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
            f"{name}.weight has a different shape in the checkpoint, {found}, than config.json "
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
    """Return how many weights a parameter holds; two 4-bit ones share a stored byte."""
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
    return int(stored)


def _state_bytes(state: Any) -> int:
    tensors = [state.absmax]
    if state.nested:
        tensors.append(state.state2.absmax)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _kind(module: nn.Module) -> str | None:
    """Name the format that a quantized layer is in, read from the layer itself, not a config."""
    return next(filter(None, (member.kind_of(module) for member in members())), None)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
