"""Measure llmtune's training step against stock trl and peft, side by side on this machine.

Every arm runs in fresh processes, the arms taking turns (A B C A B C), on the same rows with the
same adapter, learning rate and batch; tokens are counted without padding, the first steps are
warm-up. No time is printed for an arm of llmtune before its gradients and losses have been compared
with stock's (see `bench_arms/parity.py`).

    python scripts/bench_train.py              # three arms, chat rows, 16-bit: under 20 minutes
    python scripts/bench_train.py --all        # every arm, mix and quantization: hours on a CPU
    python scripts/bench_train.py --arms llmtune trl-best --mix short --quantization nf4
    python scripts/bench_train.py --device cuda --model llama-8b --json bench.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from itertools import chain
from pathlib import Path

from bench_arms.job import Answer, Job
from bench_arms.parity import (
    USUAL_TRAINED_TOKENS,
    Parity,
    allowed_loss_difference,
    compare_gradients,
    compare_losses,
)
from bench_arms.rows import MIXES, TASK_TRAINED

from llmtune.errors import LlmtuneError

STOCK_ARMS = (
    "trl-default",
    "trl-best",
    "trl-padded",
    "trl-small",
    "trl-grouped",
    "trl-packed",
    "trl-padding-free",
)
OUR_ARMS = (
    "llmtune",
    "llmtune-stock-lora",
    "llmtune-stock-blocks",
    "llmtune-stock-head",
    "llmtune-padded",
    "llmtune-whole-rows",
)
QUANTIZATIONS = ("none", "nf4")
# The same rows in the same order as llmtune's: what parity is measured against.
PARITY_ARM = "trl-small"
REFERENCE_ARM = "reference"
PARITY_STEPS = 32
PARITY_ROWS = 2
FULL_LENGTHS = {"cpu": 512, "cuda": 4096}
# Rows a step as a share of the chat mix's: about as many tokens in every mix, because a loss of few
# tokens differs by chance by more than the gate allows. The task mix has the quickstart's 16 rows.
BATCH_SHARES = {"short": 2.0, "chat": 1.0, "full": 0.5, "task": 2.0}


def main() -> int:
    """Run the benchmark; the exit code is 0, 1 where parity is broken, 2 for wrong input."""
    arguments = parse_arguments()
    try:
        base_dir = _find_base(arguments.model)
    except LlmtuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return LlmtuneError.exit_code
    results: list[dict] = []
    with tempfile.TemporaryDirectory(prefix="bench-train-") as name:
        for quantization in arguments.quantization:
            for mix in arguments.mix:
                job = make_job(arguments, base_dir, mix, quantization)
                setting = Setting(job, Path(name))
                results += setting.measure(arguments.arms, arguments.rounds)
    if arguments.json:
        arguments.json.write_text("".join(json.dumps(result) + "\n" for result in results))
    return 0 if all(result["parity"] for result in results) else 1


def parse_arguments() -> argparse.Namespace:
    """Read the command line; `arms`, `mix` and `quantization` become lists."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--model",
        help="checkpoint directory or .gguf file, or llama-8b, qwen3-1.7b, qwen3-0.6b with random "
        "weights; the quickstart's SmolLM2-135M if not given",
    )
    parser.add_argument("--arms", nargs="+", choices=(*STOCK_ARMS, *OUR_ARMS))
    parser.add_argument("--mix", nargs="+", choices=MIXES, default=["chat"])
    parser.add_argument("--quantization", nargs="+", choices=QUANTIZATIONS, default=["none"])
    parser.add_argument("--all", action="store_true", help="every arm, mix and quantization")
    parser.add_argument("--batch-size", type=int, default=8, help="rows a step of the chat mix")
    parser.add_argument("--full-length", type=int, help="tokens of a row of the full mix")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before the timed ones")
    parser.add_argument(
        "--steps", type=int, default=4, help="timed steps of a process (2 at most in trl-default)"
    )
    parser.add_argument("--rounds", type=int, default=2, help="processes of each arm")
    parser.add_argument("--json", type=Path, help="write one object an arm and setting here")
    arguments = parser.parse_args()
    if arguments.all:
        arguments.arms = [arm for arm in (*STOCK_ARMS, *OUR_ARMS) if arm != "trl-best"]
        arguments.mix, arguments.quantization = list(MIXES), list(QUANTIZATIONS)
    arguments.arms = arguments.arms or ["trl-default", "trl-best", "llmtune"]
    return arguments


