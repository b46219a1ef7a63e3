"""Read weights that are stored as packed whole numbers: (code - zero) * scale, in plain torch.

Codes of `bits` bits follow each other in 32-bit words, the first one in the lowest bits; three-bit
codes go over the words' edges. Products are float32 and rounded once to the dtype asked for.

Shape suffixes: O output features, I input features, G groups of input features that share a scale,
W 32-bit words, B bytes.
"""

import math

import torch
from torch import Tensor

WORD = 32
TILE_ELEMENTS = 1 << 24
"""Numbers that are computed in float32 at a time: 64 MiB."""
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where each of eight neighbors is within a word (Lin et al. 2023, `gemm` kernels of AutoAWQ)."""


def unpack_words(words_W: Tensor, bits: int) -> Tensor:
    """Return the codes in int32 words as uint8, along the last dimension.

    Raises:
        ValueError: the words do not hold a whole number of codes.
    """
    num_words = math.lcm(WORD, bits) // WORD
    if words_W.shape[-1] % num_words:
        raise ValueError(f"{words_W.shape[-1]} words do not end with a whole code of {bits} bits")
    words = words_W.unflatten(-1, (-1, num_words))
    codes = torch.empty(
        *words.shape[:-1], num_words * WORD // bits, dtype=torch.uint8, device=words.device
    )
    for i in range(codes.shape[-1]):
        word, shift = divmod(i * bits, WORD)
        code = words[..., word] >> shift  # keeps the sign, which the mask takes away
        if (low := WORD - shift) < bits:
            code = code & ((1 << low) - 1) | words[..., word + 1] << low
        codes[..., i] = code & ((1 << bits) - 1)
    return codes.flatten(-2)


def scale_codes(
    codes_OI: Tensor,
    zeros_OG: Tensor | float,
    scales_OG: Tensor,
    group_of_I: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Return (code - zero) * scale, some rows at a time.

    Args:
        group_of_I: the group of each input feature; its column in scales and zeros.
    """
    out = torch.empty(codes_OI.shape, dtype=dtype, device=codes_OI.device)
    height = max(1, TILE_ELEMENTS // max(1, codes_OI.shape[-1]))
    for first in range(0, len(codes_OI), height):
        rows = slice(first, first + height)
        zeros = zeros_OG[rows].float()[:, group_of_I] if isinstance(zeros_OG, Tensor) else zeros_OG
        out[rows] = (codes_OI[rows].float() - zeros) * scales_OG[rows].float()[:, group_of_I]
    return out


def groups_of(num_inputs: int, group_size: int) -> Tensor:
    """Return the group of each input feature if neighbors share one."""
    return torch.arange(num_inputs) // group_size


def dequantize_gptq(
    words_WO: Tensor,
    zeros_GO: Tensor | None,
    scales_GO: Tensor,
    group_of_I: Tensor,
    *,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the weight [out, in] of a layer by GPTQ (Frantar et al. 2022), as AutoGPTQ packs it.

    Args:
        words_WO: codes along the input features.
        zeros_GO: as `unpack_gptq_zeros` returns them; None is the middle of the codes.
    """
    codes_OI = unpack_words(words_WO.t().contiguous(), bits)
    zeros_OG = float(1 << (bits - 1)) if zeros_GO is None else zeros_GO.t()
    return scale_codes(codes_OI, zeros_OG, scales_GO.t(), group_of_I, dtype)


def unpack_gptq_zeros(words_GW: Tensor, bits: int, offset: int) -> Tensor:
    """Return zero points that are packed along the output features, [G, O].

    Args:
        offset: how much less than they are they are stored: 1 in format `gptq`, 0 in `gptq_v2`.
    """
    return (unpack_words(words_GW, bits) + offset) & ((1 << bits) - 1)


def dequantize_awq(
    words_IW: Tensor, zeros_GW: Tensor, scales_GO: Tensor, *, group_size: int, dtype: torch.dtype
) -> Tensor:
    """Return the weight [out, in] of a 4-bit layer by AWQ (Lin et al. 2023), `gemm` layout."""
    codes_IO, zeros_GO = (_in_order(unpack_words(words, 4)) for words in (words_IW, zeros_GW))
    group_of_I = groups_of(len(codes_IO), group_size)
    return scale_codes(codes_IO.t().contiguous(), zeros_GO.t(), scales_GO.t(), group_of_I, dtype)


def dequantize_packed(
    words_OW: Tensor,
    zeros_WG: Tensor | None,
    scales_OG: Tensor,
    group_of_I: Tensor,
    *,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the weight [out, in] of a layer in compressed-tensors' `pack-quantized` format.

    Args:
        words_OW: codes along the input features, which begin at the middle of their range.
        zeros_WG: zero points along the output features, in the same way; None are none.
    """
    num_outputs, num_inputs = len(words_OW), len(group_of_I)
    codes_OI = _unpack_padded(words_OW, bits, num_inputs)
    zeros_OG: Tensor | float = float(1 << (bits - 1))
    if zeros_WG is not None:
        zeros_OG = _unpack_padded(zeros_WG.t().contiguous(), bits, num_outputs).t()
    return scale_codes(codes_OI, zeros_OG, scales_OG, group_of_I, dtype)


def unpack_bytes(bytes_B: Tensor, bits: int) -> Tensor:
    """Return the codes in bytes, the first *part* of them in the highest bits, as HQQ packs them.

    Codes are split into 8 / bits parts along the first dimension, and byte i holds code i of each.
    """
    shifts = range(8 - bits, -1, -bits)
    return torch.cat([bytes_B >> shift & ((1 << bits) - 1) for shift in shifts])


def unpack_three_bits(words_W: Tensor) -> Tensor:
    """Return three-bit codes as HQQ packs them: ten to a word, one of each tenth of the rows."""
    return torch.cat([words_W >> shift & 7 for shift in range(27, -1, -3)]).to(torch.uint8)


def dequantize_hqq(
    codes: Tensor, zeros: Tensor, scales: Tensor, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Return the weight [out, in] of a layer by HQQ (Badri and Shaji 2023).

    Computed in the scales' own dtype, to which the difference is rounded too, as the library does.

    Args:
        codes: [group, number of groups] or [number of groups, group].
        zeros: of one group each, with a 1 in place of the group; scales too.
    """
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    height = max(1, TILE_ELEMENTS // max(1, codes.shape[-1]))
    for first in range(0, len(codes), height):
        rows = slice(first, first + height)
        zero, scale = (one[rows] if len(one) > 1 else one for one in (zeros, scales))
        out[rows] = (codes[rows].to(scale.dtype) - zero.to(scale.dtype)) * scale
    return out.reshape(shape)


def _in_order(codes: Tensor) -> Tensor:
    return codes.unflatten(-1, (-1, len(AWQ_ORDER)))[..., list(AWQ_ORDER)].flatten(-2)


def _unpack_padded(words: Tensor, bits: int, count: int) -> Tensor:
    """Unpack words of which the last may hold less than whole codes."""
    missing = -words.shape[-1] % (math.lcm(WORD, bits) // WORD)
    return unpack_words(torch.nn.functional.pad(words, (0, missing)), bits)[..., :count]
