"""The verdict by hand: paired differences, 1.96 standard errors, and the verdict's conditions."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from recompute_verdict import compare, holds, recompute, why_not

from llmtune.cli import run_command
from tests.conftest import write_jsonl
from tests.project import make_project


def test_a_difference_and_its_interval_are_those_of_the_paired_items():
    found = compare([0, 0, 1, 1], [1, 0, 1, 1], [1.0] * 4)
    assert found["mean"] == 0.25
    assert (found["low"], found["high"]) == pytest.approx((-0.24, 0.74))
    weighted = compare([2.0, 3.0], [2.1, 3.3], [3.0, 1.0])
    assert weighted["mean"] == pytest.approx(0.15)


def test_a_target_must_be_above_zero_and_a_general_suite_within_its_bound():
    target = {"role": "target", "metric": "accuracy", "higher_is_better": True}
    general = target | {"role": "general"}
    prose = {"role": "general", "metric": "nats_per_token", "higher_is_better": False}
    assert holds(target, {"low": 0.01, "high": 0.3}) is True
    assert holds(target, {"low": -0.01, "high": 0.3}) is False
    assert holds(general, {"low": -0.04, "high": 0.01}) is True
    assert holds(general, {"low": -0.06, "high": 0.01}) is False
    assert holds(prose, {"low": -0.3, "high": 0.19}) is True
    assert holds(prose, {"low": 0.1, "high": 0.21}) is False
    assert holds(target | {"role": "transfer"}, {"low": -1.0, "high": 1.0}) is None


def test_what_is_not_recomputed_is_said():
    ours = {"metric": "accuracy", "compared": ["original", "merged"]}
    suite = {"task": "choice", "items": "items.jsonl"}
    assert why_not(suite, ours) is None
    assert "not recomputed" in why_not(suite | {"task": "exact"}, ours)
    assert "JSON lines" in why_not(suite | {"items": "items.csv"}, ours)
    assert "not compared" in why_not(suite, ours | {"compared": None})


def test_every_suite_of_a_run_is_scored_again_item_by_item(tmp_path):
    path = make_project(tmp_path)
    config = json.loads(path.read_text())
    chats = [{"id": f"c{n}", "prompt": f"Is film {n} warm?"} for n in range(3)]
    write_jsonl(tmp_path / "chats.jsonl", chats)
    raw = [
        {"id": f"r{n}", "q": f"The {n} dogs are", "options": ["lazy", "quick"], "answer": n % 2}
        for n in range(4)
    ]
    write_jsonl(tmp_path / "raw.jsonl", raw)
    chat = {"task": "chat", "role": "general", "items": "chats.jsonl", "max_new_tokens": 6}
    choice = {"task": "choice", "role": "general", "items": "raw.jsonl", "prompt": "{{ q }}"}
    more = {"talk": chat, "facts": choice | {"choices_field": "options", "chat": False}}
    for name, suite in more.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps(suite))
    config["evaluate"]["suites"] += [str(tmp_path / f"{name}.yaml") for name in more]
    path.write_text(json.dumps(config))
    short = ["train.max_steps=1", "evaluate.extent=none", "--quiet"]
    assert run_command(["run", str(path), *short]) == 0
    found = {each.name: each for each in recompute(tmp_path / "run", None, None)}
    assert found.keys() == {"sentiment", "prose", "talk", "facts"}
    for each in found.values():
        # The run rounds to bfloat16.
        assert each.num_same == 2 * each.n and each.distance < 0.05, each.as_row()
        assert each.found["mean"] == pytest.approx(each.kept_mean, abs=0.02)
        assert each.kept_mean == pytest.approx(each.ours["difference"], abs=1e-6)
    [limited] = recompute(tmp_path / "run", ["prose"], 2)
    assert limited.n == 2 and limited.holds is None
