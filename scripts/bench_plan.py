"""Hold the planner's estimates against the measured peak and time of short trainings on the CPU.

Every configuration trains in a process of its own, for four steps, on the quickstart's model (or a
Qwen3 of random weights with its tokenizer) and rows made of its sentences; the last one is the
quickstart's own training, all of its steps. What counts is the largest resident memory of the
process, imports and loading included, against the estimate that the train stage records before it
loads the base; and the seconds of training, evaluation aside, against the plan's with the matrix
products of this machine timed just before (`plan --measure`).

    python scripts/bench_plan.py [--json FILE] [--only NAME]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

MIB = 1 << 20
WORDS_A_TOKEN = 0.72
NUM_ROWS = 48
NUM_EVALUATED = 16
ANSWER_WORDS = 4
STEPS = 4
TOLERANCE = 0.15


class Case(NamedTuple):
    """One configuration: how long its rows are, and what it overrides."""

    row_tokens: int | None
    """None: the config's own rows and steps."""
    overrides: tuple[str, ...]
    family: str | None = None
    """A base of random weights of this family, in place of the quickstart's."""


def _fixed(rows: int, checkpointing: str = "false") -> tuple[str, ...]:
    """Return the settings of one micro-batch of so many rows a step."""
    return (
        f"train.batch_size={rows}",
        f"train.micro_batch_size={rows}",
        f"train.gradient_checkpointing={checkpointing}",
    )


IN_16_BIT = "model.quantization=null"
EVALUATED = ("train.eval_every=2",)
CASES = {
    "nf4, 64 tokens, auto, evaluated": Case(64, ("train.batch_size=16", *EVALUATED)),
    "16-bit, 512 tokens x 4": Case(512, (IN_16_BIT, *_fixed(4))),
    "nf4, 512 tokens x 4, all layers recomputed": Case(512, _fixed(4, "true")),
    "nf4, rank 64, adamw_8bit, 1024 tokens x 1": Case(
        1024, ("adapter.rank=64", "train.optimizer=adamw_8bit", *_fixed(1))
    ),
    "float32, 128 tokens x 4": Case(128, (IN_16_BIT, "model.dtype=float32", *_fixed(4))),
    "16-bit, dropout, 64 tokens x 16": Case(64, (IN_16_BIT, "adapter.dropout=0.05", *_fixed(16))),
    "16-bit, DoRA, 256 tokens x 1": Case(256, (IN_16_BIT, "adapter.method=dora", *_fixed(1))),
    "qwen3 of 8 layers, nf4, 256 tokens, auto, evaluated": Case(
        256, ("train.batch_size=8", *EVALUATED), "qwen3"
    ),
    "qwen3 of 8 layers, 16-bit, rank 4, 2048 tokens x 1": Case(
        2048, (IN_16_BIT, "adapter.rank=4", *_fixed(1)), "qwen3"
    ),
    "the quickstart, all of its steps": Case(None, ()),
}


def main() -> int:
    """Measure and print the table; exit code 1 where a memory estimate is off by more than 15 %."""
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
    print(f"{'':<52} {'peak: estimated, measured':>31}   {'tokens/s':>21}")
    for name, case in CASES.items():
        if given.only is None or given.only in name:
            results.append({"name": name, **_measure(case, given.config, Path(given.rows))})
            print(_line(results[-1]), flush=True)
    if given.json:
        given.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return int(any(abs(each["ratio"] - 1) > TOLERANCE for each in results))


def _line(result: dict[str, Any]) -> str:
    estimated, measured = (result[key] / MIB for key in ("estimated_bytes", "measured_bytes"))
    speeds = "{:>6.0f} {:>6.0f} {:>6.2f}".format(
        *(result[key] for key in ("estimated_speed", "measured_speed", "speed_ratio"))
    )
    peaks = f"{estimated:>7.0f} MiB {measured:>7.0f} MiB {result['ratio']:>6.2f}"
    return f"{result['name']:<52} {peaks}   {speeds}"


