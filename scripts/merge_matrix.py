"""Merge what stock peft writes, on tiny models of every architecture, and compare with stock peft.

Each cell is an adapter on an architecture: merged by llmtune and loaded by stock transformers, its
logits are those of the live peft model in float32 (right), or the merge was refused in one line.
Anything else is a fault, and the exit code is 1. Results are kept in a file, so that the same
command continues where it stopped.

    python scripts/merge_matrix.py --results /tmp/merge.jsonl             # about an hour
    python scripts/merge_matrix.py --only llama,qwen3 --adapters lora,dora
    python scripts/merge_matrix.py --results /tmp/merge.jsonl --write     # docs/merge-matrix.md
"""

import argparse
import json
import re
import sys
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from merge_cells.adapters import ADAPTERS  # noqa: E402
from merge_cells.architectures import architecture_names  # noqa: E402
from merge_cells.cell import (  # noqa: E402
    ABSENT,
    BLOCKED,
    FAULTS,
    NO_MODEL,
    REFUSED,
    RIGHT,
    Cell,
    try_architecture,
)

PAGE = ROOT / "docs" / "merge-matrix.md"
PLACE = re.compile(r"/tmp/[^\s:;,)]+")
LEFT = re.compile(r"; (nothing was left|the earlier model) .*$|; nothing$")
MOST_NAMED = 12
MARKS = {RIGHT: "yes", REFUSED: "refused", BLOCKED: "check", ABSENT: "-"}
COUNTED = {RIGHT: "right (`yes`)", ABSENT: "that do not exist (`-`)"}
HISTORY = (
    "The cells were filled over several versions of the code, while faults that they showed were "
    'mended, so a cell may describe an older version than the one you have: a case under "What the '
    'check refuses" may now be refused before training.'
)
"""Of the results that the page was made of; to be taken out when a new file of them tries all."""
NOTES = {
    ("youtu", "both ends"): "They are its padding row, which transformers sets to zero whenever it "
    "loads such a model; training leaves that row alone, and only this adapter's noise does not"
}
"""What explains a refusal beyond its message."""
AGAIN = (
    "To try a few again, or all of them from the start (about an hour; a results file that is "
    "already there is continued, not repeated):"
)


def main() -> int:
    """Fill what is missing of the matrix, print it, and say whether it holds a fault."""
    asked = _parse()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    cells = _read(asked.results)
    rows = asked.only.split(",") if asked.only else architecture_names()
    columns = tuple(asked.adapters.split(",")) if asked.adapters else tuple(ADAPTERS)
    with tempfile.TemporaryDirectory() as scratch:
        for row in rows:
            missing = tuple(one for one in columns if (row, one) not in cells)
            missing = () if asked.kept else missing
            for cell in try_architecture(row, missing, Path(scratch)) if missing else ():
                cells[cell.architecture, cell.adapter] = cell
                _keep(asked.results, cell)
    shown = [cells[row, one] for row in rows for one in columns if (row, one) in cells]
    lines = page_lines(shown, columns)
    print("\n".join(lines))
    if asked.write:
        PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 1 if any(cell.outcome in FAULTS for cell in shown) else 0


