"""Take a tiny random model of every causal LM through all stages of a run, and write the table.

Each family ends as `works`, or as one line that says, before training, what does not; anything else
is a fault, and the exit code is 1. Results are kept in a file, so that the same command continues
where it stopped.

    python scripts/families.py --results /tmp/families.jsonl            # about an hour
    python scripts/families.py --only llama,qwen3_next,gpt_oss
    python scripts/families.py --results /tmp/families.jsonl --write    # docs/families.md
"""

import argparse
import json
import logging
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from family_cells.trial import (  # noqa: E402
    FAULT,
    NO_MODEL,
    REFUSED,
    STAGES,
    WORKS,
    Trial,
    try_family,
)
from merge_cells.architectures import CONTAINERS, architecture_names  # noqa: E402

PAGE = ROOT / "docs" / "families.md"
NAMED = {
    "Llama 3": ["llama"],
    "Llama 4": ["llama4_text", "llama4+published"],
    "Qwen3": ["qwen3"],
    "Qwen3-MoE": ["qwen3_moe"],
    "Qwen3.5": ["qwen3_5_text", "qwen3_5+published"],
    "Qwen3.5-MoE": ["qwen3_5_moe_text", "qwen3_5_moe+published"],
    "Qwen3-Next": ["qwen3_next"],
    "Gemma 3": ["gemma3_text", "gemma3+published"],
    "Gemma 4 (text)": ["gemma4_text"],
    "gpt-oss": ["gpt_oss"],
    "Mistral": ["mistral"],
    "Ministral 3": ["ministral3"],
    "Phi-3, Phi-4": ["phi3", "phi3+longrope"],
    "Phi-MoE": ["phimoe"],
    "GLM-4": ["glm", "glm4"],
    "GLM-4-MoE": ["glm4_moe"],
    "DeepSeek-V3": ["deepseek_v3"],
    "Granite 4 hybrid": ["granitemoehybrid"],
    "Falcon-H1": ["falcon_h1"],
    "Nemotron-H": ["nemotron_h"],
    "LFM2": ["lfm2"],
    "SmolLM3": ["smollm3"],
    "OLMo 3": ["olmo3"],
    "OLMo hybrid": ["olmo_hybrid"],
    "Ernie 4.5": ["ernie4_5"],
    "Ernie 4.5 MoE": ["ernie4_5_moe"],
    "MiniMax-M2": ["minimax_m2"],
    "Kimi linear": ["kimi_linear"],
    "Mamba 2": ["mamba2"],
}
"""What people tune, by the name it is known by, and its rows here."""
HISTORY = (
    "The rows were filled over several versions of the code, while faults that they showed were "
    "mended, so a row may describe an older version than the one you have."
)
"""Of the results that the page was made of; to be taken out when a new file of them tries all."""
AGAIN = (
    "To try a few again, or all of them from the start (about an hour; a results file that is "
    "already there is continued, not repeated):"
)


def main() -> int:
    """Try what is missing, print the table, and say whether it holds a fault."""
    asked = _parse()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    names = asked.only.split(",") if asked.only else family_names()
    trials = read_trials(asked.results)
    until = time.monotonic() + asked.minutes * 60
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            if name in trials or asked.kept or time.monotonic() > until:
                continue
            trials[name] = try_family(name, Path(scratch) / "run", asked.stages.split(","))
            _keep(asked.results, trials[name])
    shown = [trials[name] for name in names if name in trials]
    lines = page_lines(shown)
    print("\n".join(lines))
    if asked.write:
        PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 1 if any(trial.outcome == FAULT for trial in shown) else 0


def family_names() -> list[str]:
    """Return every row: those people tune first, then all other causal LMs."""
    named = [row for rows in NAMED.values() for row in rows]
    others = [name for name in architecture_names() if "+" not in name and name not in CONTAINERS]
    return list(dict.fromkeys([*named, *others]))


