"""What an evaluation costs: its forward tokens by arm, suite and purpose, and ours beside others.

    python scripts/bench_eval.py count run configs/quickstart.yaml run_dir=runs/counted
    python scripts/bench_eval.py compare RUN --against CHECKOUT --limit 40
    python scripts/bench_eval.py compare RUN --lm-eval --suite general
    python scripts/bench_eval.py compare RUN --lm-eval --suite general --shots 5

`count` runs any llmtune command and says which tokens went forward for what. `compare` scores the
suites of a run in fresh processes that take turns: this checkout, another one (an older version),
and lm-evaluation-harness' own Hugging Face backend on the prompts of one choice suite. It holds the
answers item by item and gives ratios: of tokens, of positions that reach the LM head, and of
processor seconds, which say something on a busy machine where wall time does not.
"""

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PURPOSES = {
    "share_prefix": "shared beginning",
    "_score_rest": "later tokens of choices",
    "open_rows": "prompts",
    "write_rows": "written tokens",
    "_decode": "prompts and written tokens",
    "score_texts": "passages",
    "measure_divergence": "divergence",
    "read_states": "hidden states",
    "measure_losses": "memorization",
    "tokens_per_second": "trial of speed",
    "_compare_sequences": "rows of the merge check",
    "_score_batch": "prompts",
}
"""By the innermost function of these: what a forward pass is for."""
CALLERS = ("verify_merge", "answer_side_by_side", "take_base_answers", "measure_price")
"""What is not a suite's scoring, by the function that asks for it."""


@dataclass
class Cost:
    """Forward passes, the tokens they ran (padding included), positions of the head, seconds."""

    passes: int = 0
    tokens: int = 0
    head: int = 0
    seconds: float = 0.0


