"""Measure our data preparation against trl's own, on chat rows made by this script.

Each method runs in fresh processes, the methods taking turns (ours, trl, ours, trl, ...), from the
JSONL file on disk to token ids and labels; importing, and loading the tokenizer, do not count.
trl gets the easier template of the two: one with generation markers, without which it has no masks.

    python scripts/bench_data.py                      # 50,000 rows, three rounds
    python scripts/bench_data.py --rows 5000 --rounds 1 --json bench.json
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

METHODS = ("llmtune", "trl")
VOCABULARY = 16_000
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\n' }}{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the results here, one object a method")
    parser.add_argument("--worker", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(WORKERS[arguments.worker](arguments.work)))
        return
    with tempfile.TemporaryDirectory(prefix="bench-data-") as name:
        work = Path(name)
        write_rows(work / "rows.jsonl", arguments.rows)
        write_tokenizer(work)
        rounds = [
            {method: run_worker(method, work) for method in METHODS}
            for _ in range(arguments.rounds)
        ]
    results = [
        summarize(method, [one[method] for one in rounds], arguments.rows) for method in METHODS
    ]
    show(results)
    if arguments.json:
        arguments.json.write_text("".join(json.dumps(result) + "\n" for result in results))


def write_rows(path: Path, count: int) -> None:
    """Write chats of one to three turns with words as frequent as in natural text (Zipf)."""
    random_ = random.Random(0)
    letters = "etaoinshrdlcumwfgypbvk"
    words = [
        "".join(random_.choices(letters, range(22, 0, -1), k=random_.randint(2, 10)))
        for _ in range(20_000)
    ]
    weights = [1 / rank for rank in range(1, len(words) + 1)]

    def text(low: int, high: int) -> str:
        drawn = random_.choices(words, cum_weights=cumulated, k=random_.randint(low, high))
        return " ".join(drawn).capitalize() + "."

    cumulated, total = [], 0.0
    for weight in weights:
        total += weight
        cumulated.append(total)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            messages = [{"role": "system", "content": "You answer questions in a few words."}]
            for _ in range(random_.randint(1, 3)):
                messages.append({"role": "user", "content": text(10, 60)})
                messages.append({"role": "assistant", "content": text(5, 40)})
            file.write(json.dumps({"messages": messages}) + "\n")


def write_tokenizer(work: Path) -> None:
    """Train a byte-level BPE tokenizer on some of the rows, so that nothing is downloaded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    with (work / "rows.jsonl").open(encoding="utf-8") as file:
        corpus = [
            message["content"]
            for line, _ in zip(file, range(2000), strict=False)
            for message in json.loads(line)["messages"]
        ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    fast.chat_template = CHATML
    fast.save_pretrained(work / "tokenizer")


def run_worker(method: str, work: Path) -> dict:
    """Run one method in a process of its own and return what it measured."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": tempfile.mkdtemp(dir=work),  # trl never finds its own earlier work
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    command = [sys.executable, __file__, "--worker", method, "--work", str(work)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def prepare_with_llmtune(work: Path) -> dict:
    """Prepare with our pipeline, cache off."""
    from transformers import PreTrainedTokenizerFast

    from llmtune.data.config import DataConfig
    from llmtune.data.prepare import prepare_examples

    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    config = DataConfig(
        train=[{"path": str(work / "rows.jsonl"), "format": "messages"}], cache=False
    )
    before, started, used = peak_bytes(), time.perf_counter(), time.process_time()
    prepared = prepare_examples(config, tokenizer, split="train", seed=0)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - used
    trained = prepared.report.num_trained_tokens
    return measured(before, (seconds, cpu_seconds), len(prepared.examples), trained)


def prepare_with_trl(work: Path) -> dict:
    """Prepare with the method that trl's SFTTrainer calls from its constructor."""
    from datasets import Dataset, load_dataset
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1,
        )
    )  # fmt: skip
    options = SFTConfig(
        output_dir=str(work / "trl"), assistant_only_loss=True, max_length=None, report_to="none",
        use_cpu=True, bf16=False,
    )  # fmt: skip
    first = json.loads((work / "rows.jsonl").open(encoding="utf-8").readline())
    trainer = SFTTrainer(
        model, options, train_dataset=Dataset.from_list([first]), processing_class=tokenizer
    )
    before, started, used = peak_bytes(), time.perf_counter(), time.process_time()
    rows = load_dataset("json", data_files=str(work / "rows.jsonl"), split="train")
    prepared = trainer._prepare_dataset(rows, tokenizer, options, False, None, "train")
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - used
    trained = sum(sum(label != -100 for label in labels) for labels in prepared["labels"])
    return measured(before, (seconds, cpu_seconds), len(prepared), trained)


WORKERS = {"llmtune": prepare_with_llmtune, "trl": prepare_with_trl}


def peak_bytes() -> int:
    """Return the largest resident size so far (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured(before: int, seconds: tuple[float, float], examples: int, trained: int) -> dict:
    """Return one run's numbers; `growth_bytes` leaves out what importing took."""
    peak = peak_bytes()
    return {
        "seconds": seconds[0],
        "cpu_seconds": seconds[1],
        "peak_bytes": peak,
        "growth_bytes": peak - before,
        "examples": examples,
        "trained_tokens": trained,
    }


def summarize(method: str, runs: list[dict], rows: int) -> dict:
    """Return the medians over the rounds of one method."""
    return {
        "method": method,
        "rows_per_second": rows / statistics.median(run["seconds"] for run in runs),
        "peak_bytes": int(statistics.median(run["peak_bytes"] for run in runs)),
        "growth_bytes": int(statistics.median(run["growth_bytes"] for run in runs)),
        "examples": runs[0]["examples"],
        "trained_tokens": runs[0]["trained_tokens"],
        "seconds": [round(run["seconds"], 3) for run in runs],
        "cpu_seconds": [round(run["cpu_seconds"], 3) for run in runs],
    }


def show(results: list[dict]) -> None:
    """Print the results as a table and what they mean."""
    print(
        f"{'method':10} {'rows/s':>10} {'peak MiB':>10} {'growth MiB':>11} {'CPU s':>7} "
        f"{'trained tokens':>15}"
    )
    for result in results:
        print(
            f"{result['method']:10} {result['rows_per_second']:10,.0f} "
            f"{result['peak_bytes'] / 2**20:10,.0f} {result['growth_bytes'] / 2**20:11,.0f} "
            f"{statistics.median(result['cpu_seconds']):7.2f} {result['trained_tokens']:15,}"
        )
    ours, theirs = results
    print(f"{ours['rows_per_second'] / theirs['rows_per_second']:.2f} times as fast as trl")
    if ours["trained_tokens"] != theirs["trained_tokens"]:
        print("the two trained different tokens: the comparison is not fair", file=sys.stderr)


if __name__ == "__main__":
    main()
