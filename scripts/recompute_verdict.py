"""Recompute what a finished run's verdict rests on, by hand: plain loops and stock transformers.

    python scripts/recompute_verdict.py runs/quickstart [--suites movies passages] [--limit 50]

Scores the original and the merged model on the choice suites, the passages and the open chat of a
run, one item at a time in float32 on the CPU. Prints for each suite the change in the report with
its interval, the run's change on the items taken here, the one found here (mean and 1.96 standard
errors of the differences item by item), and how far the scores of single items agree. Exits with 1
if a target is not above 0 here, or a general suite not within its bound; with --limit nothing is
held to that.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import AutoModelForCausalLM, AutoTokenizer

BOUNDS = {"accuracy": 0.05, "nats_per_token": 0.2}
"""How much a general suite may lose, by metric (docs/report.md)."""

SAME = 0.05
"""Nats/token; losses that differ by less are the same."""

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


@dataclass(frozen=True)
class Scored:
    """An item's score, what it counts, and the losses that it was made of (summed by choice)."""

    score: float
    weight: float
    losses: Sequence[float]


def score_choice(model: Any, tokenizer: Any, suite: Row, row: Row) -> Scored:
    """Score whether the likeliest choice is the right one."""
    prompt = ImmutableSandboxedEnvironment().from_string(suite["prompt"]).render(**row)
    if suite.get("chat", True):
        said = [{"role": "system", "content": suite["system"]}] if suite.get("system") else []
        said.append({"role": "user", "content": prompt})
        prompt = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    space = "" if suite.get("chat", True) else suite.get("delimiter", " ")
    # A chat template writes its own BOS.
    plain = {"add_special_tokens": not suite.get("chat", True)}
    before = tokenizer(prompt, **plain)["input_ids"]
    choices = suite.get("choices") or row[suite["choices_field"]]
    whole = [tokenizer(prompt + space + choice, **plain)["input_ids"] for choice in choices]
    if all(ids[:-1] == before for ids in whole):  # one token each: what comes before runs once
        with torch.no_grad():
            following = model(torch.tensor([before])).logits[0, -1].float().log_softmax(-1)
        sums = [-following[ids[-1]].item() for ids in whole]
    else:
        sums = [losses(model, ids)[len(before) - 1 :].sum().item() for ids in whole]
    right = row[suite.get("answer", "answer")]
    right = right if isinstance(right, int) else list(choices).index(right)
    return Scored(float(sums.index(min(sums)) == right), 1.0, sums)


def score_passage(model: Any, tokenizer: Any, suite: Row, row: Row) -> Scored:
    """Score the mean loss of a passage, in windows that overlap by a token."""
    ids, size = tokenizer(row[suite.get("text", "text")])["input_ids"], suite.get("max_length", 512)
    found = [losses(model, ids[at : at + size]) for at in range(0, len(ids) - 1, size - 1)]
    every = torch.cat(found)
    return Scored(every.mean().item(), float(len(every)), [every.mean().item()])


def score_chat(model: Any, tokenizer: Any, suite: Row, row: Row) -> Scored:
    """Score the mean loss of what the original answered to an open prompt, as the run kept it."""
    said = [{"role": "user", "content": row[suite.get("prompt", "prompt")]}]
    text = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer = tokenizer(row[REPLY], add_special_tokens=False)["input_ids"]
    found = losses(model, [*ids, *(answer or [tokenizer.eos_token_id])])[len(ids) - 1 :]
    return Scored(found.mean().item(), float(len(found)), [found.mean().item()])


REPLY = "what the original answers"
"""The key of a chat item's row that holds the text."""
SCORERS = {"choice": score_choice, "perplexity": score_passage, "chat": score_chat}


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