@contextmanager
def counting(costs: "defaultdict[tuple[str, str, str], Cost]") -> Iterator[None]:
    """Count the forward passes of every causal language model while the block runs."""
    from torch.nn.modules import module as hooks

    started: list[tuple[float, list[int]]] = []

    def before(module: Any, inputs: Any) -> None:
        if _is_model(module):
            started.append((time.process_time(), [0]))
        elif started and type(module).__name__ == "Embedding" and not started[-1][1][0]:
            started[-1][1][0] = inputs[0].numel()

    def after(module: Any, _inputs: Any, output: Any) -> None:
        if _is_model(module):
            begun, (tokens,) = started.pop()
            cost = costs[_purpose()]
            cost.passes += 1
            cost.tokens += tokens
            cost.head += output.logits.shape[:-1].numel() if output.logits is not None else 0
            cost.seconds += time.process_time() - begun

    handles = [
        hooks.register_module_forward_pre_hook(before),
        hooks.register_module_forward_hook(after),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_model(module: Any) -> bool:
    name = type(module).__name__
    return name.endswith("ForCausalLM") and not name.startswith("Peft")


def _purpose() -> tuple[str, str, str]:
    """Return arm, suite and purpose of the present forward pass, read from who called it."""
    frame = sys._getframe(1)
    purpose = asked = ""
    while frame is not None:
        name = frame.f_code.co_name
        purpose = purpose or PURPOSES.get(name, "")
        if name == "evaluate_suite":
            return frame.f_locals["arm"], frame.f_locals["suite"].name, purpose or "other"
        if name in CALLERS:
            asked = asked or name
        if name == "_measure" and "diagnosis" in frame.f_code.co_filename:
            asked = asked or Path(frame.f_code.co_filename).stem
        frame = frame.f_back  # type: ignore[assignment]
    return "-", asked or "-", purpose or "other"


def count(arguments: list[str]) -> None:
    """Run a command of llmtune and print what went forward for what."""
    from llmtune.cli import run_command

    costs: defaultdict[tuple[str, str, str], Cost] = defaultdict(Cost)
    with counting(costs):
        code = run_command(arguments)
    _print_costs(costs)
    sys.exit(code)


def _print_costs(costs: "dict[tuple[str, str, str], Cost]") -> None:
    head = ("arm", "suite or measure", "purpose", "passes", "tokens", "head", "CPU s")
    print("{:14} {:22} {:28} {:>7} {:>9} {:>9} {:>7}".format(*head))
    total = Cost()
    for key, cost in sorted(costs.items(), key=lambda pair: -pair[1].tokens):
        print("{:14} {:22} {:28} ".format(*key) + _numbers(cost))
        for name, value in asdict(cost).items():
            setattr(total, name, getattr(total, name) + value)
    print(f"{'in all':66} " + _numbers(total))


def _numbers(cost: Cost) -> str:
    return f"{cost.passes:>7,} {cost.tokens:>9,} {cost.head:>9,} {cost.seconds:>7.1f}"


def compare(given: argparse.Namespace) -> None:
    """Score a run's suites by every way in turn, and print ratios and differing items."""
    ways: dict[str, Path | None] = {"ours": ROOT}
    if given.against:
        ways["against"] = Path(given.against).resolve()
    if given.lm_eval:
        ways["lm-eval"] = None
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for _ in range(given.rounds):
        for way, checkout in ways.items():
            found[way].append(_run_apart(way, checkout or ROOT, given))
    ours = found["ours"]
    for way, rounds in found.items():
        _print_way(way, rounds, ours)


def _run_apart(way: str, checkout: Path, given: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "found.json"
        command = [sys.executable, __file__, "child", way, given.run, str(out)]
        command += ["--limit", str(given.limit), "--arms", given.arms]
        command += ["--shots", str(given.shots)]
        command += [part for name in given.suite or [] for part in ("--suite", name)]
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        subprocess.run(command, env=environment, check=True, cwd=ROOT)
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return found


def _print_way(way: str, rounds: list[dict[str, Any]], ours: list[dict[str, Any]]) -> None:
    print(f"\n{way}")
    items, reference = rounds[0]["items"], ours[0]["items"]
    for key in sorted(rounds[0]["costs"]):
        costs = [Cost(**each["costs"][key]) for each in rounds]
        cost = costs[0]
        cost.seconds = statistics.median(each.seconds for each in costs)
        line = f"{key:34} " + _numbers(cost)
        mine = [Cost(**each["costs"][key]) for each in ours if key in each["costs"]]
        if mine and way != "ours":
            pairs = zip(costs, mine, strict=True)
            ratio = statistics.median(each.seconds / max(own.seconds, 1e-9) for each, own in pairs)
            line += f"   x {cost.tokens / max(mine[0].tokens, 1):.2f} tokens, x {ratio:.2f} CPU"
            line += "; " + _describe_difference(items[key], reference[key])
        print(line)


def _describe_difference(theirs: list[Any], ours: list[Any]) -> str:
    """Say how items' numbers and answers differ; an item is [numbers, answer]."""
    pairs = list(zip(theirs, ours, strict=True))
    largest = max(
        (abs(a - b) for one, two in pairs for a, b in zip(one[0], two[0], strict=True)), default=0.0
    )
    same = sum(one[1] == two[1] for one, two in pairs)
    return f"{same} of {len(pairs)} answers the same, numbers within {largest:.2g}"


def child(given: argparse.Namespace) -> None:
    """Score in this process, by the llmtune that is imported here, and write down the result."""
    import logging

    from llmtune.evaluation.run import evaluate_arms
    from llmtune.evaluation.suite import load_suite
    from llmtune.runs.targets import resolve_target

    logging.disable(logging.WARNING)
    load_target = _find_loader()
    target = resolve_target(given.run, [])
    names = given.suite or target.config.evaluate.suites
    suites = [
        with_shots(load_suite(name, seed=0, limit=given.limit + given.shots), given)
        for name in names
    ]
    costs: dict[str, dict[str, Any]] = {}
    items: dict[str, list[Any]] = {}
    loaded: dict[str, Any] = {}
    for arm in given.arms.split(","):
        name = "tuned" if arm == "base" else arm
        live = loaded.setdefault(name, load_target(target, name))
        for suite in suites:
            key = f"{arm}, {suite.name}"
            counted: defaultdict[tuple[str, str, str], Cost] = defaultdict(Cost)
            started = time.process_time()
            with counting(counted):
                if given.way == "lm-eval":
                    items[key] = _score_by_harness(live, suite)
                else:
                    result = evaluate_arms(live, [suite], arms=[arm])[suite.name][arm]
                    items[key] = [_item(each) for each in result.items]
            total = Cost(seconds=time.process_time() - started)
            for each in counted.values():
                total.passes, total.tokens = total.passes + each.passes, total.tokens + each.tokens
                total.head += each.head
            costs[key] = asdict(total)
    Path(given.out).write_text(json.dumps({"costs": costs, "items": items}), encoding="utf-8")


def with_shots(suite: Any, given: argparse.Namespace) -> Any:
    """Put the first items of a choice suite with raw prompts, solved, before each of the others."""
    if not given.shots:
        return suite
    solved, asked = suite.items[: given.shots], suite.items[given.shots :]
    lead = "".join(f"{item.prompt} {item.choices[item.answer]}\n\n" for item in solved)
    return replace(suite, items=tuple(replace(item, prompt=lead + item.prompt) for item in asked))


def _find_loader() -> Any:
    """Return `load_target` from its room, which is a different one in older versions."""
    for room in ("scoring", "serving"):
        try:
            return importlib.import_module(f"llmtune.{room}.live").load_target
        except (ModuleNotFoundError, AttributeError):
            continue
    raise SystemExit("this version of llmtune has no load_target")


def _item(item: Any) -> list[Any]:
    numbers = item.details.get("log_likelihoods") or [item.score]
    written = item.details.get("written") or {}
    return [numbers, [item.prediction, written.get("text")]]


def _score_by_harness(live: Any, suite: Any) -> list[Any]:
    """Ask lm-evaluation-harness' backend for the choices of a suite that has raw prompts."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    backend = HFLM(pretrained=live.model, tokenizer=live.tokenizer, batch_size=8)
    pairs = [(item.prompt, " " + choice) for item in suite.items for choice in item.choices]
    instances = [
        Instance("loglikelihood", {}, (context, choice), place)
        for place, (context, choice) in enumerate(pairs)
    ]
    values = iter(backend.loglikelihood(instances, disable_tqdm=True))
    items = []
    for item in suite.items:
        likelihoods = [next(values)[0] for _ in item.choices]
        answer = item.choices[likelihoods.index(max(likelihoods))]
        items.append([likelihoods, [answer, None]])
    return items


def main() -> None:
    """Read the command line."""
    if sys.argv[1:2] == ["count"]:
        count(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    kinds.add_parser("count", help="Run an llmtune command and count its forward tokens.")
    both = argparse.ArgumentParser(add_help=False)
    both.add_argument("--limit", type=int, default=40, help="Items of each suite at most.")
    both.add_argument("--shots", type=int, default=0, help="Solved items before each prompt.")
    both.add_argument("--arms", default="base,tuned", help="Of base, tuned, merged.")
    both.add_argument("--suite", action="append", help="A suite by file or name; else the run's.")
    ask = kinds.add_parser("compare", parents=[both], help="Score a run's suites in turns.")
    ask.add_argument("run")
    ask.add_argument("--against", metavar="CHECKOUT", help="A directory with another version.")
    ask.add_argument("--lm-eval", action="store_true", help="lm-evaluation-harness' own backend.")
    ask.add_argument("--rounds", type=int, default=2)
    apart = kinds.add_parser("child", parents=[both])
    apart.add_argument("way")
    apart.add_argument("run")
    apart.add_argument("out")
    given = parser.parse_args()
    child(given) if given.kind == "child" else compare(given)


if __name__ == "__main__":
    main()
