"""Measure adapter methods on the quickstart's data, and print the table of docs/methods.md.

    python scripts/methods_table.py run ia3            # one method: about ten minutes on two cores
    python scripts/methods_table.py run ia3 --seed 1
    python scripts/methods_table.py table

A method is trained once for each learning rate of a short list, every time with the same number of
steps, rows and seed, without `protect`. The rate with the lowest loss on held-out rows is kept, and
that adapter is compared with the base on 100 reviews, on prose, and in chat. What is finished is
not done again: repeat an interrupted call. `--seconds` begins nothing new after that long.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.reporting.numbers import unit_of_metric

ROOT = Path(__file__).resolve().parent.parent
LOW = ("1e-5", "3e-5", "1e-4")
USUAL = ("1e-4", "3e-4", "1e-3")
HIGH = ("1e-3", "3e-3", "1e-2")
HIGHEST = ("1e-2", "3e-2", "1e-1")


@dataclass(frozen=True)
class Measured:
    """One row of the table: its settings, and the learning rates to choose from."""

    adapter: Mapping[str, Any]
    rates: tuple[str, ...]


METHODS: Mapping[str, Measured] = {
    "lora": Measured({"method": "lora"}, USUAL),
    "rslora": Measured({"method": "rslora"}, USUAL),
    "dora": Measured({"method": "dora"}, USUAL),
    "lora-pissa": Measured({"method": "lora", "init": "pissa_niter_16"}, USUAL),
    "lora-olora": Measured({"method": "lora", "init": "olora"}, USUAL),
    "lora-eva": Measured({"method": "lora", "init": "eva"}, USUAL),
    "lora-corda": Measured({"method": "lora", "init": "corda"}, USUAL),
    "miss": Measured({"method": "miss"}, USUAL),
    "oft": Measured({"method": "oft"}, USUAL),
    "loha": Measured({"method": "loha"}, USUAL),
    "lokr": Measured({"method": "lokr"}, HIGH),
    "vera": Measured({"method": "vera"}, HIGH),
    "ia3": Measured({"method": "ia3"}, HIGH),
    "fourierft": Measured({"method": "fourierft"}, HIGHEST),
    "shira": Measured({"method": "shira"}, USUAL),
    "layers-last-8": Measured({"method": "layers", "layers": "last-8"}, LOW),
    "layers-norms": Measured({"method": "layers", "parameters": ["norms"]}, HIGH),
}
SETTINGS = (
    "protect.kl_to_base=null",
    "evaluate.limit=100",
    "evaluate.arms=[base,tuned]",
    "evaluate.extent=none",
    "evaluate.suites=[evals/movies.yaml,evals/passages.yaml,evals/chat.yaml]",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure one method, or print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("methods", nargs="*", metavar="method", help=", ".join(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=540, help="begin nothing new after these")
    parser.add_argument("--config", type=Path, default=ROOT / "configs/quickstart.yaml")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/methods")
    asked = parser.parse_args(arguments)
    asked.runs, asked.config = asked.runs.resolve(), asked.config.resolve()
    unknown = [name for name in asked.methods if name not in METHODS]
    if unknown or (asked.action == "run") != bool(asked.methods):
        parser.error(f"expected `table`, or `run` with some of {', '.join(METHODS)}")
    if asked.action == "table":
        print("\n".join(table_lines(asked.runs)))
        return 0
    until = time.monotonic() + asked.seconds
    for name in asked.methods:
        for command in commands(name, asked):
            if time.monotonic() > until:
                print(f"{name}: not finished; call again", file=sys.stderr)
                return 3
            subprocess.run(command, check=True, cwd=ROOT)
    return 0


def commands(name: str, asked: argparse.Namespace) -> Iterator[list[str]]:
    """Yield what is left to do for a method, one command at a time."""
    method = METHODS[name]
    place = asked.runs / name / f"seed-{asked.seed}-steps-{asked.steps}"

    def command(verb: str, rate: str) -> list[str]:
        own = [f"adapter={json.dumps(method.adapter)}", f"run_dir={place / rate}"]
        own += [f"train.learning_rate={rate}", f"seed={asked.seed}"]
        own += [f"train.{knob}={asked.steps}" for knob in ("max_steps", "eval_every", "save_every")]
        start = [sys.executable, "-m", "llmtune", verb, str(asked.config)]
        return [*start, *own, *SETTINGS]

    for rate in method.rates:
        if training_of(place / rate) is None:
            yield command("train", rate)
    best = best_rate(place, method.rates)
    for rate in method.rates:
        if rate != best:  # weights trained whole are large
            shutil.rmtree(place / rate / "checkpoints", ignore_errors=True)
    if not (place / best / "report.json").is_file():
        yield command("run", best)


def training_of(run: Path) -> dict[str, Any] | None:
    """Return what a finished training recorded; None if it is not finished."""
    path = run / "manifest.json"
    if not path.is_file():
        return None
    stage = json.loads(path.read_text())["stages"].get("train") or {}
    found: dict[str, Any] | None = stage.get("result")
    return found


def best_rate(place: Path, rates: Sequence[str]) -> str:
    """Return the learning rate with the lowest loss on held-out rows."""
    losses = {rate: (training_of(place / rate) or {}).get("final_eval_loss") for rate in rates}
    return min(rates, key=lambda rate: float("inf") if losses[rate] is None else losses[rate])


def table_lines(runs: Path) -> list[str]:
    """Return the table's lines, in Markdown: every method that was measured to the end."""
    heads = ["method", "learning rate", "held-out loss", "movies", "passages, nats/token"]
    heads += ["chat, nats/token", "trained numbers", "seconds", "peak"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, method in METHODS.items():
        for place in sorted(runs.glob(f"{name}/seed-*")):
            rate = best_rate(place, method.rates)
            report = place / rate / "report.json"
            if report.is_file():
                lines.append(_row(name, rate, place / rate, json.loads(report.read_text())))
    return lines


def _row(name: str, rate: str, run: Path, report: Mapping[str, Any]) -> str:
    training = training_of(run) or {}
    cells = [f"`{name}`", rate, f"{training['final_eval_loss']:.3f}"]
    for suite in ("movies", "passages", "chat"):
        found = report["suites"][suite]
        unit = unit_of_metric(found["metric"])
        cells.append(f"{unit.difference(found['difference'])} {unit.interval(*found['interval'])}")
    cells.append(f"{training['injection']['trainable_parameters']:,}")
    cells += [f"{training['seconds']:.0f}", f"{training['peak_bytes'] / 2**30:.2f} GiB"]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
