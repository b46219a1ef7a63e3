"""Make `logits/*.safetensors`: tiny quantized models, and what each format's own library answers.

Not run by the tests, which need none of these libraries. With transformers, hqq, torchao,
compressed-tensors, bitsandbytes, gptqmodel and optimum installed:

    python tests/models/stored/make_logits.py [FORMAT ...]

hqq, torchao, bitsandbytes and compressed-tensors quantize the model themselves; the others, which
need calibration rows or a GPU for that, load what `tests/quantized.py` packed. All answers are
computed on the CPU in float32.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2]))

from tests.quantized import store_experts, store_quantized  # noqa: E402
from tests.tiny import make_model  # noqa: E402

TINY = {"vocab_size": 128, "num_hidden_layers": 1, "tie_word_embeddings": True}
IDS = [2, 17, 33, 120, 7, 90, 64, 3]


def main(names: list[str]) -> None:
    """Make those named, or all."""
    for name in names or list(MAKERS):
        with tempfile.TemporaryDirectory() as folder:
            try:
                model = MAKERS[name](Path(folder))
                kinds = {type(one).__name__ for one in model.modules()}
                with torch.no_grad():
                    logits = model(torch.tensor([IDS])).logits[0].float()
            except Exception as error:  # noqa: BLE001 (a library that does not run here is named)
                print(name, "FAILED", type(error).__name__, " ".join(str(error).split())[:300])
                continue
            keep(name, Path(folder) / "stored", logits)
            print(name, sorted(one for one in kinds if "Linear" in one), flush=True)


def keep(name: str, stored: Path, logits: torch.Tensor) -> None:
    """Write the checkpoint and the answers as one file."""
    path = stored / "model.safetensors"
    with safe_open(path, "pt") as file:
        about = dict(file.metadata() or {})
    tensors = {f"stored/{key}": value for key, value in load_file(path).items()}
    config = json.loads((stored / "config.json").read_text())
    about |= {"config": json.dumps(config), "ids": json.dumps(IDS)}
    (HERE / "logits").mkdir(exist_ok=True)
    save_file({**tensors, "logits": logits}, HERE / "logits" / f"{name}.safetensors", about)


def load(directory: Path, **options: Any) -> torch.nn.Module:
    """Return a model as transformers and the format's library load it, in float32."""
    model = AutoModelForCausalLM.from_pretrained(directory, device_map="cpu", **options)
    return model.eval()


def quantize(folder: Path, knobs: Any, **options: Any) -> torch.nn.Module:
    """Let a library quantize and store a tiny model, and return it."""
    make_model("llama", folder / "plain", dtype=torch.float16, **TINY)
    model = load(folder / "plain", dtype=torch.float32, quantization_config=knobs, **options)
    model.save_pretrained(folder / "stored")
    set_config(folder / "stored", dtype="float16")
    return model


def packed(folder: Path, method: str, knobs: dict[str, Any], **options: Any) -> torch.nn.Module:
    """Return a model that `tests/quantized.py` packed, as the library loads it."""
    stored = folder / "stored"
    make_model("llama", stored, dtype=torch.float16, **TINY)
    store_quantized(stored, method)
    config = json.loads((stored / "config.json").read_text())["quantization_config"]
    set_config(stored, quantization_config={**config, **knobs})
    return load(stored, **{"dtype": torch.float32, **options})


def replaced(
    folder: Path,
    replace: Callable[[str, nn.Linear], tuple[nn.Module, dict[str, torch.Tensor]]],
    about: dict[str, Any],
) -> torch.nn.Module:
    """Store a model whose layers a library quantized one by one, and return it with its layers."""
    stored = folder / "stored"
    model = make_model("llama", stored, dtype=torch.float16, **TINY).float()
    tensors = load_file(stored / "model.safetensors")
    for name, linear in list(model.named_modules()):
        if name.endswith("_proj"):
            layer, parts = replace(name, linear)
            model.set_submodule(name, layer)
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{key}": value.contiguous() for key, value in parts.items()}
    save_file(tensors, stored / "model.safetensors", {"format": "pt"})
    set_config(stored, quantization_config=about)
    return model


def set_config(directory: Path, **values: Any) -> None:
    """Set keys of a config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def make_hqq(folder: Path) -> torch.nn.Module:
    """HQQ's own layers: this transformers does not load HQQ."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    knobs = BaseQuantizeConfig(nbits=4, group_size=32, axis=1)

    def replace(name: str, linear: nn.Linear) -> tuple[nn.Module, dict[str, torch.Tensor]]:
        layer = HQQLinear(linear, knobs, compute_dtype=torch.float32, device="cpu", del_orig=False)
        return layer, {key: value for key, value in layer.state_dict().items() if key != "bias"}

    about = {"quant_method": "hqq", "quant_config": knobs}
    return replaced(folder, replace, json.loads(json.dumps(about, default=str)))


def make_torchao(folder: Path) -> torch.nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return quantize(folder, TorchAoConfig(quant_type=Int8WeightOnlyConfig()))


def make_bitsandbytes(folder: Path) -> torch.nn.Module:
    from transformers import BitsAndBytesConfig

    knobs = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = quantize(folder, knobs)
    for layer in model.modules():  # a kernel for CPUs with AVX-512 rounds every input to bfloat16
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return model


def make_awq(folder: Path) -> torch.nn.Module:
    return packed(folder, "awq", {"quant_method": "awq"})


def make_gptq(folder: Path) -> torch.nn.Module:
    return packed(folder, "gptq", {"checkpoint_format": "gptq"})


def make_fp8(folder: Path) -> torch.nn.Module:
    from transformers import FineGrainedFP8Config

    knobs = FineGrainedFP8Config(weight_block_size=(32, 32), dequantize=True)
    return packed(folder, "fp8", {}, quantization_config=knobs).float()


def make_compressed_tensors(folder: Path) -> torch.nn.Module:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    knobs = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    args = QuantizationArgs(**knobs)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")

    def replace(name: str, linear: nn.Linear) -> tuple[nn.Module, dict[str, torch.Tensor]]:
        parts = linear.weight.data.unflatten(1, (-1, 32))
        scales, _ = calculate_qparams(parts.amin(-1), parts.amax(-1), args)
        return linear, compressor.compress(
            {"weight": linear.weight.data, "weight_scale": scales}, scheme
        )

    about = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": knobs}},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }
    replaced(folder, replace, about)
    return load(folder / "stored", dtype=torch.float32)


def make_mxfp4(folder: Path) -> torch.nn.Module:
    from transformers import Mxfp4Config

    stored = folder / "stored"
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    experts |= {"head_dim": 16, "num_key_value_heads": 2}
    make_model("gpt_oss", stored, dtype=torch.bfloat16, **{**TINY, **experts})
    store_experts(stored)
    return load(
        stored, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    ).float()


MAKERS: dict[str, Callable[[Path], torch.nn.Module]] = {
    "hqq": make_hqq,
    "torchao": make_torchao,
    "bitsandbytes": make_bitsandbytes,
    "awq": make_awq,
    "gptq": make_gptq,
    "fp8": make_fp8,
    "compressed-tensors": make_compressed_tensors,
    "mxfp4": make_mxfp4,
}

if __name__ == "__main__":
    main(sys.argv[1:])
