"""Measure adapter methods on the quickstart's data, and print the table of docs/methods.md.

    python scripts/methods_table.py run ia3            # one method: about ten minutes on two cores
    python scripts/methods_table.py run ia3 --seed 1
    python scripts/methods_table.py table              # prints what is finished
    python scripts/methods_table.py write              # puts it into docs/methods.md

A method is trained once for each learning rate of a short list, every time with the same number of
steps, rows and seed, without `protect`. The rate with the lowest loss on held-out rows is kept, and
that adapter is compared with the base on 100 reviews, on prose, and in chat. What is finished is
not done again: repeat an interrupted call. `--seconds` begins nothing new after that long.
"""

import argparse
import json
import os
import re
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
PAGE = ROOT / "docs/methods.md"
BEGIN, END = "<!-- methods_table.py: begin -->", "<!-- methods_table.py: end -->"
ROW = re.compile(r"^\| `([\w-]+)` \|", re.MULTILINE)
CPU_NAME = "cpu_seconds.json"
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
    "boft": Measured({"method": "boft"}, USUAL),
    "adalora": Measured({"method": "adalora"}, USUAL),
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
    parser.add_argument("action", choices=("run", "table", "write"))
    parser.add_argument("methods", nargs="*", metavar="method", help=", ".join(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=540, help="begin nothing new after these")
    parser.add_argument("--config", type=Path, default=ROOT / "configs/quickstart.yaml")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/methods")
    parser.add_argument("--page", type=Path, default=PAGE, help="what `write` rewrites a part of")
    asked = parser.parse_args(arguments)
    asked.runs, asked.config = asked.runs.resolve(), asked.config.resolve()
    unknown = [name for name in asked.methods if name not in METHODS]
    if unknown or (asked.action == "run") != bool(asked.methods):
        parser.error(f"expected `table`, `write`, or `run` with some of {', '.join(METHODS)}")
    if asked.action == "table":
        print("\n".join(block_lines(asked.runs)))
        return 0
    if asked.action == "write":
        if not finished_methods(asked.runs):
            raise SystemExit(f"{asked.runs}: no method is finished; {asked.page} is left as it is")
        write_block(asked.page, block_lines(asked.runs))
        return 0
    until = time.monotonic() + asked.seconds
    for name in asked.methods:
        for command in commands(name, asked):
            if time.monotonic() > until:
                print(f"{name}: not finished; call again", file=sys.stderr)
                return 3
            before = os.times()
            try:
                subprocess.run(command, check=True, cwd=ROOT)
            finally:  # of an interrupted training too: it is continued from its last checkpoint
                after = os.times()
                spent = sum(after[2:4]) - sum(before[2:4])  # of the children, in all their threads
                if command[3] == "train":
                    _note_cpu_seconds(command, spent)
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


def _note_cpu_seconds(command: Sequence[str], seconds: float) -> None:
    """Keep what a training took, beside its manifest; a continued one adds to what it took."""
    run_dir = next(one.partition("=")[2] for one in command if one.startswith("run_dir="))
    path = Path(run_dir) / CPU_NAME
    if not path.parent.is_dir():  # it was refused before it began
        return
    earlier = json.loads(path.read_text()) if path.is_file() else 0.0
    path.write_text(json.dumps(earlier + seconds))


@dataclass(frozen=True)
class Finished:
    """A method that was measured to the end with one seed."""

    name: str
    place: Path
    rate: str

    @property
    def run(self) -> Path:
        """The run of the best rate."""
        return self.place / self.rate

    @property
    def manifest(self) -> dict[str, Any]:
        """What the run recorded."""
        found: dict[str, Any] = json.loads((self.run / "manifest.json").read_text())
        return found

    @property
    def seed(self) -> int:
        """Its seed."""
        return int(self.place.name.split("-")[1])

    @property
    def steps(self) -> int:
        """Its steps."""
        return int(self.place.name.split("-")[3])

    @property
    def cpu_seconds(self) -> float | None:
        """What its training took; None if it was not measured."""
        path = self.run / CPU_NAME
        return float(json.loads(path.read_text())) if path.is_file() else None


def finished_methods(runs: Path) -> list[Finished]:
    """Return every method and seed that was measured to the end, in the order of `METHODS`."""
    found = []
    for name, method in METHODS.items():
        for place in sorted(runs.glob(f"{name}/seed-*-steps-*")):
            rate = best_rate(place, method.rates)
            if (place / rate / "report.json").is_file():
                found.append(Finished(name, place, rate))
    return found


def write_block(page: Path, lines: Sequence[str]) -> None:
    """Replace what is between the two markers of a page, unless a row of it would be lost."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    written, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page}: expected the lines {BEGIN} and {END}, around what is rewritten")
    old, new = (set(ROW.findall(text)) for text in (written, "\n".join(lines)))
    if lost := sorted(old - new):
        raise SystemExit(
            f"{page}: has rows of {', '.join(lost)}, whose runs are not here; nothing was written. "
            "Measure them here too (`run`), or give their runs with --runs"
        )
    block = "\n".join([begin, "", *lines, "", end])
    page.write_text(before + block + after, encoding="utf-8")


def block_lines(runs: Path) -> list[str]:
    """Return what the page says: how it was measured, the table, and what is missing."""
    finished = finished_methods(runs)
    missing = [f"`{name}`" for name in METHODS if name not in {one.name for one in finished}]
    left = [f"Not measured yet: {', '.join(missing)}."] if missing else []
    if not finished:
        return left
    return [*_caption(finished), "", *table_lines(finished), "", *_notes(finished), *left]


def _caption(finished: Sequence[Finished]) -> list[str]:
    manifest = finished[0].manifest
    dates = sorted({one.manifest["created"][:10] for one in finished})
    machine = manifest["machine"]
    seeds = sorted({one.seed for one in finished})
    steps = sorted({one.steps for one in finished})
    batch = manifest["config"]["train"]["batch_size"]
    which = f"seed {seeds[0]} alone" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"
    base = Path(manifest["base"]["origin"] or manifest["base"]["path"]).name.removesuffix(".gguf")
    limit = manifest["config"]["evaluate"]["limit"]
    return [
        f"Measured {' to '.join(dict.fromkeys((dates[0], dates[-1])))} with "
        f"`scripts/methods_table.py` on {machine['cores']} cores of an {machine['processor']}, "
        f"shared with other work: {base},",
        f"{' or '.join(map(str, steps))} steps of {batch} rows, {which}, at most {limit} items a "
        "suite, 95 % intervals over items, each",
        "minus the base. The learning rate is the one of three with the lowest held-out loss.",
    ]


def table_lines(finished: Sequence[Finished]) -> list[str]:
    """Return the table's lines, in Markdown."""
    heads = ["method", "learning rate", "held-out loss", "movies", "passages", "chat"]
    heads += ["trained numbers", "file", "training", "peak memory"]
    if len({one.seed for one in finished}) > 1:
        heads.insert(1, "seed")
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    first = next((one for one in finished if one.name == "lora"), None)
    for one in finished:
        cells = _cells(one, None if first is None else first.cpu_seconds)
        if "seed" in heads:
            cells.insert(1, str(one.seed))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _cells(one: Finished, cpu_seconds_of_lora: float | None) -> list[str]:
    training = training_of(one.run) or {}
    report = json.loads((one.run / "report.json").read_text())
    edge = _edge(one)
    cells = [f"`{one.name}`", one.rate + (f" ({edge} tried)" if edge else "")]
    cells.append(f"{training['final_eval_loss']:.3f}")
    for suite in ("movies", "passages", "chat"):
        found = report["suites"][suite]
        unit = unit_of_metric(found["metric"])
        cells.append(f"{unit.difference(found['difference'])} {unit.interval(*found['interval'])}")
    cells.append(f"{training['injection']['trainable_parameters']:,}")
    cells.append(f"{training['adapter_bytes'] / 2**20:.1f} MiB")
    spent = one.cpu_seconds
    if spent is None:
        cells.append(f"{training['seconds']:.0f} s by the clock")
    else:
        ratio = f", {spent / cpu_seconds_of_lora:.2f} x LoRA" if cpu_seconds_of_lora else ""
        cells.append(f"{spent:.0f} CPU s{ratio}")
    return [*cells, f"{training['peak_bytes'] / 2**30:.2f} GiB"]


def _edge(one: Finished) -> str:
    """Return where in its list the rate is, if at an end."""
    rates = METHODS[one.name].rates
    return {rates[0]: "lowest", rates[-1]: "highest"}.get(one.rate, "")


def _notes(finished: Sequence[Finished]) -> list[str]:
    notes = []
    if any(_edge(one) for one in finished):
        notes += [
            "A rate marked as the lowest or highest tried is at the end of its list: a rate beyond "
            "it may do better."
        ]
    if any(one.cpu_seconds is None for one in finished):
        notes += [
            "Seconds by the clock depend on what else the machine did at the time, so they cannot "
            "be compared between rows."
        ]
    if len({one.seed for one in finished}) == 1:
        notes += [
            "One seed: intervals hold what a different choice of items would change, and nothing "
            "of what a different seed would."
        ]
    return notes


if __name__ == "__main__":
    sys.exit(main())
