"""The verdict by hand: paired differences, 1.96 standard errors, and the verdict's conditions."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from recompute_verdict import compare, holds, why_not


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
