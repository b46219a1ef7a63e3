"""Time and peak memory of the merge beside stock peft's and a plain copy, on synthetic bases.

Every measurement is a fresh process; the methods take turns within a round, and the median round
is reported. All three flush what they wrote. `peak_bytes` is above the same process when idle, its
libraries loaded; peft's loading of the model counts for its peak and not for its seconds.

    python scripts/bench_merge.py --sizes 0.5,1,2 --json bench_merge.json
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RANK = 16
VOCABULARY, HIDDEN, INNER = 8192, 2048, 5632
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
METHODS = ("llmtune", "peft", "copy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="0.5,1,2", help="base sizes in GB, comma-separated")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds a size")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--dir", type=Path, help="where the bases are made (default: a temporary)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child[0], Path(arguments.child[1]))))
        return
    results: list[dict[str, Any]] = []
    for size in arguments.sizes.split(","):
        with tempfile.TemporaryDirectory(dir=arguments.dir) as place:
            results += bench(float(size) * 1e9, Path(place), arguments.rounds)
    for result in results:
        times = result["seconds"] / result["copy_seconds"]
        print(
            f"{result['method']:8} {result['model_bytes'] / 1e9:5.2f} GB  "
            f"{result['seconds']:7.2f} s  ({times:5.2f} x copy)"
            f"  peak {result['peak_bytes'] / 1e6:7.0f} MB"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


def bench(num_bytes: float, place: Path, rounds: int) -> list[dict[str, Any]]:
    """Return one result a method: medians over the rounds."""
    model_bytes = make_base(num_bytes, place / "base")
    make_adapter(place / "base", place / "adapter")
    runs: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    for number in range(rounds):
        for method in METHODS[number % 3 :] + METHODS[: number % 3]:
            command = [sys.executable, __file__, "--child", method, str(place)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            runs[method].append(json.loads(done.stdout.splitlines()[-1]))
    medians = {
        method: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for method, found in runs.items()
    }
    return [
        {"method": method, "model_bytes": model_bytes}
        | medians[method]
        | {"copy_seconds": medians["copy"]["seconds"], "rounds": runs[method]}
        for method in ("llmtune", "peft")
    ]


def measure(method: str, place: Path) -> dict[str, float]:
    """Run one method in this process; return its seconds and its peak above the idle process."""
    work = {"llmtune": prepare_llmtune, "peft": prepare_peft, "copy": prepare_copy}[method](place)
    out_dir = place / "out"
    shutil.rmtree(out_dir, ignore_errors=True)
    os.sync()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    idle = status_bytes("VmRSS")
    load_start = time.monotonic()
    run = work()
    start = time.monotonic()
    run(out_dir)
    flush(out_dir)
    seconds = time.monotonic() - start
    peak = status_bytes("VmHWM") - idle
    shutil.rmtree(out_dir)
    return {"seconds": seconds, "load_seconds": start - load_start, "peak_bytes": peak}


def prepare_llmtune(place: Path) -> Callable[[], Callable[[Path], object]]:
    from llmtune.merging.merge import merge_adapter

    return lambda: lambda out_dir: merge_adapter(place / "base", place / "adapter", out_dir)


def prepare_peft(place: Path) -> Callable[[], Callable[[Path], object]]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    def load() -> Callable[[Path], object]:
        model = AutoModelForCausalLM.from_pretrained(place / "base", dtype="auto")
        model = PeftModel.from_pretrained(model, place / "adapter")
        return lambda out_dir: model.merge_and_unload().save_pretrained(out_dir)

    return load


def prepare_copy(place: Path) -> Callable[[], Callable[[Path], object]]:
    return lambda: lambda out_dir: shutil.copytree(place / "base", out_dir)


def flush(directory: Path) -> None:
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def make_base(num_bytes: float, directory: Path) -> int:
    """Write a random bf16 Llama of about `num_bytes`; return the size of its weights' file."""
    import torch

    from llmtune.io.safetensors import SINGLE_FILE, build_preamble

    attention = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
    mlp = {f"mlp.{name}_proj": (INNER, HIDDEN) for name in ("gate", "up")}
    linears = attention | mlp | {"mlp.down_proj": (HIDDEN, INNER)}
    layer_bytes = 2 * sum(rows * columns for rows, columns in linears.values())
    num_layers = max(1, round((num_bytes - 2 * VOCABULARY * HIDDEN) / layer_bytes))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.{name}.weight": shape for name, shape in linears.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}.{norm}.weight"] = (HIDDEN,)
    directory.mkdir(parents=True)
    config = CONFIG | {"num_hidden_layers": num_layers}
    (directory / "config.json").write_text(json.dumps(config))
    path = directory / SINGLE_FILE
    with path.open("wb") as file:
        tensors = [(name, "BF16", shape) for name, shape in shapes.items()]
        file.write(build_preamble(tensors, {"format": "pt"}))
        for shape in shapes.values():
            tensor = torch.ones(shape) if len(shape) == 1 else 0.02 * torch.randn(shape)
            file.write(memoryview(tensor.bfloat16().view(-1).view(torch.uint8).numpy()))
    return path.stat().st_size


def make_adapter(base_dir: Path, directory: Path) -> None:
    """Write a float32 adapter of rank 16 on every linear layer of the base."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    from llmtune.io.safetensors import CheckpointIndex

    tensors = {}
    for name, entry in CheckpointIndex.open(base_dir).tensors.items():
        if "_proj" in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = 0.02 * torch.randn(RANK, entry.shape[1])
            tensors[f"{module}.lora_B.weight"] = 0.02 * torch.randn(entry.shape[0], RANK)
    targets = sorted({name.split(".")[-3] for name in tensors})
    LoraConfig(
        r=RANK, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM"
    ).save_pretrained(directory)
    save_file(tensors, directory / "adapter_model.safetensors")


if __name__ == "__main__":
    main()
