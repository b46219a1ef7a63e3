"""Make the examples in this folder: a layer that each library packed, and what it reads back.

Not run by the tests, which need none of these libraries. With hqq, compressed-tensors, torchao,
bitsandbytes, transformers and torch installed, and the unpacked auto_gptq and autoawq packages
beside each other (single files of theirs are run; their packages do not import any more):

    python tests/models/stored/make_examples.py PLACE_OF_AUTO_GPTQ PLACE_OF_AUTOAWQ
"""

import importlib.util
import json
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import save_file
from torch import nn

HERE = Path(__file__).parent
ROWS, COLUMNS, GROUP = 64, 128, 32


def main(auto_gptq: Path, autoawq: Path) -> None:
    """Make all of them."""
    torch.manual_seed(0)
    for bits in (2, 3, 4, 8):
        make_gptq(auto_gptq, bits)
    make_awq(autoawq)
    make_fp8()
    make_mxfp4()
    for bits in (8, 4, 3, 2, 1):
        make_hqq(bits, axis=1 if bits != 8 else 0)
    make_hqq(4, axis=0)
    make_compressed_tensors()
    make_torchao()
    make_bitsandbytes()


def save(
    name: str, tensors: dict, expected: torch.Tensor, knobs: dict, made_by: str, **more
) -> None:
    """Write one example: stored tensors of the layer `proj`, and its dense weight."""
    stored = {f"stored/{key}": value.contiguous() for key, value in tensors.items()}
    about = {"quantization_config": json.dumps(knobs), "made_by": made_by, **more}
    save_file({**stored, "expected": expected.contiguous()}, HERE / f"{name}.safetensors", about)
    print(name, tuple(expected.shape), expected.dtype)


def random_weight() -> torch.Tensor:
    """Return a weight with some large rows and an offset."""
    return torch.randn(ROWS, COLUMNS) * torch.rand(ROWS, 1) + 0.1


def quantize(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales and zero points [out, groups] of plain rounding."""
    grouped = weight.reshape(ROWS, -1, GROUP)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scales = ((high - low) / (2**bits - 1)).half().float()
    return scales, (-low / scales).round().clamp(1, 2**bits - 1)


def load_file(path: Path, name: str) -> ModuleType:
    """Run one file of a package."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_gptq(place: Path, bits: int) -> None:
    """AutoGPTQ's own packing, with and without an order of columns, and its product with 1."""
    file = place / "auto_gptq/nn_modules/qlinear/qlinear_cuda.py"
    kind = load_file(file, "qlinear_cuda").QuantLinear
    weight = random_weight()
    scales, zeros = quantize(weight, bits)
    order = torch.randperm(COLUMNS) // GROUP if bits == 4 else torch.arange(COLUMNS) // GROUP
    codes = (weight / scales[:, order] + zeros[:, order]).round().clamp(0, 2**bits - 1)
    linear = nn.Linear(COLUMNS, ROWS, bias=False)
    linear.weight.data = (codes - zeros[:, order]) * scales[:, order]
    layer = kind(bits, GROUP, COLUMNS, ROWS, bias=False)
    layer.pack(linear, scales, zeros, order.int())
    dense = layer.half()(torch.eye(COLUMNS).half()).t()
    tensors = {f"proj.{name}": value for name, value in layer.state_dict().items()}
    knobs = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "sym": False}
    save(f"gptq_{bits}", tensors, dense, knobs, "auto-gptq 0.7.1, qlinear_cuda", dtype="float16")