def page_lines(trials: Sequence[Trial]) -> list[str]:
    """Return the page in Markdown: the families by name, all others, and what is refused."""
    models = {trial.family: trial for trial in trials if trial.outcome != NO_MODEL}
    untried = sorted(set(family_names()) - {trial.family for trial in trials})
    lines = [
        "# Model families",
        "",
        "Written by `scripts/families.py`: a tiny random model of every causal LM in transformers "
        f"{transformers.__version__} (peft {peft.__version__}), on a CPU, with LoRA on "
        "`all-linear`, through every stage of a run:",
        "",
        "- **train**: in float32, rows packed where the probe allows it;",
        "- **rows alone**: the same rows, one at a time, have the same losses to 1e-5;",
        "- **resume**: a run killed between two steps and started again gives the same weights;",
        "- **merge**: merged, checked, loaded by stock transformers, and equal to the adapter in "
        "stock PEFT (KL divergence in float32);",
        "- **bf16**, **nf4**: trained in bfloat16 and over a 4-bit base; that one is merged too.",
        "",
        "`works` means all of these, unless the row names the stages that were tried. `refused` is "
        "one line that says why, before training. The models are tiny: nothing here says how well "
        "a family learns.",
        "",
        f"{HISTORY} {_coverage(models.values(), untried)}{AGAIN}",
        "",
        "```",
        "python scripts/families.py --only llama,qwen3",
        "python scripts/families.py --results families.jsonl --write",
        "```",
        "",
        _counts(models.values()),
        "",
        "## What people tune",
        "",
        "| | model type | outcome | rows |",
        "|---|---|---|---|",
    ]
    for known, rows in NAMED.items():
        for trial in (models[row] for row in rows if row in models):
            lines.append(f"| {known} | `{trial.family}` | {_outcome(trial)} | {_rows(trial)} |")
    named = {row for rows in NAMED.values() for row in rows}
    lines += ["", "## All others", "", "| model type | outcome | rows |", "|---|---|---|"]
    for name in sorted(models.keys() - named):
        lines.append(f"| `{name}` | {_outcome(models[name])} | {_rows(models[name])} |")
    lines += _details("## What is refused, and what has a fault", models.values())
    lines += _left_out(models.values())
    absent = sorted(trial.family for trial in trials if trial.outcome == NO_MODEL)
    if absent:
        lines += ["", f"No tiny model could be made of: {', '.join(absent)}."]
    if untried:
        lines += ["", f"Not tried yet: {', '.join(untried)}."]
    return lines


def _counts(trials: Collection[Trial]) -> str:
    counts = Counter(trial.outcome for trial in trials)
    works, refused, faults = (counts[one] for one in (WORKS, REFUSED, FAULT))
    few = sum(map(_is_partial, trials))
    return (
        f"{len(trials)} families were tried: {works} {'works' if works == 1 else 'work'} "
        f"({works - few} in every stage, {few} in those named), {refused} "
        f"{'is' if refused == 1 else 'are'} refused, and {faults} "
        f"{'has' if faults == 1 else 'have'} a fault."
    )


def _coverage(trials: Iterable[Trial], untried: Sequence[str]) -> str:
    """Say how many were tried in a few stages, and whether some were not at all."""
    few = sum(map(_is_partial, trials))
    parts = [f"{few} of them were tried only in the stages that they name"] if few else []
    parts += ["the families at the end of the page not at all"] if few and untried else []
    return f"{', and '.join(parts)}. " if parts else ""


def _is_partial(trial: Trial) -> bool:
    """Whether it works, as far as it was tried."""
    return trial.outcome == WORKS and len(trial.stages) < len(STAGES)


def _outcome(trial: Trial) -> str:
    if trial.outcome == WORKS:
        few = ", ".join(trial.stages)
        return f"{WORKS}: {few} alone were tried" if _is_partial(trial) else WORKS
    return f"{trial.outcome} ({list(trial.stages)[-1]})"


def _rows(trial: Trial) -> str:
    return trial.rows.partition(":")[0]


def _details(title: str, trials: Iterable[Trial]) -> list[str]:
    grouped: dict[str, list[str]] = defaultdict(list)
    for trial in trials:
        if trial.line:
            grouped[trial.line].append(trial.family)
    listed = [f"- {', '.join(names)}: {line}" for line, names in sorted(grouped.items())]
    return ["", title, "", *listed] if listed else []


def _left_out(trials: Iterable[Trial]) -> list[str]:
    grouped: dict[str, list[str]] = defaultdict(list)
    for trial in trials:
        for note in trial.notes:
            grouped[note].append(trial.family)
        if trial.rows.startswith("padded: "):
            grouped[trial.rows.split(";")[0]].append(trial.family)
    listed = [f"- {', '.join(names)}: {note}" for note, names in sorted(grouped.items())]
    return ["", "## What is left out, and what is not packed", "", *listed] if listed else []


def read_trials(path: Path | None) -> dict[str, Trial]:
    """Return what is kept, by family."""
    if path is None or not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return {trial.family: trial for trial in (Trial(**json.loads(line)) for line in lines)}


def _keep(path: Path | None, trial: Trial) -> None:
    print(f"{trial.family:24} {trial.outcome} {trial.line}", file=sys.stderr, flush=True)
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(trial)) + "\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="Rows, separated by commas: llama,gemma3+published.")
    parser.add_argument("--results", type=Path, help="Where trials are kept, a JSON object a line.")
    parser.add_argument("--kept", action="store_true", help="Show what is kept, and try nothing.")
    parser.add_argument("--write", action="store_true", help=f"Write {PAGE.relative_to(ROOT)}.")
    parser.add_argument(
        "--minutes", type=float, default=24 * 60, help="Begin no family after so many."
    )
    parser.add_argument("--stages", default=",".join(STAGES), help="Try these alone.")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