def page_lines(cells: Sequence[Cell], columns: Sequence[str]) -> list[str]:
    """Return the table in Markdown, what was refused and why, and the faults if there are any."""
    models = [cell for cell in cells if cell.outcome != NO_MODEL]
    rows: dict[str, dict[str, str]] = defaultdict(dict)
    for cell in models:
        rows[cell.architecture][cell.adapter] = MARKS.get(cell.outcome, cell.outcome)
    counts = Counter(cell.outcome for cell in models)
    lines = [
        "# Merging: architectures and adapters",
        "",
        "Written by `scripts/merge_matrix.py`: tiny random models of the architectures, adapters "
        "as stock peft saves them, merged and loaded again by stock transformers, and compared "
        f"with the live peft model in float32 (transformers {transformers.__version__}, peft "
        f"{peft.__version__}).",
        "",
        "`yes`: the merged model's logits are those of the live one to a thousandth of the "
        "adapter's effect, or to float32's rounding if the effect is that small. `refused`: one "
        "line says why, and nothing is written. `check`: the merged model was written, compared "
        "with the live one, found to differ, and removed. `-`: the architecture has no such part, "
        "or peft cannot put such an adapter on it. Empty: not tried yet. Whether it can be trained "
        "is a different question: Gemma 3n reads one weight past its adapter only while it trains, "
        "so training refuses what merges (families.md).",
        "",
        f"{HISTORY} {_coverage(rows, columns)}{AGAIN}",
        "",
        "```",
        "python scripts/merge_matrix.py --only llama,qwen3 --adapters lora,dora",
        "python scripts/merge_matrix.py --results merge.jsonl --write",
        "```",
        "",
        f"{len(rows)} architectures, {len(models):,} of {len(rows) * len(columns):,} cells: "
        + ", ".join(
            f"{count:,} {COUNTED.get(outcome, outcome)}" for outcome, count in counts.most_common()
        )
        + ".",
        "",
        "| | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, marks in sorted(rows.items()):
        lines.append(f"| {name} | " + " | ".join(marks.get(one, "") for one in columns) + " |")
    lines += _details("## What is refused", (one for one in models if one.outcome == REFUSED))
    lines += _details("## What the check refuses", (c for c in models if c.outcome == BLOCKED))
    lines += _details("## Faults", (one for one in models if one.outcome in FAULTS))
    absent = sorted({cell.architecture for cell in cells if cell.outcome == NO_MODEL})
    if absent:
        lines += ["", f"No tiny model could be made of: {', '.join(absent)}."]
    return lines


def _coverage(rows: Mapping[str, Mapping[str, str]], columns: Sequence[str]) -> str:
    """Say how many architectures were tried with all adapters, if some were not."""
    few = [len(marks) for marks in rows.values() if len(marks) < len(columns)]
    if not few:
        return ""
    return (
        f"{len(rows) - len(few)} architectures were tried with all {len(columns)} kinds of "
        f"adapters, the other {len(few)} with {min(few)} to {max(few)} of them. "
    )


def _details(title: str, cells: Iterable[Cell]) -> list[str]:
    """Return a section with one line for each reason: of which architectures and adapters."""
    grouped: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        reason = PLACE.sub("DIRECTORY", LEFT.sub("", cell.detail))
        note = NOTES.get((cell.architecture, cell.adapter))
        grouped[f"{reason}. {note}" if note else reason].append(cell)
    listed = []
    for reason, found in grouped.items():
        names = list(dict.fromkeys(one.architecture for one in found))
        adapters = dict.fromkeys(one.adapter for one in found)
        where = ", ".join(names) if len(names) <= MOST_NAMED else f"{len(names)} architectures"
        listed.append(f"- {where} ({', '.join(adapters)}): {reason}")
    return ["", title, "", *listed] if listed else []


def _read(path: Path | None) -> dict[tuple[str, str], Cell]:
    if path is None or not path.is_file():
        return {}
    cells = [Cell(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    return {(cell.architecture, cell.adapter): cell for cell in cells}


def _keep(path: Path | None, cell: Cell) -> None:
    print(f"{cell.architecture:24} {cell.adapter:22} {cell.outcome} {cell.detail}", file=sys.stderr)
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(cell)) + "\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="Rows, separated by commas: llama,qwen3,mamba+tied.")
    parser.add_argument("--adapters", help=f"Columns, separated by commas: {','.join(ADAPTERS)}.")
    parser.add_argument(
        "--results", type=Path, help="Where cells are kept, one JSON object a line."
    )
    parser.add_argument("--kept", action="store_true", help="Show what is kept, and try nothing.")
    parser.add_argument("--write", action="store_true", help=f"Write {PAGE.relative_to(ROOT)}.")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