def make_job(arguments: argparse.Namespace, base_dir: Path, mix: str, quantization: str) -> Job:
    """Return the setting's job, its arm still open."""
    return Job(
        arm="",
        model_dir=str(base_dir),
        mix=mix,
        quantization=quantization,
        device=arguments.device,
        batch_size=max(1, round(arguments.batch_size * BATCH_SHARES[mix])),
        full_length=arguments.full_length or FULL_LENGTHS[arguments.device],
        warm_up=arguments.warm_up,
        steps=arguments.steps,
    )


class Setting:
    """One length mix and quantization: its processes, its gate and its table."""

    def __init__(self, job: Job, work: Path) -> None:
        self.job = job
        self.work = work

    def measure(self, arms: list[str], rounds: int) -> list[dict]:
        """Run all arms in turns, check parity, print the table; returns the JSON objects."""
        ours = [arm for arm in arms if arm in OUR_ARMS]
        for arm in (REFERENCE_ARM, PARITY_ARM, *ours) if ours else ():
            self._save_gradients(arm)
        answers: dict[str, list[Answer]] = {arm: [] for arm in arms}
        for _ in range(rounds):
            for arm in arms:
                answers[arm].append(self._run(job_of(arm, self.job)))
        if ours and PARITY_ARM not in answers:
            stock = self._run(replace(self.job, arm=PARITY_ARM))
        else:
            stock = answers[PARITY_ARM][0] if ours else None
        parities = {arm: self._check(arm, answers[arm][0], stock) for arm in ours if stock}
        results = [
            summarize(
                job_of(arm, self.job),
                answers[arm],
                holds=arm not in parities or parities[arm].holds,
            )
            for arm in arms
        ]
        show(self.job, results, parities)
        return results

    def _save_gradients(self, arm: str) -> None:
        job = replace(
            self.job,
            arm=arm,
            batch_size=PARITY_ROWS,
            warm_up=0,
            steps=PARITY_STEPS,
            gradients_file=str(self._gradients_file(arm)),
        )
        self._run(job)

    def _check(self, arm: str, answer: Answer, stock: Answer) -> Parity:
        files = (self._gradients_file(one) for one in (arm, PARITY_ARM, REFERENCE_ARM))
        ratios = compare_gradients(*files)
        median, largest = compare_losses(answer.losses, stock.losses)
        return Parity(
            error_ratio=max(ratios.values()),
            median_error_ratio=statistics.median(ratios.values()),
            loss_difference=median,
            largest_loss_difference=largest,
            allowed_loss_difference=allowed_loss_difference(
                TASK_TRAINED * self.job.batch_size
                if self.job.mix == "task"
                else USUAL_TRAINED_TOKENS
            ),
        )

    def _gradients_file(self, arm: str) -> Path:
        return self.work / f"{arm}.safetensors"

    def _run(self, job: Job) -> Answer:
        print(f"running {job.arm}, {job.mix}, {job.quantization}", file=sys.stderr)
        job_file, answer_file = self.work / "job.json", self.work / "answer.json"
        answer_file.unlink(missing_ok=True)
        job_file.write_text(job.to_json())
        scripts = Path(__file__).resolve().parent
        search_path = [str(scripts), str(scripts.parent), os.environ.get("PYTHONPATH", "")]
        done = subprocess.run(
            [sys.executable, "-m", "bench_arms", str(job_file), str(answer_file)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, search_path))},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{job.arm} failed:\n{done.stderr[-4000:]}")
        return Answer.read(answer_file)


