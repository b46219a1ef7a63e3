"""Read bitsandbytes' 4-bit weights (NF4 and FP4) with nothing but torch.

A weight is stored as a row of 4-bit codes, two a byte, high half first. Every `block_size`
consecutive weights share a scale (`absmax`); with double quantization the scales are themselves
8-bit codes in blocks with their own scale, around a common offset:

    weight[i] = levels[code[i]] * scale[i // block_size]
    scale[j]  = nested_levels[absmax[j]] * nested_absmax[j // nested_block_size] + nested_offset

Products are float32 and rounded to the stored dtype once, which is what bitsandbytes does too
(QLoRA, Dettmers et al. 2023, section 3, and `bitsandbytes.functional.QuantState.as_dict`).

Shape suffixes: P bytes of packed codes, B blocks, O output features, I input features.
"""

import json
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

LEVELS = 16
STATE_PREFIX = "quant_state.bitsandbytes__"
"""Begins the suffix of the tensor that describes the others of a weight."""


class FourBitWeight(NamedTuple):
    """A packed weight with its scales resolved; `dequantize` gives `shape` in `dtype`."""

    packed_P: Tensor
    levels: Tensor
    scales_B: Tensor
    block_size: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def read_four_bit_weight(weight: Tensor, state: Mapping[str, Tensor]) -> FourBitWeight:
    """Put the tensors that bitsandbytes serializes back together.

    Args:
        weight: the packed codes in any storage dtype.
        state: the tensors beside it, by their suffix, as bitsandbytes names them.

    Raises:
        ValueError: if a tensor is missing, or if sizes disagree.
    """
    headers = [tensor for suffix, tensor in state.items() if suffix.startswith(STATE_PREFIX)]
    if len(headers) != 1:
        raise ValueError(f"expected one {STATE_PREFIX}* tensor, got {sorted(state)}")
    header = json.loads(bytes(headers[0].cpu().tolist()))
    try:
        scales_B, levels = state["absmax"], state["quant_map"].float()
        if "nested_absmax" in state:
            nested_scales = state["nested_absmax"].repeat_interleave(header["nested_blocksize"])
            scales_B = state["nested_quant_map"][scales_B.int()] * nested_scales[: len(scales_B)]
            scales_B = scales_B + header["nested_offset"]
    except KeyError as error:
        raise ValueError(f"a 4-bit weight lacks {error}; it has {sorted(state)}") from error
    four_bit = FourBitWeight(
        weight.contiguous().view(torch.uint8).flatten(),
        levels,
        scales_B.float(),
        header["blocksize"],
        tuple(header["shape"]),
        getattr(torch, header["dtype"]),
    )
    _check_sizes(four_bit)
    return four_bit


def dequantize(weight: FourBitWeight) -> Tensor:
    """The whole dense weight, in the dtype it had before quantization."""
    return dequantize_rows(weight, 0, weight.shape[0])


def dequantize_rows(weight: FourBitWeight, start: int, stop: int) -> Tensor:
    """Rows `start` to `stop` of the dense weight; reads only the blocks they touch."""
    row_size = torch.Size(weight.shape[1:]).numel()
    first, last = start * row_size, stop * row_size
    first_block, last_block = first // weight.block_size, -(-last // weight.block_size)
    block_start = first_block * weight.block_size  # even, as block sizes are
    packed_P = weight.packed_P[block_start // 2 : -(-last // 2)]
    byte_levels = torch.cartesian_prod(weight.levels, weight.levels)  # of the two codes of a byte
    values = byte_levels.index_select(0, packed_P.int()).flatten()[: last - block_start]
    scales_B = weight.scales_B[first_block:last_block]
    num_whole = len(values) // weight.block_size
    in_blocks = values[: num_whole * weight.block_size].view(num_whole, weight.block_size)
    in_blocks *= scales_B[:num_whole, None]
    values[in_blocks.numel() :] *= scales_B[num_whole:]  # the last, partial block, if any
    return values[first - block_start :].to(weight.dtype).view(stop - start, *weight.shape[1:])


def _check_sizes(weight: FourBitWeight) -> None:
    num_weights = torch.Size(weight.shape).numel()
    expected = {
        "packed bytes": (len(weight.packed_P), -(-num_weights // 2)),
        "scales": (len(weight.scales_B), -(-num_weights // weight.block_size)),
        "levels": (len(weight.levels), LEVELS),
    }
    for name, (found, wanted) in expected.items():
        if found != wanted:
            raise ValueError(
                f"a 4-bit weight of shape {weight.shape} in blocks of {weight.block_size} has "
                f"{found} {name}, expected {wanted}"
            )