def make_awq(place: Path) -> None:
    """AutoAWQ's own packing and unpacking."""
    text = (place / "awq/modules/linear/gemm.py").read_text()
    utils = load_file(place / "awq/utils/packing_utils.py", "packing_utils")
    weight = random_weight()
    scales, zeros = quantize(weight, 4)
    source = text[text.index("class WQLinear_GEMM") :]
    names = {"torch": torch, "nn": nn, "get_best_device": lambda: "cpu", "warnings": None}
    exec(source, names)
    linear = nn.Linear(COLUMNS, ROWS, bias=False)
    order = torch.arange(COLUMNS) // GROUP
    codes = (weight / scales[:, order] + zeros[:, order]).round().clamp(0, 15)
    linear.weight.data = (codes - zeros[:, order]) * scales[:, order]
    layer = names["WQLinear_GEMM"].from_linear(
        linear.half(), 4, GROUP, scales=scales.t().half(), zeros=zeros.t()
    )
    dense = utils.dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, GROUP).t()
    tensors = {f"proj.{name}": value for name, value in layer.state_dict().items()}
    knobs = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}
    save("awq", tensors, dense, knobs, "autoawq 0.2.9, WQLinear_GEMM", dtype="float16")


def make_fp8() -> None:
    """What transformers reads of blocks of 32 x 32, and of one scale for all."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    reader = Fp8Dequantize(None)
    weight = random_weight()
    blocks = weight.reshape(ROWS // 32, 32, COLUMNS // 32, 32)
    for name, scales in (
        ("fp8_blocks", blocks.abs().amax((1, 3)) / 448),
        ("fp8_tensor", weight.abs().amax() / 448),
    ):
        grid = scales.reshape(1, 1) if scales.ndim == 0 else scales
        wide = grid.repeat_interleave(ROWS // len(grid), 0)
        wide = wide.repeat_interleave(COLUMNS // grid.shape[1], 1)
        small = (weight / wide).to(torch.float8_e4m3fn)
        dense = reader._dequantize_one(small, scales, torch.bfloat16)
        block = [32, 32] if scales.ndim else None
        knobs = {"quant_method": "fp8", "weight_block_size": block}
        tensors = {"proj.weight": small, "proj.weight_scale_inv": scales}
        save(name, tensors, dense, knobs, f"transformers {version('transformers')}")


def make_mxfp4() -> None:
    """What transformers reads of gpt-oss' experts."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.randint(0, 256, (2, 48, 3, 16), dtype=torch.uint8)
    scales = torch.randint(110, 130, (2, 48, 3), dtype=torch.uint8)
    dense = convert_moe_packed_tensors(blocks, scales)
    tensors = {"proj.weight_blocks": blocks, "proj.weight_scales": scales}
    save(
        "mxfp4",
        tensors,
        dense,
        {"quant_method": "mxfp4"},
        f"transformers {version('transformers')}",
    )


