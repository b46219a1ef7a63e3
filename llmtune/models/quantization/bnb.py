"""What bitsandbytes makes of weights, and back; only loaded for a base that it quantizes."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes import functional
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

TRIAL_WIDTH = 64


def chosen_weights(skeleton: PreTrainedModel, settings: Any, dtype: torch.dtype) -> dict[str, bool]:
    """Let transformers choose on a model without weights, as it does when it loads one.

    Returns:
        Parameter name in memory -> whether the checkpoint holds it transposed ([in, out]).
    """
    quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    quantizer.preprocess_model(model=skeleton, dtype=dtype, device_map=None)
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return {
        f"{name}.weight": issubclass(module.source_cls, Conv1D)
        for name, module in skeleton.named_modules()
        if isinstance(module, kinds)
    }


@dataclass(frozen=True)
class FourBitRoundTrip:
    """NF4 and FP4 (QLoRA, arXiv:2305.14314, section 3) in blocks along the flat weight."""

    method: str
    device: torch.device
    load_dtype: torch.dtype
    compute_dtype: torch.dtype
    has_double_quant: bool
    block_size: int
    scale_block_size: int

    def measure(self, tiles: Iterable[Tensor]) -> Tensor | None:
        """Return every block's scale after its own quantization: it depends on their mean."""
        if not self.has_double_quant:
            return None
        absmax_B = torch.cat([self._absmax(tile) for tile in tiles])
        # as bitsandbytes.functional.quantize_4bit and dequantize_4bit do
        offset = absmax_B.mean()
        codes, state = functional.quantize_blockwise(
            absmax_B - offset, blocksize=self.scale_block_size
        )
        scales_B = functional.dequantize_blockwise(codes, state)
        scales_B += offset
        return scales_B

    def apply(self, tile_RC: Tensor, scales_B: Tensor | None) -> Tensor:
        """Return some rows in the layer's compute dtype, on the CPU.

        Args:
            tile_RC: rows of the weight as the checkpoint holds them; a whole number of blocks is
                before them.
            scales_B: the part of `measure`'s result that belongs to these rows.
        """
        flat = tile_RC.to(self.device, self.load_dtype).reshape(-1)
        packed, state = functional.quantize_4bit(
            flat, blocksize=self.block_size, quant_type=self.method
        )
        if scales_B is not None:
            state.absmax = scales_B.contiguous()
        state.dtype = self.compute_dtype
        return functional.dequantize_4bit(packed, state).reshape(tile_RC.shape).cpu()

    def _absmax(self, tile: Tensor) -> Tensor:
        flat = tile.to(self.device, self.load_dtype).reshape(-1).float().abs()
        whole = len(flat) // self.block_size * self.block_size
        absmax = flat[:whole].view(-1, self.block_size).amax(1)
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


def dequantize_four_bit(weight: nn.Parameter) -> Tensor:
    """Return the dense weight [out, in] of a 4-bit parameter, in its stored dtype."""
    state: Any = weight.quant_state
    scales = state.absmax
    if state.nested:
        outer = state.state2
        scales = torch.ops.bitsandbytes.dequantize_blockwise(
            scales, outer.absmax, outer.code, outer.blocksize, torch.float32
        )
        scales = scales + state.offset
    dense: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        weight.data, scales, state.blocksize, state.quant_type, state.shape, state.dtype
    )
    return dense


def dequantize_int8(weight: nn.Parameter) -> Tensor:
    """Return the dense weight [out, in] of an 8-bit parameter, in float32."""
    codes: Any = weight
    dense: Tensor = functional.int8_vectorwise_dequant(codes.data, codes.SCB)
    return dense.float()


def try_quantization(device: torch.device) -> str | None:
    """Quantize a layer to 4 bits, pass a gradient through it, and return what went wrong."""
    try:
        layer = bnb.nn.Linear4bit(TRIAL_WIDTH, TRIAL_WIDTH, bias=False, quant_type="nf4").to(device)
        x = torch.ones(2, TRIAL_WIDTH, device=device, requires_grad=True)
        layer(x).sum().backward()
    except (RuntimeError, AttributeError, NotImplementedError, ValueError) as error:
        return f"bitsandbytes fails on {device}: {error}"
    if x.grad is None or not torch.isfinite(x.grad).all():
        return f"bitsandbytes on {device} passes no gradient through a 4-bit layer"
    return None
