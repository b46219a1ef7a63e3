"""Hold the planner's estimate against the measured peak of short real trainings on the CPU.

Every configuration trains in a process of its own, for two steps, on the quickstart's model and
rows made of its sentences. What counts is the largest resident memory of the process, imports and
loading included, against the estimate that the train stage recorded before it loaded the base.

    python scripts/bench_plan.py [--json FILE] [--only NAME]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

MIB = 1 << 20
WORDS_A_TOKEN = 0.72
NUM_ROWS = 48
ANSWER_WORDS = 4
STEPS = 2
TOLERANCE = 0.15


class Case(NamedTuple):
    """One configuration: how long its rows are, and what it overrides."""

    row_tokens: int
    overrides: tuple[str, ...]


CASES = {
    "nf4, short rows, auto": Case(64, ("train.batch_size=16",)),
    "bf16, 512 tokens x 4": Case(
        512, ("model.quantization=null", "train.batch_size=4", "train.micro_batch_size=4")
    ),
    "nf4, 512 tokens x 4, all layers recomputed": Case(
        512,
        ("train.batch_size=4", "train.micro_batch_size=4", "train.gradient_checkpointing=true"),
    ),
    "float32, 128 tokens x 4": Case(
        128,
        (
            "model.quantization=null",
            "model.dtype=float32",
            "train.batch_size=4",
            "train.micro_batch_size=4",
        ),
    ),
    "bf16, dropout, 64 tokens x 16": Case(
        64,
        (
            "model.quantization=null",
            "adapter.dropout=0.05",
            "train.batch_size=16",
            "train.micro_batch_size=16",
        ),
    ),
    "nf4, rank 64, adamw_8bit, 1024 tokens x 1": Case(
        1024,
        (
            "adapter.rank=64",
            "train.optimizer=adamw_8bit",
            "train.batch_size=1",
            "train.micro_batch_size=1",
        ),
    ),
    "bf16, DoRA, 256 tokens x 1": Case(
        256,
        (
            "model.quantization=null",
            "adapter.method=dora",
            "train.batch_size=2",
            "train.micro_batch_size=1",
        ),
    ),
}


def main() -> int:
    """Measure and print the table; exit code 1 where an estimate is off by more than 15 %."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--rows", default="data/quickstart/movies_train.jsonl")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--only", help="Measure the cases whose name holds this.")
    parser.add_argument("--train", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.train:
        _train(given.train)
        return 0
    results = []
    print(f"{'configuration':<44} {'estimated':>10} {'measured':>10} {'ratio':>7}")
    for name, case in CASES.items():
        if given.only is None or given.only in name:
            results.append({"name": name, **_measure(case, given.config, Path(given.rows))})
            print(_line(results[-1]), flush=True)
    if given.json:
        given.json.write_text(json.dumps(results, indent=2) + "\n")
    return int(any(abs(each["ratio"] - 1) > TOLERANCE for each in results))


def _line(result: dict[str, Any]) -> str:
    estimated, measured = (result[key] / MIB for key in ("estimated_bytes", "measured_bytes"))
    return (
        f"{result['name']:<44} {estimated:>6.0f} MiB {measured:>6.0f} MiB {result['ratio']:>7.2f}"
    )


def _measure(case: Case, config: str, sentences: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        rows = Path(directory) / "rows.jsonl"
        rows.write_text("\n".join(_make_rows(sentences, case.row_tokens)) + "\n")
        command = [
            *(sys.executable, __file__, "--train", config),
            *(f"run_dir={directory}/run", f"data.train=[{{path: {rows}}}]", "data.evaluation=[]"),
            *("data.max_length=null", "data.cache=false", "train.eval_every=null"),
            *("model.device=cpu", f"train.max_steps={STEPS}", "train.warmup_ratio=0"),
            *case.overrides,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(done.stderr)
        result = json.loads(done.stdout.splitlines()[-1])
    estimate, measured = result["estimate"], result["peak_bytes"]
    return {
        "estimated_bytes": estimate["total_bytes"],
        "measured_bytes": measured,
        "ratio": estimate["total_bytes"] / measured,
        **estimate,
        "choices": result["choices"],
    }


def _train(arguments: list[str]) -> None:
    """Do what the train stage does until the last step, in this process, and print the peak."""
    from llmtune.config import anchor_paths, load_config
    from llmtune.data.prepare import prepare_examples
    from llmtune.models.resolve import resolve_base
    from llmtune.models.tokenizer import load_tokenizer

    config = anchor_paths(load_config(arguments[0], arguments[1:]))
    source = resolve_base(config.model)
    tokenizer = load_tokenizer(source.dir)
    train, evaluation = (
        prepare_examples(config.data, tokenizer, split=split, seed=config.seed)
        for split in ("train", "evaluation")
    )

    import torch

    from llmtune.adapters.inject import inject_adapter
    from llmtune.models.load import load_model
    from llmtune.stages.estimate import estimate_training
    from llmtune.training.sft import TrainRequest, train_adapter

    cpu = torch.device("cpu")
    estimate = estimate_training(config, source.dir, cpu, (train, evaluation))
    loaded = load_model(config.model, source)
    request = TrainRequest(
        model=inject_adapter(loaded.model, config.adapter).model,
        tokenizer=tokenizer,
        train=train.examples,
        evaluation=evaluation.examples,
        run=config.run,
        seed=config.seed,
        identity={},
        quiet=True,
    )
    result = train_adapter(config.train, request)
    shown = {"estimate": estimate, "peak_bytes": result.peak_bytes, "choices": result.choices}
    print(json.dumps(shown))


def _make_rows(sentences: Path, tokens: int) -> Iterator[str]:
    """Yield conversations of about this many tokens; the answers are short, so is what follows."""
    words: list[str] = []
    for line in sentences.read_text(encoding="utf-8").splitlines():
        words += json.loads(line)["messages"][0]["content"].split()
    size = int(tokens * WORDS_A_TOKEN)
    for start in range(0, NUM_ROWS * size, size):
        text = words[start : start + size]
        turns = (("user", text[:-ANSWER_WORDS]), ("assistant", text[-ANSWER_WORDS:]))
        yield json.dumps(
            {"messages": [{"role": role, "content": " ".join(part)} for role, part in turns]}
        )


if __name__ == "__main__":
    sys.exit(main())
