"""The base model of the benchmark: a checkpoint directory, or random weights of a known shape."""

import json
from pathlib import Path

import torch
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from bench_arms.job import Job
from llmtune.errors import LlmtuneError
from llmtune.io.cached import cache_dir
from llmtune.io.safetensors import build_preamble
from llmtune.models.config import ModelConfig
from llmtune.models.quantization.bnb import dequantize_four_bit
from llmtune.models.quantization.describe import keep_differentiable
from llmtune.models.resolve import resolve_base

GGUF_FILE = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "dtype": "bfloat16",
}
QWEN = LLAMA | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 40960,
}


def _sizes(hidden: int, inner: int, layers: int, heads: tuple[int, int], vocabulary: int) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": 128,
        "vocab_size": vocabulary,
    }


SHAPES = {
    "llama-8b": LLAMA | _sizes(4096, 14336, 32, (32, 8), 128256) | {"tie_word_embeddings": False},
    "qwen3-1.7b": QWEN | _sizes(2048, 6144, 28, (16, 8), 151936) | {"tie_word_embeddings": True},
    "qwen3-0.6b": QWEN | _sizes(1024, 3072, 28, (16, 8), 151936) | {"tie_word_embeddings": True},
}


def find_base(name: str | None) -> Path:
    """Return the checkpoint directory that `--model` means; random weights are written once.

    Raises:
        LlmtuneError: it is not there; says how to get it.
    """
    if name is None:
        if not GGUF_FILE.exists():
            raise LlmtuneError(
                f"{GGUF_FILE} is not there: python scripts/fetch_quickstart.py fetches it, or give "
                f"--model a checkpoint directory or one of {', '.join(SHAPES)} (random weights)."
            )
        name = str(GGUF_FILE)
    if name not in SHAPES:
        return resolve_base(ModelConfig(base=name)).directory
    directory = cache_dir() / "bench" / name
    if not (directory / "config.json").exists():
        write_random_base(SHAPES[name], directory)
    return directory


def write_random_base(config: dict, directory: Path) -> None:
    """Write a checkpoint of the given shape, its weights normal(0, 0.02), one tensor at a time."""
    directory.mkdir(parents=True, exist_ok=True)
    config_file = directory / "config.json"
    with torch.device("meta"):
        settings = {name: value for name, value in config.items() if name != "dtype"}
        model_config = CONFIG_MAPPING[config["model_type"]].from_dict(settings)
        shapes = {
            name: parameter.shape
            for name, parameter in AutoModelForCausalLM.from_config(model_config).named_parameters()
        }
    generator = torch.Generator().manual_seed(0)
    partial = directory / "model.safetensors.partial"
    with partial.open("wb") as file:
        tensors = [(name, "BF16", tuple(shape)) for name, shape in shapes.items()]
        file.write(build_preamble(tensors, {"format": "pt"}))
        for shape in shapes.values():
            tensor = torch.ones(shape)
            if len(shape) > 1:
                tensor = torch.randn(shape, generator=generator).mul_(0.02)
            file.write(memoryview(tensor.bfloat16().view(-1).view(torch.uint8).numpy()))
    partial.rename(directory / "model.safetensors")
    config_file.write_text(json.dumps(config))


def load_base(job: Job, *, dtype: torch.dtype) -> PreTrainedModel:
    """Load the base as both sides get it: the same weights, nested NF4 if quantized."""
    options: dict = {"dtype": dtype, "device_map": {"": job.device}}
    if job.quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(job.model_dir, local_files_only=True, **options)
    keep_differentiable(model)
    return model


def dequantize_base(model: PreTrainedModel) -> None:
    """Put float32 linears in place of 4-bit ones: the reference for gradients."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if getattr(getattr(child, "weight", None), "quant_state", None) is not None:
                weight = dequantize_four_bit(child.weight).float()
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                linear.weight = nn.Parameter(weight, requires_grad=False)
                setattr(parent, name, linear)
    model.is_loaded_in_4bit = model.is_quantized = False
    model.hf_quantizer = None
    model.config.quantization_config = None
    del model.config.quantization_config


@torch.no_grad()
def set_adapter(model: PeftModel, *, seed: int = 0) -> None:
    """Give every arm the same adapter. B is not zero, so every gradient is tested from step one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            scale = parameter.shape[1] ** -0.5 if ".lora_A." in name else 0.01
            values = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(values)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that only knows padding: the rows are token ids already."""
    words = {"<pad>": 0, "<eos>": 1}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<eos>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<eos>"
    )
