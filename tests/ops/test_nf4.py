"""4-bit weights read without bitsandbytes equal what bitsandbytes makes of them, bit for bit."""

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmtune.models.stored.four_bits import group_four_bit_names
from llmtune.ops.nf4 import (
    dequantize,
    dequantize_rows,
    read_four_bit_weight,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def quantize(shape, dtype, quant_type="nf4", *, is_nested=True, block_size=64, storage=torch.uint8):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    packed, state = bnb.quantize_4bit(
        weight,
        blocksize=block_size,
        quant_type=quant_type,
        compress_statistics=is_nested,
        quant_storage=storage,
    )
    return weight, packed, state


@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantized_weight_equals_bitsandbytes_bit_for_bit(dtype, quant_type, is_nested):
    _, packed, state = quantize((260, 192), dtype, quant_type, is_nested=is_nested)
    ours = dequantize(read_four_bit_weight(packed, state.as_dict(packed=True)))
    reference = bnb.dequantize_4bit(packed, state)
    assert ours.dtype == dtype
    assert torch.equal(ours, reference)


@pytest.mark.parametrize("shape", [(33, 70), (3, 6), (2, 2), (4, 4, 64)])
def test_sizes_that_end_within_a_block_equal_bitsandbytes(shape):
    _, packed, state = quantize(shape, torch.float32)
    ours = dequantize(read_four_bit_weight(packed, state.as_dict(packed=True)))
    assert torch.equal(ours, bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize(("shape", "block_size"), [((96, 160), 64), ((64, 64), 128), ((5, 7), 64)])
def test_blocks_that_span_rows_are_scaled_rightly(shape, block_size):
    # bitsandbytes 0.50's AVX-512 kernel takes wrong scales here: the truth is the original weight.
    weight, packed, state = quantize(shape, torch.float32, block_size=block_size)
    ours = dequantize(read_four_bit_weight(packed, state.as_dict(packed=True)))
    half_gap = 0.16 * weight.abs().max()  # NF4's widest gap between levels is 0.304 of the scale
    assert (ours - weight).abs().max() < half_gap


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_the_storage_dtype_of_the_codes_does_not_matter(storage):
    _, packed, state = quantize((32, 64), torch.bfloat16, storage=storage)
    ours = dequantize(read_four_bit_weight(packed, state.as_dict(packed=True)))
    assert torch.equal(ours, bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("shape", [(40, 70), (40, 64), (6, 5)])
def test_tiles_of_rows_equal_the_whole(shape):
    _, packed, state = quantize(shape, torch.bfloat16)
    weight = read_four_bit_weight(packed, state.as_dict(packed=True))
    whole = dequantize(weight)
    for start, stop in [(0, 1), (1, 4), (3, shape[0]), (shape[0] - 1, shape[0])]:
        assert torch.equal(dequantize_rows(weight, start, stop), whole[start:stop])


def test_a_saved_checkpoint_is_read_without_bitsandbytes(tmp_path):
    _, packed, state = quantize((32, 64), torch.bfloat16)
    tensors = {f"a.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    tensors |= {"a.weight": packed, "norm.weight": torch.ones(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = load_file(tmp_path / "model.safetensors")
    names = group_four_bit_names(loaded)
    assert list(names) == ["a.weight"]
    parts = {suffix: loaded[name] for suffix, name in names["a.weight"].items()}
    ours = dequantize(read_four_bit_weight(loaded["a.weight"], parts))
    assert torch.equal(ours, bnb.dequantize_4bit(packed, state))


def test_a_missing_tensor_is_named():
    _, packed, state = quantize((32, 64), torch.bfloat16)
    parts = state.as_dict(packed=True)
    del parts["nested_quant_map"]
    with pytest.raises(ValueError, match="lacks 'nested_quant_map'"):
        read_four_bit_weight(packed, parts)


def test_a_truncated_weight_is_refused():
    _, packed, state = quantize((32, 64), torch.bfloat16)
    with pytest.raises(ValueError, match="has 1023 packed bytes, expected 1024"):
        read_four_bit_weight(packed[:-1], state.as_dict(packed=True))
