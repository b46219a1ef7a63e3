"""Measure what a second process brings, against accelerate's own DDP of the same job.

Every arm runs in fresh processes, the arms taking turns, with the same rows, adapter, and rows a
step over all processes; each process has as many threads as any other, so two have twice the cores
of one, as two cards are twice one. What the reduction costs is timed in the first process, without
the time for which it waits until the others have done their rows. Run it with nothing beside it.

    python scripts/bench_scale.py                  # the quickstart's base, chat rows, 1 and 2
    python scripts/bench_scale.py --model qwen3-0.6b --processes 1 2 4 --json scale.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path

from bench_arms.job import Answer, Job
from bench_arms.rows import MIXES

from llmtune.errors import LlmtuneError

OURS, STOCK = "llmtune", "trl-small"
MOST_SHARE = 0.03
"""Of a step: what the reduction may take."""
MIB = 1 << 20


@dataclass(frozen=True)
class Measured:
    """One arm on a number of processes: medians over its steps after the warm-up."""

    arm: str
    processes: int
    step_seconds: float
    step_seconds_range: tuple[float, float]
    """Of the medians of the rounds."""
    losses: tuple[float, ...]
    moved_bytes: float
    """Sent over the loopback in a step, by all processes."""
    reduced_bytes: float | None = None
    reduction_seconds: float | None = None
    waiting_seconds: float | None = None

    @property
    def share(self) -> float | None:
        """Return the reduction as a share of a step."""
        if self.reduction_seconds is None:
            return None
        return self.reduction_seconds / self.step_seconds


def main() -> int:
    """Measure; the exit code is 1 if the reduction takes more of a step than it may."""
    arguments = parse_arguments()
    try:
        from bench_arms.base import find_base  # loads torch and transformers

        base_dir = find_base(arguments.model)
    except LlmtuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return LlmtuneError.exit_code
    job = Job(
        arm="",
        model_dir=str(base_dir),
        mix=arguments.mix,
        quantization="none",
        device=arguments.device,
        batch_size=arguments.batch_size,
        full_length=arguments.full_length,
        warm_up=1,
        steps=arguments.steps,
    )
    settings = [(arm, count) for count in arguments.processes for arm in (OURS, STOCK)]
    answers: dict[tuple[str, int], list[Answer]] = {setting: [] for setting in settings}
    with tempfile.TemporaryDirectory(prefix="bench-scale-") as name:
        for _ in range(arguments.rounds):
            for arm, count in settings:
                answers[arm, count].append(
                    run(replace(job, arm=arm), count, arguments.threads, Path(name))
                )
    measured = [summarize(*setting, job.warm_up, found) for setting, found in answers.items()]
    show(job, measured, arguments.threads)
    if arguments.json:
        arguments.json.write_text("".join(json.dumps(asdict(one)) + "\n" for one in measured))
    shares = [one.share for one in measured if one.share is not None]
    return int(any(share > MOST_SHARE for share in shares))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", help="as for bench_train.py; the quickstart's if not given")
    parser.add_argument("--mix", choices=MIXES, default="chat")
    parser.add_argument("--full-length", type=int, default=512, help="tokens of a row of full")
    parser.add_argument("--batch-size", type=int, default=8, help="rows a step, of all processes")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=int, help="of each process; the cores shared out")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a round")
    parser.add_argument("--rounds", type=int, default=2, help="how often each arm has its turn")
    parser.add_argument("--json", type=Path, help="write one object an arm here")
    arguments = parser.parse_args()
    if arguments.threads is None:
        arguments.threads = max(1, (os.cpu_count() or 1) // max(arguments.processes))
    return arguments


def run(job: Job, processes: int, threads: int, work: Path) -> Answer:
    """Run one arm in so many processes and return what the first of them measured."""
    print(f"running {job.arm} in {processes}", file=sys.stderr)
    job_file, answer_file = work / "job.json", work / "answer.json"
    answer_file.unlink(missing_ok=True)
    job_file.write_text(job.to_json())
    scripts = Path(__file__).resolve().parent
    search_path = [str(scripts), str(scripts.parent), os.environ.get("PYTHONPATH", "")]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*(launcher if processes > 1 else []), "-m", "bench_arms"]
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, search_path)),
        "OMP_NUM_THREADS": str(threads),
        "ACCELERATE_USE_CPU": str(job.device == "cpu").lower(),
    }
    done = subprocess.run(
        [sys.executable, *command, str(job_file), str(answer_file)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{job.arm} in {processes} processes failed:\n{done.stderr[-4000:]}")
    return Answer.read(answer_file)


def summarize(arm: str, processes: int, warm_up: int, answers: list[Answer]) -> Measured:
    """Return an arm's medians over the steps after the warm-up, of all rounds together."""
    rounds = [answer.times.seconds[warm_up:] for answer in answers]
    medians = list(map(statistics.median, rounds))
    reductions = [one for answer in answers for one in answer.reductions[warm_up:]]
    found = Measured(
        arm=arm,
        processes=processes,
        step_seconds=statistics.median(chain.from_iterable(rounds)),
        step_seconds_range=(min(medians), max(medians)),
        losses=tuple(answers[0].losses),
        moved_bytes=statistics.median(
            moved for answer in answers for moved in answer.times.moved_bytes[warm_up:]
        ),
    )
    if not reductions:
        return found
    return replace(
        found,
        reduced_bytes=statistics.median(one.num_bytes for one in reductions),
        reduction_seconds=statistics.median(one.seconds for one in reductions),
        waiting_seconds=statistics.median(one.waiting_seconds for one in reductions),
    )


def show(job: Job, measured: list[Measured], threads: int) -> None:
    """Print the table."""
    print(
        f"{job.mix} rows, {job.batch_size} rows a step over all processes, {job.device}, "
        f"{threads} threads a process"
    )
    alone = {one.arm: one.step_seconds for one in measured if one.processes == 1}
    print(
        f"{'arm':<12}{'processes':>10}{'s/step':>9}{'range':>14}{'x one':>7}{'MiB sent':>10}"
        f"{'MiB reduced':>13}{'reduction':>12}{'of a step':>11}{'waiting':>10}"
    )
    for one in measured:
        low, high = one.step_seconds_range
        line = (
            f"{one.arm:<12}{one.processes:>10}{one.step_seconds:>9.2f}"
            f"{f'{low:.2f}-{high:.2f}':>14}"
            f"{alone.get(one.arm, float('nan')) / one.step_seconds:>7.2f}"
            f"{one.moved_bytes / MIB:>10.1f}"
        )
        if one.share is not None:
            line += (
                f"{one.reduced_bytes / MIB:>13.1f}{1000 * one.reduction_seconds:>9.1f} ms"
                f"{one.share:>11.1%}{one.waiting_seconds:>8.2f} s"
            )
        print(line)
    for one in measured:
        print(f"losses of {one.arm} in {one.processes}: {' '.join(f'{x:.4f}' for x in one.losses)}")


if __name__ == "__main__":
    sys.exit(main())
