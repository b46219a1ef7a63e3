"""Loading and quantizing a base: the first load, the second from the kept one, and stock's.

Every load is a fresh process; the arms take turns within a round, and medians are reported. Files
are dropped from the page cache before each load, so `read_bytes` is what came from the disk.
`peak_bytes` is the resident memory above that of the process with its libraries imported; `bound`
is what it is held against: the quantized base, the largest shard and 64 MiB.

    python scripts/bench_load.py --base DIR --json FILE
    python scripts/bench_load.py --size 1.3     # GB; a Llama of random weights in some shards
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MIB = 1 << 20
CONSTANT = 64 * MIB
SHARDS = 4
LAYER_BYTES = 2 * (2 * 2048 * 2048 + 2 * 512 * 2048 + 3 * 2048 * 5632)
EMBEDDING_BYTES = 2 * 32000 * 2048
ARMS = ("stock", "first", "second")
WHAT = {
    "stock": "from_pretrained with BitsAndBytesConfig",
    "first": "llmtune, nothing kept yet",
    "second": "llmtune, from the kept base",
}


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, help="A checkpoint directory; else one is made.")
    parser.add_argument("--size", type=float, default=1.3, help="GB of the base that is made.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="Where things are written (default: a temporary).")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(_load(given.child[0], Path(given.child[1]))))
        return
    with tempfile.TemporaryDirectory(dir=given.dir) as place:
        base = given.base or Path(place) / "base"
        if given.base is None:
            make = [sys.executable, __file__, "--child", f"make {given.size}", str(base)]
            subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
        results = _bench(base, Path(place) / "cache", given.rounds)
    for result in results:
        print(
            f"{WHAT[result['arm']]:42} {result['seconds']:6.1f} s  "
            f"{result['read_bytes'] / MIB:6.0f} MiB read  peak {result['peak_bytes'] / MIB:6.0f} "
            f"MiB (anonymous after: {result['anonymous_bytes'] / MIB:.0f}; "
            f"bound {result['bound'] / MIB:.0f})"
        )
    if given.json:
        given.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _bench(base: Path, cache: Path, rounds: int) -> list[dict[str, Any]]:
    measured: dict[str, list[dict[str, int | float]]] = {arm: [] for arm in ARMS}
    for _ in range(rounds):
        for arm in ARMS:
            place = tempfile.mkdtemp(dir=cache.parent) if arm == "first" else None
            cache = Path(place) if place else cache
            command = [sys.executable, __file__, "--child", arm, str(base)]
            done = subprocess.run(
                command,
                env={**os.environ, "LLMTUNE_CACHE": str(cache)},
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode != 0:
                raise SystemExit(done.stderr)
            measured[arm].append(json.loads(done.stdout.splitlines()[-1]))
    largest = max(file.stat().st_size for file in base.glob("*.safetensors"))
    quantized = measured["first"][0]["quantized_bytes"]
    return [
        {
            "arm": arm,
            "rounds": rounds,
            "base_bytes": sum(file.stat().st_size for file in base.glob("*.safetensors")),
            "quantized_bytes": quantized,
            "bound": quantized + largest + CONSTANT,
            "range_seconds": [min(seconds), max(seconds)],
            **{name: statistics.median(one[name] for one in runs) for name in runs[0]},
        }
        for arm, runs in measured.items()
        for seconds in [[one["seconds"] for one in runs]]
    ]


def _load(arm: str, base: Path) -> dict[str, int | float]:
    """Load in this process, as the arm does it, and return what it took."""
    if arm.startswith("make "):
        _make_base(base, float(arm.removeprefix("make ")) * 1e9)
        return {}
    import torch
    import transformers

    from llmtune.io.cached import cache_dir
    from llmtune.models.config import ModelConfig
    from llmtune.models.load import load_model
    from llmtune.models.quantization.nf4 import Nf4Quantization
    from llmtune.models.resolve import resolve_base

    config = ModelConfig(base=str(base), quantization=Nf4Quantization(), device="cpu")
    quantized = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    _warm_up(torch.nn.Linear(64, 64), quantized)
    _drop_pages([*base.iterdir(), *cache_dir().rglob("*")])
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    read, started = _read_bytes(), time.perf_counter()
    if arm == "stock":
        model = transformers.AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.bfloat16, quantization_config=quantized, device_map={"": "cpu"}
        )
    else:
        model = load_model(config, resolve_base(config)).model
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "read_bytes": _read_bytes() - read,
        "peak_bytes": _status("VmHWM") - before,
        "anonymous_bytes": _status("RssAnon"),
        "quantized_bytes": model.get_memory_footprint(),
    }


def _warm_up(linear: Any, config: Any) -> None:
    """Quantize a small layer, so that the library is loaded and its threads run."""
    import bitsandbytes

    bitsandbytes.nn.Params4bit(
        linear.weight.data.bfloat16(), requires_grad=False, quant_type=config.bnb_4bit_quant_type
    ).to("cpu")


def _drop_pages(files: Iterable[Path]) -> None:
    os.sync()
    for file in files:
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _status(field: str) -> int:
    """Return a size in bytes from this process' status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise KeyError(field)


def _read_bytes() -> int:
    """Return the bytes that this process had fetched from the disk, page faults included."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise KeyError("read_bytes")


def _make_base(directory: Path, num_bytes: float) -> None:
    """Write a Llama of random weights in shards of one size, and a tokenizer of single bytes."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<end>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>"
    ).save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=max(1, round((num_bytes - 2 * EMBEDDING_BYTES) / LAYER_BYTES)),
        num_attention_heads=32,
        num_key_value_heads=8,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    model.save_pretrained(directory, max_shard_size=int(num_bytes / SHARDS))


if __name__ == "__main__":
    main()