@dataclass(frozen=True)
class Recomputed:
    """What a suite scores by hand, beside what the run kept of the same items."""

    name: str
    ours: Row
    found: Row
    n: int
    kept_mean: float
    """The run's own change on the same items."""
    num_same: int
    """Scores, of both models, that are the same by hand (of losses: to 0.05 nats/token)."""
    distance: float
    """Mean distance of the losses (of each choice, or per token) from the run's, nats."""

    @property
    def holds(self) -> bool | None:
        """Whether the verdict's condition holds here; None if it has none, or items are missing."""
        return holds(self.ours, self.found) if self.n == self.ours["n"] else None

    def as_row(self) -> str:
        """Return the row of the table."""
        low, high = self.ours["interval"]
        said = {True: "holds", False: "DOES NOT HOLD", None: "–"}[self.holds]
        found = (self.found["mean"], self.found["low"], self.found["high"])
        cells = [
            f"{self.name} ({self.ours['role']})",
            f"{self._write(self.ours['difference'], low, high)}, n = {self.ours['n']}",
            f"{self.n}",
            self._write(self.kept_mean),
            self._write(*found),
            f"{self.num_same} of {2 * self.n} the same; losses {self.distance:.3f} nats apart",
            said,
        ]
        return f"| {' | '.join(cells)} |"

    def _write(self, mean: float, *ends: float) -> str:
        scale, digits = (100, 1) if self.ours["metric"] == "accuracy" else (1, 3)
        numbers = [f"{scale * each:+.{digits}f}".replace("-", "−") for each in (mean, *ends)]
        return numbers[0] + (f" [{', '.join(numbers[1:])}]" if ends else "")


def recompute(run: Path, suites: Sequence[str] | None, limit: int | None) -> Iterator[Recomputed]:
    """Score original and merged model of a run by hand, suite by suite."""
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(run / "merged")
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (manifest["base"]["path"], run / "merged")
    ]
    for suite_file in map(Path, manifest["config"]["evaluate"]["suites"]):
        suite = yaml.safe_load(suite_file.read_text(encoding="utf-8"))
        name = suite.get("name", suite_file.stem)
        ours = report["suites"].get(name)
        if ours is None or (suites and name not in suites):
            continue
        if reason := why_not(suite, ours):
            print(f"{name}: left out, {reason}", file=sys.stderr)
            continue
        kept = [
            json.loads((run / "evaluations" / f"{name}.{arm}.json").read_text())["items"][:limit]
            for arm in ours["compared"]
        ]
        rows = list(read_items(suite, suite_file, kept[1]))
        if suite["task"] == "chat":
            rows = [row | {REPLY: item["answer"]} for row, item in zip(rows, kept[0], strict=True)]
        score = SCORERS[suite["task"]]
        before, after = ([score(model, tokenizer, suite, row) for row in rows] for model in models)
        both = list(zip([*before, *after], [*kept[0], *kept[1]], strict=True))
        weights = [each.weight for each in after]
        old, new = ([item["score"] for item in items] for items in kept)
        yield Recomputed(
            name,
            ours,
            compare([each.score for each in before], [each.score for each in after], weights),
            len(rows),
            compare(old, new, [item["weight"] for item in kept[1]])["mean"],
            sum(abs(mine.score - item["score"]) <= SAME for mine, item in both),
            sum(map(distance, *zip(*both, strict=True))) / len(both),
        )


def distance(found: Scored, item: Row) -> float:
    """Return how far the losses of an item are from those that the run kept, on average."""
    kept = [-each for each in item["details"].get("log_likelihoods", ())] or [item["score"]]
    apart = [abs(mine - theirs) for mine, theirs in zip(found.losses, kept, strict=True)]
    return sum(apart) / len(apart)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a row for every suite; return 1 if a condition of the verdict does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--suites", nargs="+", help="only these")
    parser.add_argument("--limit", type=int, help="only the first so many items of a suite")
    given = parser.parse_args(arguments)
    print(
        "| suite | report | items here | the run on these | by hand | items' scores | condition |"
    )
    print("|---|---|---|---|---|---|---|")
    outcomes = []
    for each in recompute(given.run, given.suites, given.limit):
        print(each.as_row(), flush=True)
        outcomes.append(each.holds)
    return 0 if outcomes and False not in outcomes else 1


if __name__ == "__main__":
    sys.exit(main())
