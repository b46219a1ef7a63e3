"""Numbers are written with their unit, and never with more sign or digits than they have."""

import math

import pytest

from llmtune.evaluation.tasks.config import METRICS
from llmtune.io.manifest import Manifest
from llmtune.reporting.facts import list_facts
from llmtune.reporting.numbers import (
    BITS,
    FRACTION,
    LOSS_UNITS,
    NATS,
    finite,
    format_bytes,
    format_count,
    format_number,
    format_p,
    format_seconds,
    keep_together,
)
from llmtune.reporting.sections.record import find_fingerprints


@pytest.mark.parametrize("metric", METRICS.values(), ids=lambda metric: metric.name)
def test_every_loss_has_a_unit_and_every_score_is_percent(metric):
    assert (metric.name in LOSS_UNITS) == (not metric.higher_is_better)


def test_scores_and_differences():
    assert FRACTION.score(0.8973) == "89.7 %"
    assert FRACTION.difference(0.1638) == "+16.4 points"
    assert FRACTION.difference(-0.0004) == "0.0 points"
    assert NATS.difference(-0.0213) == "\N{MINUS SIGN}0.021 nats/token"
    assert FRACTION.interval(-0.01, 0.02) == "[\N{MINUS SIGN}1.0, +2.0]"
    assert BITS.bound(0.07) == "0.07 bits/byte"
    assert FRACTION.score(None) == "\N{EN DASH}"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (59.4, "59 s"), (59.7, "60 s"), (60, "1 min 0 s"),
     (3599.6, "1 h 0 min"), (7384, "2 h 3 min")],
)  # fmt: skip
def test_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_bytes_counts_and_probabilities():
    assert format_bytes(512) == "512 B"
    assert format_bytes(3.7 * 2**30) == "3.7 GiB"
    assert format_bytes(5 * 2**50) == "5120.0 TiB"
    assert format_count(12345) == "12\N{NARROW NO-BREAK SPACE}345"
    assert format_p(0.0002) == "< 0.001"
    assert format_p(1.0) == "1.000"
    assert format_number(-2.1e-7) == "\N{MINUS SIGN}2.1e-07"


def test_only_finite_numbers_count():
    assert finite(3) == 3.0
    assert [finite(value) for value in (math.nan, math.inf, True, "3", None)] == [None] * 5


def test_facts_are_flat_and_read_as_words():
    value = {
        "kl": 2e-7,
        "check": {"top1_agreement": 0.999, "sizes": [1, 2]},
        "peak_bytes": 1024,
        "is_exact": True,
        "absent": None,
        "rows": [{"a": 1}],
        "base_fingerprint": "abc",
    }
    facts = {fact.label: fact.value for fact in list_facts(value)}
    assert facts == {
        "KL": "2e-07",
        "check: top-1 agreement": "99.9 %",
        "check: sizes": "1, 2",
        "peak": "1.0 KiB",
        "is exact": "yes",
    }


def test_fingerprints_are_found_at_any_depth():
    value = {"check": {"divergences": [{"margin": 0.1}], "data_hash": "abc"}, "empty": []}
    manifest = Manifest(config={}, data={"rows": value})
    assert find_fingerprints(manifest) == {"data.rows.check.data_hash": "abc"}


def test_no_line_ends_between_a_number_and_its_unit():
    said = keep_together("70.0 % → 88.0 %, +18.0 points [+13.0, +23.3], n = 300 and on")
    assert said.split(" ") == [
        "70.0\N{NO-BREAK SPACE}%",
        "→",
        "88.0\N{NO-BREAK SPACE}%,",
        "+18.0\N{NO-BREAK SPACE}points",
        "[+13.0,\N{NO-BREAK SPACE}+23.3],",
        "n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}300",
        "and",
        "on",
    ]
