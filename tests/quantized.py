"""Tiny checkpoints as people find them: stored quantized, by plain reference packers.

Each packer follows the published layout with loops over single numbers' places, and not the way in
which `llmtune.ops` reads them. It returns the stored tensors of a layer and its dense weight.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight neighbors is in each place, lowest first
Packed = tuple[dict[str, Tensor], Tensor]


def round_in_groups(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return codes [O, I], zero points and scales [O, G], and the dense weight."""
    grouped = weight.float().unflatten(1, (-1, GROUP))
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scales = ((high - low) / (2**bits - 1)).half().float()
    zeros = (-low / scales).round().clamp(1, 2**bits - 1)
    codes = (grouped / scales + zeros).round().clamp(0, 2**bits - 1)
    dense = (codes - zeros) * scales
    return codes.flatten(1).int(), zeros[..., 0].int(), scales[..., 0], dense.flatten(1)


def pack_words(codes: Tensor, bits: int, order: tuple[int, ...]) -> Tensor:
    """Pack neighbors along the last dimension into words, the first of `order` lowest."""
    parts = codes.to(torch.int64).unflatten(-1, (-1, 32 // bits))
    words = sum(parts[..., place] << (bits * i) for i, place in enumerate(order))
    return torch.where(words >= 2**31, words - 2**32, words).int()


def pack_gptq(weight: Tensor) -> Packed:
    codes, zeros, scales, dense = round_in_groups(weight, 4)
    in_order = tuple(range(8))
    return {
        "qweight": pack_words(codes, 4, in_order).t(),
        "qzeros": pack_words(zeros.t() - 1, 4, in_order),
        "scales": scales.t().half(),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }, dense


def pack_awq(weight: Tensor) -> Packed:
    codes, zeros, scales, dense = round_in_groups(weight, 4)
    return {
        "qweight": pack_words(codes.t(), 4, AWQ_ORDER),
        "qzeros": pack_words(zeros.t(), 4, AWQ_ORDER),
        "scales": scales.t().half(),
    }, dense


def pack_fp8(weight: Tensor) -> Packed:
    blocks = weight.float().unflatten(1, (-1, 32)).unflatten(0, (-1, 32))
    scales = blocks.abs().amax((1, 3), keepdim=True) / 448
    small = (blocks / scales).to(torch.float8_e4m3fn)
    dense = (small.float() * scales).flatten(0, 1).flatten(1)
    return {"weight": small.flatten(0, 1).flatten(1), "weight_scale_inv": scales[:, 0, :, 0]}, dense


def pack_compressed(weight: Tensor) -> Packed:
    codes, zeros, scales, dense = round_in_groups(weight, 4)
    return {
        "weight_packed": pack_words(codes, 4, tuple(range(8))),
        "weight_zero_point": pack_words(zeros.t(), 4, tuple(range(8))).t(),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }, dense


def pack_hqq(weight: Tensor) -> Packed:
    codes, zeros, scales, dense = round_in_groups(weight, 4)
    grouped = codes.reshape(-1, GROUP)
    half = len(grouped) // 2
    texts = {"packing": "4bit_u8", "compute_dtype": "torch.float32"}
    return {
        "W_q": (grouped[:half] << 4 | grouped[half:]).to(torch.uint8),
        "zero": zeros.reshape(-1, 1).float(),
        "scale": scales.reshape(-1, 1),
        "shape": torch.tensor(weight.shape),
        "nbits": torch.tensor(4, dtype=torch.int32),
        "encoded_state_dict": torch.tensor(1, dtype=torch.uint8),
        "offload_meta": torch.tensor(0, dtype=torch.uint8),
        **{key: torch.tensor([ord(c) for c in text]).byte() for key, text in texts.items()},
    }, dense


def pack_torchao(weight: Tensor) -> Packed:
    scales = weight.float().abs().amax(1, keepdim=True) / 127
    codes = (weight.float() / scales).round()
    return {"_weight_qdata": codes.to(torch.int8), "_weight_scale": scales}, codes * scales


def pack_eight_bits(weight: Tensor) -> Packed:
    stored, dense = pack_torchao(weight)
    scales = stored["_weight_scale"][:, 0] * 127
    format = torch.tensor(0, dtype=torch.uint8)
    return {"weight": stored["_weight_qdata"], "SCB": scales, "weight_format": format}, dense


GROUPED = {"bits": 4, "group_size": GROUP}
LAYOUT = {"weights": {"num_bits": 4, "group_size": GROUP, "symmetric": False}}
PACKERS: dict[str, tuple[Callable[[Tensor], Packed], dict]] = {
    "gptq": (pack_gptq, {**GROUPED, "sym": False, "desc_act": False}),
    "awq": (pack_awq, {**GROUPED, "version": "gemm", "zero_point": True}),
    "fp8": (pack_fp8, {"weight_block_size": [32, 32]}),
    "compressed-tensors": (
        pack_compressed,
        {"format": "pack-quantized", "config_groups": {"group_0": LAYOUT}},
    ),
    "hqq": (pack_hqq, {"quant_config": {"weight_quant_params": {"nbits": 4}}}),
    "torchao": (pack_torchao, {"quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}),
    "bitsandbytes": (pack_eight_bits, {"load_in_8bit": True}),
}


def store_quantized(directory: Path, method: str) -> dict[str, Tensor]:
    """Store the linear weights of a checkpoint's layers by `method`; return them dense."""
    pack, knobs = PACKERS[method]
    stored, dense, about = {}, {}, {"format": "pt"}
    for name, tensor in load_file(directory / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            stored[name] = tensor
            continue
        parts, dense[name] = pack(tensor)
        stem = name.removesuffix("weight")
        stored |= {stem + end: part.contiguous() for end, part in parts.items()}
        about[name] = json.dumps({"_type": "Int8Tensor"})
    save_file(stored, directory / "model.safetensors", about)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, **knobs}
    (directory / "config.json").write_text(json.dumps(config))
    return dense


def store_experts(directory: Path) -> dict[str, Tensor]:
    """Store the experts of a gpt-oss checkpoint in MXFP4; return them dense, [E, I, O]."""
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    levels = torch.cat([levels, -levels])
    stored, dense = {}, {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = tensor
            continue
        groups = tensor.float().transpose(1, 2).unflatten(2, (-1, 32))
        exponents = groups.abs().amax(-1, keepdim=True).log2().floor() - 2
        codes = (groups / 2**exponents).unsqueeze(-1).sub(levels).abs().argmin(-1)
        dense[name] = (levels[codes] * 2**exponents).flatten(2).transpose(1, 2)
        stored[f"{name}_blocks"] = (codes[..., 1::2] << 4 | codes[..., ::2]).byte()
        stored[f"{name}_scales"] = (exponents[..., 0] + 127).byte()
    save_file(
        {name: tensor.contiguous() for name, tensor in stored.items()},
        directory / "model.safetensors",
        {"format": "pt"},
    )
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (directory / "config.json").write_text(json.dumps(config))
    return dense