def job_of(arm: str, job: Job) -> Job:
    """Return the job of one arm; the slowest one by far takes fewer steps."""
    if arm != "trl-default":
        return replace(job, arm=arm)
    return replace(job, arm=arm, warm_up=min(job.warm_up, 1), steps=min(job.steps, 2))


def summarize(job: Job, answers: list[Answer], *, holds: bool) -> dict:
    """Return the JSON object of an arm: medians over its warm steps, the range over processes.

    Medians over steps, because on a CPU a single step takes several times as long, in any arm,
    when something else wakes up beside its threads. Processor time says more on a busy machine.
    """
    seconds = [answer.times.seconds[job.warm_up :] for answer in answers]
    processor = [answer.times.processor_seconds[job.warm_up :] for answer in answers]
    speeds = [
        [tokens / one for tokens, one in zip(answer.step_tokens[job.warm_up :], times, strict=True)]
        for answer, times in zip(answers, seconds, strict=True)
    ]
    of_processes = [statistics.median(speed) for speed in speeds]
    return {
        "arm": job.arm,
        "mix": job.mix,
        "quantization": job.quantization,
        "tokens_per_second": statistics.median(chain.from_iterable(speeds)),
        "tokens_per_second_range": [min(of_processes), max(of_processes)],
        "step_seconds": statistics.median(chain.from_iterable(seconds)),
        "step_processor_seconds": statistics.median(chain.from_iterable(processor)),
        "peak_bytes": max(answer.peak_bytes for answer in answers),
        "base_bytes": statistics.median([answer.base_bytes for answer in answers]),
        "parity": holds,
        "choices": answers[0].choices,
    }


def show(job: Job, results: list[dict], parities: dict[str, Parity]) -> None:
    """Print a setting's table; an arm whose parity is broken has no figures in it."""
    print(f"\n{job.mix} rows, {job.quantization} base, {job.device}, {job.batch_size} rows a step")
    for arm, parity in parities.items():
        print(f"  parity of {arm} {parity.describe()}")
    best = max(
        (one for one in results if one["arm"] in STOCK_ARMS),
        key=lambda one: one["tokens_per_second"],
        default=None,
    )
    print(
        f"  {'arm':<22}{'tokens/s':>10}{'range':>14}{'s/step':>9}{'CPU s/step':>12}{'peak GB':>9}"
        f"{'over base':>11}{'x best stock':>14}"
    )
    for result in results:
        if not result["parity"]:
            print(f"  {result['arm']:<22}  no figures: parity is broken")
            continue
        low, high = result["tokens_per_second_range"]
        above = result["peak_bytes"] - result["base_bytes"]
        ratio = result["tokens_per_second"] / best["tokens_per_second"] if best else float("nan")
        print(
            f"  {result['arm']:<22}{result['tokens_per_second']:>10.0f}"
            f"{f'{low:.0f}-{high:.0f}':>14}{result['step_seconds']:>9.2f}"
            f"{result['step_processor_seconds']:>12.2f}"
            f"{result['peak_bytes'] / 1e9:>9.2f}{above / 1e9:>11.2f}{ratio:>14.2f}"
        )
    by_arm = {one["arm"]: one for one in results if one["parity"]}
    if {"llmtune", "llmtune-whole-rows"} <= by_arm.keys():
        shared, whole = by_arm["llmtune"], by_arm["llmtune-whole-rows"]
        wall, processor = (
            whole[name] / shared[name] for name in ("step_seconds", "step_processor_seconds")
        )
        print(f"  sharing beginnings: {wall:.2f} x as fast, {processor:.2f} x in processor time")


def _find_base(name: str | None) -> Path:
    from bench_arms.base import find_base  # loads torch and transformers

    return find_base(name)


if __name__ == "__main__":
    sys.exit(main())