def make_hqq(bits: int, axis: int) -> None:
    """HQQ's own layer."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    linear = nn.Linear(COLUMNS, ROWS, bias=False)
    linear.weight.data = random_weight()
    config = BaseQuantizeConfig(nbits=bits, group_size=GROUP, axis=axis)
    layer = HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu")
    tensors = {f"proj.{name}": value for name, value in layer.state_dict().items()}
    knobs = {"quant_method": "hqq", "quant_config": config}
    made_by = f"hqq {version('hqq')}"
    name = f"hqq_{bits}_axis{axis}"
    save(
        name,
        tensors,
        layer.dequantize(),
        json.loads(json.dumps(knobs, default=str)),
        made_by,
        dtype="float16",
    )


def make_compressed_tensors() -> None:
    """compressed-tensors' own compressors."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    made_by = f"compressed-tensors {version('compressed-tensors')}"
    group = {"strategy": "group", "group_size": GROUP}
    for name, layout, knobs in (
        ("packed4", "pack-quantized", {"num_bits": 4, "symmetric": True, **group}),
        ("packed4_zeros", "pack-quantized", {"num_bits": 4, "symmetric": False, **group}),
        ("packed3", "pack-quantized", {"num_bits": 3, "symmetric": False, **group}),
        ("packed8", "pack-quantized", {"num_bits": 8, "symmetric": True, "strategy": "channel"}),
        ("int8", "int-quantized", {"num_bits": 8, "symmetric": True, "strategy": "channel"}),
        ("int8_zeros", "int-quantized", {"num_bits": 8, "symmetric": False, "strategy": "channel"}),
        ("fp8", "float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
        ("fp8_tensor", "float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        (
            "fp8_block",
            "float-quantized",
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [48, 48]},
        ),
        (
            "nvfp4",
            "nvfp4-pack-quantized",
            {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
        ),
        ("mxfp4", "mxfp4-pack-quantized", {"num_bits": 4, "type": "float", **group}),
    ):
        args = QuantizationArgs(**knobs)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        weight = random_weight().bfloat16()
        state = {"weight": weight}
        if knobs["strategy"] == "tensor_group":
            state["weight_global_scale"] = generate_gparam(
                weight.float().min(), weight.float().max()
            )
            parts = weight.reshape(ROWS, -1, 16)
        elif knobs["strategy"] == "group":
            parts = weight.reshape(ROWS, -1, GROUP)
        elif knobs["strategy"] == "channel":
            parts = weight.reshape(ROWS, 1, -1)
        elif knobs["strategy"] == "block":
            padded = nn.functional.pad(weight, (0, -COLUMNS % 48, 0, -ROWS % 48))
            parts = padded.reshape(-(-ROWS // 48), 48, -(-COLUMNS // 48), 48)
            parts = parts.transpose(1, 2).flatten(2)
        else:
            parts = weight.reshape(1, -1)
        low, high = parts.amin(-1), parts.amax(-1)
        scales, zeros = calculate_qparams(low, high, args, state.get("weight_global_scale"))
        state["weight_scale"] = scales
        if not args.symmetric:
            state["weight_zero_point"] = zeros
        compressor = BaseCompressor.get_value_from_registry(layout)
        packed = compressor.compress(state, scheme)
        dense = compressor.decompress(dict(packed), scheme)["weight"]
        weights = dict(knobs)
        groups = {"group_0": {"targets": ["Linear"], "weights": weights, "format": layout}}
        config = {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups}
        tensors = {f"proj.{key}": value for key, value in packed.items()}
        save(f"compressed_{name}", tensors, dense, config, made_by)


def make_torchao() -> None:
    """torchao's own tensors, taken apart as it saves them."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerGroup,
        quantize_,
    )

    for name, config in (
        ("float8", Float8WeightOnlyConfig()),
        ("int8", Int8WeightOnlyConfig(version=2)),
        ("intx4", IntxWeightOnlyConfig(torch.int4, PerGroup(GROUP))),
    ):
        linear = nn.Linear(COLUMNS, ROWS, bias=False)
        linear.weight.data = random_weight()
        model = nn.ModuleDict({"proj": linear}).bfloat16()
        quantize_(model, config)
        weight = model["proj"].weight
        tensors, metadata = flatten_tensor_state_dict({"proj.weight": weight.data})
        kind = {
            "quant_method": "torchao",
            "quant_type": {"default": {"_type": type(config).__name__}},
        }
        made_by = f"torchao {version('torchao')}"
        save(f"torchao_{name}", tensors, weight.dequantize(), kind, made_by, **metadata)


def make_bitsandbytes() -> None:
    """bitsandbytes' own layers."""
    import bitsandbytes as bnb
    from bitsandbytes import functional

    for kind in ("nf4", "fp4"):
        weight = random_weight().bfloat16()
        layer = bnb.nn.Linear4bit(
            COLUMNS, ROWS, bias=False, quant_type=kind, compress_statistics=kind == "nf4"
        )
        layer.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, quant_type=kind, compress_statistics=kind == "nf4"
        )
        layer = layer.to("cpu")
        dense = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        tensors = {f"proj.{name}": value for name, value in layer.state_dict().items()}
        knobs = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        save(f"bnb_{kind}", tensors, dense, knobs, f"bitsandbytes {version('bitsandbytes')}")
    codes, scales, _ = functional.int8_vectorwise_quant(random_weight().half())
    dense = functional.int8_vectorwise_dequant(codes, scales).bfloat16()
    tensors = {
        "proj.weight": codes,
        "proj.SCB": scales,
        "proj.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    knobs = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    save("bnb_int8", tensors, dense, knobs, f"bitsandbytes {version('bitsandbytes')}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