def _measure(case: Case, config: str, sentences: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        short = []
        if case.row_tokens is not None:
            rows = list(_make_rows(sentences, case.row_tokens))
            short = _short_training(rows, Path(directory), set(case.overrides))
        overrides = [f"run_dir={directory}/run", "model.device=cpu", *short, *case.overrides]
        if case.family:
            base = str(Path(directory) / "base")
            _run(["--train", "make", case.family, config, base])
            overrides.append(f"model.base={base}")
        result = json.loads(_run(["--train", config, *overrides]).splitlines()[-1])
    estimated, measured = result["estimate"]["total_bytes"], result["peak_bytes"]
    return {
        "estimated_bytes": estimated,
        "measured_bytes": measured,
        "ratio": estimated / measured,
        "estimated_speed": result["estimated_speed"],
        "measured_speed": result["measured_speed"],
        "speed_ratio": result["estimated_speed"] / result["measured_speed"],
        **result["estimate"],
        "choices": result["choices"],
    }


def _short_training(made: list[str], directory: Path, overrides: set[str]) -> list[str]:
    """Write the rows and return the settings that train on them for a few steps."""
    rows, others = (directory / name for name in ("rows.jsonl", "others.jsonl"))
    rows.write_text("\n".join(made[:NUM_ROWS]) + "\n")
    others.write_text("\n".join(made[NUM_ROWS:]) + "\n")
    evaluation = f"[{{path: {others}}}]" if set(EVALUATED) <= overrides else "[]"
    return [
        *(f"data.train=[{{path: {rows}}}]", f"data.evaluation={evaluation}"),
        *("data.max_length=null", "data.cache=false"),
        *("train.eval_every=null", "train.save_every=100"),
        *(f"train.max_steps={STEPS}", "train.warmup_ratio=0"),
    ]


def _run(arguments: list[str]) -> str:
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    return done.stdout


def _train(arguments: list[str]) -> None:
    """Do what the train stage does until the last step, in this process, and print what it took."""
    if arguments[0] == "make":
        _make_base(*arguments[1:])
        return
    from llmtune.config import anchor_paths, load_config
    from llmtune.data.prepare import prepare_examples
    from llmtune.models.resolve import resolve_base
    from llmtune.runs.pipeline import plan

    config = anchor_paths(load_config(arguments[0], arguments[1:]))
    source = resolve_base(config.model)
    tokenizer = source.tokenizer
    train, evaluation = (
        prepare_examples(config.data, tokenizer, split=split, seed=config.seed)
        for split in ("train", "evaluation")
    )

    from llmtune.adapters.inject import inject_adapter
    from llmtune.models.load import load_model
    from llmtune.planning.devices import free_device
    from llmtune.planning.workload import PlanRequest, estimate_training
    from llmtune.training.request import TrainRequest
    from llmtune.training.train import train_adapter

    planned = plan(config, measure=True)
    estimate = estimate_training(
        PlanRequest(
            model=config.model.model_copy(update={"base": str(source.directory)}),
            adapter=config.adapter,
            data=config.data,
            train=config.train,
            run_dir=config.run_dir,
            seed=config.seed,
            device=free_device("cpu"),
        ),
        train,
        evaluation,
    )
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
    shown = {
        "estimate": estimate,
        "peak_bytes": result.peak_bytes,
        "choices": result.choices,
        "estimated_speed": (planned.tokens or 0) / (planned.seconds or 1),
        "measured_speed": _read_speed(config.run.metrics_path),
    }
    print(json.dumps(shown))


def _read_speed(metrics: Path) -> float:
    """Return the median tokens a second of the steps after the first."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    return statistics.median(speeds[1:])


def _make_base(family: str, config_path: str, directory: str) -> None:
    """Save a small model of random weights with the tokenizer of the config's base."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from llmtune.config import load_config
    from llmtune.models.resolve import resolve_base

    tokenizer = resolve_base(load_config(config_path).model).tokenizer
    config = CONFIG_MAPPING[family](
        vocab_size=len(tokenizer),
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _make_rows(sentences: Path, tokens: int) -> Iterator[str]:
    """Yield conversations of about this many tokens; the answers are short, so is what follows."""
    words: list[str] = []
    for line in sentences.read_text(encoding="utf-8").splitlines():
        words += json.loads(line)["messages"][0]["content"].split()
    size = int(tokens * WORDS_A_TOKEN)
    for start in range(0, (NUM_ROWS + NUM_EVALUATED) * size, size):
        text = words[start : start + size]
        turns = (("user", text[:-ANSWER_WORDS]), ("assistant", text[-ANSWER_WORDS:]))
        yield json.dumps(
            {"messages": [{"role": role, "content": " ".join(part)} for role, part in turns]}
        )


if __name__ == "__main__":
    sys.exit(main())
