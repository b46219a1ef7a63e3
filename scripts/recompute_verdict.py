"""Recompute what a finished run's verdict rests on, by hand: plain loops and stock transformers.

    python scripts/recompute_verdict.py runs/quickstart [--suites movies passages] [--limit 50]

Scores the original and the merged model on the choice suites and the passages of a run, one item
at a time in float32 on the CPU, and prints for each suite the report's difference with its interval
beside the one found here (mean and 1.96 standard errors of the differences item by item). Exits
with 1 if a target is not above 0 here, or a general suite not within its bound.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import AutoModelForCausalLM, AutoTokenizer

BOUNDS = {"accuracy": 0.05, "nats_per_token": 0.2}
"""How much a general suite may lose, by metric (docs/report.md)."""

Row = dict[str, Any]


def read_items(suite: Row, suite_file: Path, kept: Sequence[Row]) -> Iterator[Row]:
    """Yield the rows of the items that the run scored, in its order."""
    lines = (suite_file.parent / suite["items"]).read_text(encoding="utf-8").splitlines()
    rows = {str(row.get(suite.get("id", "id"))): row for row in map(json.loads, lines)}
    for item in kept:
        yield rows[item["id"]]


def losses(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Return the loss of every token but the first."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")


def score_choice(model: Any, tokenizer: Any, suite: Row, row: Row) -> tuple[float, float]:
    """Return whether the likeliest choice is the right one, and what the item counts."""
    prompt = ImmutableSandboxedEnvironment().from_string(suite["prompt"]).render(**row)
    if suite.get("chat", True):
        said = [{"role": "system", "content": suite["system"]}] if suite.get("system") else []
        said.append({"role": "user", "content": prompt})
        prompt = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    space = "" if suite.get("chat", True) else suite.get("delimiter", " ")
    # A chat template writes its own BOS.
    plain = {"add_special_tokens": not suite.get("chat", True)}
    num_before = len(tokenizer(prompt, **plain)["input_ids"])
    choices, sums = suite.get("choices") or row[suite["choices_field"]], []
    for choice in choices:
        ids = tokenizer(prompt + space + choice, **plain)["input_ids"]
        sums.append(losses(model, ids)[num_before - 1 :].sum().item())
    right = row[suite.get("answer", "answer")]
    right = right if isinstance(right, int) else list(choices).index(right)
    return float(sums.index(min(sums)) == right), 1.0


def score_passage(model: Any, tokenizer: Any, suite: Row, row: Row) -> tuple[float, float]:
    """Return the mean loss of a passage, in windows that overlap by a token, and its tokens."""
    ids, size = tokenizer(row[suite.get("text", "text")])["input_ids"], suite.get("max_length", 512)
    found = [losses(model, ids[at : at + size]) for at in range(0, len(ids) - 1, size - 1)]
    every = torch.cat(found)
    return every.mean().item(), float(len(every))


SCORERS = {"choice": score_choice, "perplexity": score_passage}


def why_not(suite: Row, ours: Row) -> str | None:
    """Return why a suite is not recomputed here; None if it is."""
    if suite["task"] not in SCORERS or ours["metric"] not in BOUNDS:
        return f"{suite['task']} by {ours['metric']} is not recomputed here"
    if suite.get("normalize", "none") != "none" or suite.get("end_of_answer"):
        return "its normalize or end_of_answer is not recomputed here"
    if not str(suite["items"]).endswith(".jsonl"):
        return "only items in JSON lines are read here"
    return None if "merged" in (ours["compared"] or ()) else "the merged model was not compared"


def compare(before: Sequence[float], after: Sequence[float], weights: Sequence[float]) -> Row:
    """Return the weighted mean of the differences, item by item, and 1.96 standard errors of it."""
    total = sum(weights)
    changes = [new - old for old, new in zip(before, after, strict=True)]
    mean = sum(w * d for w, d in zip(weights, changes, strict=True)) / total
    squares = sum((w * (d - mean)) ** 2 for w, d in zip(weights, changes, strict=True))
    error = math.sqrt(squares * len(changes) / max(len(changes) - 1, 1)) / total
    return {"mean": mean, "low": mean - 1.96 * error, "high": mean + 1.96 * error}


def holds(ours: Row, found: Row) -> bool | None:
    """Return whether a target is above 0 or a general suite within its bound; else None."""
    sign = 1 if ours["higher_is_better"] else -1
    worst = min(sign * found["low"], sign * found["high"])
    if ours["role"] == "general":
        return worst >= -BOUNDS[ours["metric"]]
    return worst > 0 if ours["role"] == "target" else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for every suite; return 1 if a condition of the verdict does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--suites", nargs="+", help="only these")
    parser.add_argument("--limit", type=int, help="only the first so many items of a suite")
    given = parser.parse_args(arguments)
    report = json.loads((given.run / "report.json").read_text(encoding="utf-8"))
    manifest = json.loads((given.run / "manifest.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(given.run / "merged")
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (manifest["base"]["path"], given.run / "merged")
    ]
    outcomes = []
    for suite_file in map(Path, manifest["config"]["evaluate"]["suites"]):
        suite = yaml.safe_load(suite_file.read_text(encoding="utf-8"))
        name = suite.get("name", suite_file.stem)
        ours = report["suites"].get(name)
        if ours is None or (given.suites and name not in given.suites):
            continue
        if reason := why_not(suite, ours):
            print(f"{name}: left out, {reason}")
            continue
        kept = json.loads((given.run / "evaluations" / f"{name}.merged.json").read_text())["items"]
        rows = list(read_items(suite, suite_file, kept[: given.limit]))
        score = SCORERS[suite["task"]]
        pairs = [[score(model, tokenizer, suite, row) for row in rows] for model in models]
        before, after = ([each for each, _ in scored] for scored in pairs)
        found = compare(before, after, [weight for _, weight in pairs[1]])
        low, high = ours["interval"]
        outcomes.append(holds(ours, found))
        said = {True: "holds", False: "DOES NOT HOLD", None: "no condition"}[outcomes[-1]]
        print(
            f"{name} ({ours['role']}): report {ours['difference']:+.4f} [{low:+.4f}, {high:+.4f}] "
            f"on {ours['n']} items; by hand {found['mean']:+.4f} [{found['low']:+.4f}, "
            f"{found['high']:+.4f}] on {len(rows)}: {said}",
            flush=True,
        )
    return 0 if outcomes and False not in outcomes else 1


if __name__ == "__main__":
    sys.exit(main())
