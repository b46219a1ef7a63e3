"""The weights a quantized base computes with: what bitsandbytes makes of them, and back."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes import functional
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from llmtune.errors import LlmtuneError
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.config import Int8Quantization, ModelConfig, NoQuantization
from llmtune.models.hardware import choose_device, choose_dtype
from llmtune.models.quantization import bitsandbytes_config, compute_dtype
from llmtune.models.quiet import quiet_loading

BLOCK_SIZE = 64  # what bitsandbytes' Params4bit takes unless told otherwise; nobody tells it
NESTED_BLOCK_SIZE = 256


@dataclass(frozen=True)
class QuantizedBase:
    """Which weights of a base are quantized when it is loaded, and how."""

    method: str
    weights: Mapping[str, bool]
    """Parameter name in memory -> whether the checkpoint holds it transposed ([in, out])."""
    round_trip: "FourBitRoundTrip | Int8RoundTrip"


def describe_quantized_base(config: ModelConfig, source: Checkpoint) -> QuantizedBase | None:
    """Say what `load_model` would quantize, from the skeleton of the model; no weight is read.

    Returns:
        None where `config` quantizes nothing.

    Raises:
        LlmtuneError: this machine has not the device asked for.
    """
    if config.quantization is None or isinstance(config.quantization, NoQuantization):
        return None
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device, source.model_type)
    weights = _quantized_weights(config, source, dtype)
    if not weights:
        raise LlmtuneError(
            f"{source.origin}: has no linear layer that {config.quantization_method} quantizes; "
            "set model.quantization=null"
        )
    if isinstance(config.quantization, Int8Quantization):
        return QuantizedBase("int8", weights, Int8RoundTrip(device, dtype))
    four_bit = FourBitRoundTrip(
        config.quantization.method,
        device,
        dtype,
        compute_dtype(config.quantization, dtype),
        has_double_quant=config.quantization.double_quant,
    )
    return QuantizedBase(config.quantization.method, weights, four_bit)


@dataclass(frozen=True)
class FourBitRoundTrip:
    """NF4 and FP4 (QLoRA, arXiv:2305.14314, section 3) in blocks of 64 along the flat weight."""

    method: str
    device: torch.device
    load_dtype: torch.dtype
    compute_dtype: torch.dtype
    has_double_quant: bool
    block_size: int = BLOCK_SIZE

    def measure(self, tiles: Iterable[Tensor]) -> Tensor | None:
        """Return every block's scale after its own quantization: it depends on their mean."""
        if not self.has_double_quant:
            return None
        absmax_B = torch.cat([self._absmax(tile) for tile in tiles])
        # as bitsandbytes.functional.quantize_4bit and dequantize_4bit do
        offset = absmax_B.mean()
        codes, state = functional.quantize_blockwise(absmax_B - offset, blocksize=NESTED_BLOCK_SIZE)
        scales_B = functional.dequantize_blockwise(codes, state)
        scales_B += offset
        return scales_B

    def apply(self, tile_RC: Tensor, scales_B: Tensor | None) -> Tensor:
        """Return some rows in the layer's compute dtype, on the CPU.

        Args:
            tile_RC: rows of the weight as the checkpoint holds them; a whole number of blocks lies
                before them.
            scales_B: the part of `measure`'s result that belongs to these rows.
        """
        flat = tile_RC.to(self.device, self.load_dtype).reshape(-1)
        packed, state = functional.quantize_4bit(flat, blocksize=BLOCK_SIZE, quant_type=self.method)
        if scales_B is not None:
            state.absmax = scales_B.contiguous()
        state.dtype = self.compute_dtype
        return functional.dequantize_4bit(packed, state).reshape(tile_RC.shape).cpu()

    def _absmax(self, tile: Tensor) -> Tensor:
        flat = tile.to(self.device, self.load_dtype).reshape(-1).float().abs()
        whole = len(flat) // BLOCK_SIZE * BLOCK_SIZE
        absmax = flat[:whole].view(-1, BLOCK_SIZE).amax(1)
        return torch.cat([absmax, flat[whole:].amax().view(1)]) if whole < len(flat) else absmax


@dataclass(frozen=True)
class Int8RoundTrip:
    """LLM.int8 (arXiv:2208.07339): a scale for every row."""

    device: torch.device
    load_dtype: torch.dtype
    block_size: int = 1

    def measure(self, tiles: Iterable[Tensor]) -> Tensor | None:
        """Return None: rows are quantized one by one."""
        return None

    def apply(self, tile_RC: Tensor, scales_B: Tensor | None) -> Tensor:
        """Return some rows of the weight in float32, on the CPU."""
        half = tile_RC.to(self.device, self.load_dtype).to(torch.float16)
        codes, scales, _ = functional.int8_vectorwise_quant(half)
        return functional.int8_vectorwise_dequant(codes, scales).float().cpu()


def _quantized_weights(
    config: ModelConfig, source: Checkpoint, dtype: torch.dtype
) -> dict[str, bool]:
    """Let transformers choose on a model without weights, as it does when it loads one."""
    options: dict[str, Any] = {
        "trust_remote_code": config.trust_remote_code,
        "local_files_only": True,
    }
    with quiet_loading(), torch.device("meta"):
        model_config = AutoConfig.from_pretrained(str(source.directory), **options)
        model = AutoModelForCausalLM.from_config(
            model_config, dtype=dtype, trust_remote_code=config.trust_remote_code
        )
        quantizer = AutoHfQuantizer.from_config(
            bitsandbytes_config(config.quantization, dtype), pre_quantized=False
        )
        quantizer.preprocess_model(model=model, dtype=dtype, device_map=None)
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return {
        f"{name}.weight": issubclass(module.source_cls, Conv1D)
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    }
