"""Read weights that are stored as 8-bit or 4-bit floats with a scale for each block.

Products are float32 and rounded once to the dtype asked for.

Shape suffixes: R rows, C columns, r and c blocks of them, P bytes of two 4-bit floats (the low half
first), E experts, O output and I input features.
"""

from itertools import product

import torch
from torch import Tensor

TILE_ELEMENTS = 1 << 24
"""Numbers that are computed in float32 at a time: 64 MiB."""
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The 4-bit floats (OCP Microscaling Formats 1.0, table 5); the highest bit is the sign."""
E8M0_BIAS = 127


def read_scales(scales: Tensor) -> Tensor:
    """Return scales in float32; bytes are exponents of two (E8M0: 2^(byte - 127))."""
    if scales.dtype != torch.uint8:
        return scales.float()
    ones = torch.ones(scales.shape, device=scales.device)
    return torch.ldexp(ones, scales.int() - E8M0_BIAS)


def dequantize_blocks(
    weight_RC: Tensor, scales_rc: Tensor, block: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Return weight * scale of its block; weights of several experts come one after the other.

    Args:
        weight_RC: floats or whole numbers, [..., R, C].
        scales_rc: [..., r, c]; the last block of a row or column may be cut off by the edge.
        block: rows and columns of a block.
    """
    height, width = block
    out = torch.empty(weight_RC.shape, dtype=dtype, device=weight_RC.device)
    num_rows, num_columns = weight_RC.shape[-2:]
    step = max(1, TILE_ELEMENTS // max(1, num_columns) // height) * height
    for index in product(*map(range, weight_RC.shape[:-2])):
        scales = read_scales(scales_rc[index]).repeat_interleave(width, -1)[:, :num_columns]
        for first in range(0, num_rows, step):
            tile = weight_RC[index][first : first + step].float()
            rows = scales[first // height : -(-(first + len(tile)) // height)]
            tile *= rows.repeat_interleave(height, -2)[: len(tile)]
            out[index][first : first + step] = tile
    return out


def subtract_zeros(weight_RC: Tensor, zeros_rc: Tensor, block: tuple[int, int]) -> Tensor:
    """Return weight - zero point of its block, in float32."""
    zeros = zeros_rc.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return weight_RC.float() - zeros[: weight_RC.shape[0], : weight_RC.shape[1]]


def unpack_e2m1(bytes_P: Tensor) -> Tensor:
    """Return the 4-bit floats of packed bytes in bfloat16, which holds them exactly."""
    values = torch.tensor(E2M1_VALUES, dtype=torch.bfloat16)
    levels = torch.cat([values, -values])
    bytes_P = bytes_P.view(torch.uint8)
    return torch.stack([levels[(bytes_P & 15).int()], levels[(bytes_P >> 4).int()]], -1).flatten(-2)


def dequantize_mxfp4(bytes_GP: Tensor, scales_G: Tensor, dtype: torch.dtype) -> Tensor:
    """Return weights in MXFP4 (OCP Microscaling Formats 1.0): a power of two for each 32.

    Args:
        bytes_GP: [..., groups, 16].
        scales_G: [..., groups], E8M0 in uint8.
    """
    out = torch.empty(
        *bytes_GP.shape[:-2],
        2 * bytes_GP.shape[-2] * bytes_GP.shape[-1],
        dtype=dtype,
        device=bytes_GP.device,
    )
    for index in product(*map(range, bytes_GP.shape[:-3])):
        values = unpack_e2m1(bytes_GP[index]).float()
        values *= read_scales(scales_G[index]).unsqueeze(-1)
        out[index] = values.flatten(-2)
    return out


def dequantize_expert_stack(bytes_EOGP: Tensor, scales_EOG: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gpt-oss' fused experts [E, I, O] from blocks in MXFP4, which are stored [E, O, I]."""
    experts, outputs, groups, width = bytes_EOGP.shape
    out = torch.empty(experts, groups * width * 2, outputs, dtype=dtype, device=bytes_EOGP.device)
    for expert in range(experts):  # turned one by one: the whole stack is not there twice
        out[expert] = dequantize_mxfp4(bytes_EOGP[expert], scales_EOG[expert], dtype).t()
    return out
