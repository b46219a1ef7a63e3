"""Scores beside a suite's metric are shown, and said where they contradict it."""

import json
import re
from dataclasses import asdict, replace

import pytest

from llmtune.cli import run_command
from llmtune.evaluation.classification import describe_calibration, describe_classes
from llmtune.reporting.beside import find_disagreements, tabulate_beside
from llmtune.reporting.sections.results import show_results
from llmtune.reporting.suites import ArmScore, Change, SuiteReport, Thresholds
from llmtune.reporting.verdict.evidence import Evidence
from llmtune.reporting.verdict.rules import decide
from tests.reporting.planted import PlantedSuite, plant_run, right_wrong


def make_suite(base, tuned, *, task="choice", metric="accuracy", difference=0.3):
    return SuiteReport(
        name="labels",
        role="target",
        task=task,
        metric=metric,
        higher_is_better=True,
        n=100,
        arms={"base": ArmScore(0.2, also=base), "tuned": ArmScore(0.5, also=tuned)},
        compared=("base", "tuned"),
        change=Change(difference, difference - 0.1, difference + 0.1, 0.001),
    )


def test_a_gain_that_only_one_of_two_scores_shows_is_said():
    suite = make_suite({"written_accuracy": 0.01}, {"written_accuracy": 0.07})
    [found] = find_disagreements(suite)
    assert (found.name, round(found.beside, 2)) == ("written_accuracy", 0.06)
    assert "+30.0 points, the written answer by +6.0 points" in found.sentence
    assert tabulate_beside(suite).sentences == (found.sentence,)


def test_scores_that_agree_say_nothing():
    suite = make_suite({"written_accuracy": 0.2}, {"written_accuracy": 0.45})
    assert find_disagreements(suite) == ()
    assert find_disagreements(make_suite({}, {})) == ()


def test_a_gain_of_format_alone_is_called_that():
    suite = make_suite(
        {"strict": 0.0, "lenient": 0.68},
        {"strict": 0.7, "lenient": 0.7},
        task="exact",
        metric="exact_match",
        difference=0.7,
    )
    [found] = find_disagreements(suite)
    assert "gains is format" in found.sentence
    # The suite's own score finds answers in the text: no more of them are right.
    found_there = replace(suite, metric="contains", change=Change(0.02, -0.04, 0.08, 0.5))
    [found] = find_disagreements(found_there)
    assert "format-only gain: the whole answer is right in +70.0 points" in found.sentence
    assert "+2.0 points [−4.0, +8.0]" in found.sentence
    assert decide(Evidence((found_there,))).name == "INCONCLUSIVE"


@pytest.mark.parametrize("lenient", [None, Change(-0.2, -0.4, 0.0, 0.05)])
def test_whole_answers_that_were_lost_are_no_gain_of_format(lenient):
    arms = ({"strict": 0.5, "lenient": 0.7}, {"strict": 0.45, "lenient": 0.5})
    suite = make_suite(*arms, task="exact", metric="exact_match", difference=-0.05)
    assert find_disagreements(replace(suite, lenient=lenient)) == ()


@pytest.mark.parametrize(
    ("lenient", "verdict"),
    [
        (0.87, "NEGATIVE"),
        (0.33, "SHIP, general not shown"),  # format alone
        (0.36, "SHIP, general not shown"),  # not clear of chance
        (None, "SHIP, general not shown"),  # the suite's own score is not that of whole answers
    ],
)
def test_a_form_learned_at_the_cost_of_right_answers_does_not_ship(
    tmp_path, capsys, lenient, verdict
):
    strict = {"original": [0.0] * 300, "merged": right_wrong(300, 0.33, seed=1)}
    holds = {"original": right_wrong(300, lenient or 0.87, seed=2), "merged": strict["merged"]}
    suite = PlantedSuite("words", "target", strict, metric="exact_match", lenient=holds)
    run = plant_run(tmp_path / "run", [suite])
    if lenient is None:
        for path in run.evaluations_dir.glob("*.json"):
            result = json.loads(path.read_text())
            for item in result["items"]:
                item["details"]["strict"] = 0.0  # what `extract` found is right
            path.write_text(json.dumps(result))
    assert run_command(["report", str(run.path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"] == verdict
    said = " ".join(report["decided_by"]["reasons"]) + report["decided_by"]["to_do"]
    is_lost = verdict == "NEGATIVE"
    assert ("54.0 points fewer answers hold the right one" in said) == is_lost
    assert ("`extract`" in said and "fewer steps" in said) == is_lost
    assert not (is_lost and any("SHIP" in name for name in report["decided_by"]["also"]))
    change = report["suites"]["words"]["lenient"]
    assert (change is None) == (lenient is None)


@pytest.mark.parametrize(
    ("change", "verdict", "carried"),
    [
        (Change(-0.10, -0.13, -0.07, 0.001), "NEGATIVE", None),
        (Change(-0.03, -0.045, -0.015, 0.001), "SHIP", "whole answers as they are written only"),
        (Change(-0.01, -0.04, 0.02, 0.5), "SHIP", "one of format only"),
        (Change(0.2, 0.15, 0.25, 0.001), "SHIP", "much of the gain on labels is format"),
        (Change(0.6, 0.5, 0.7, 0.001), "SHIP", None),
    ],
)
def test_a_headline_to_ship_says_for_which_use_a_gain_of_whole_answers_holds(
    change, verdict, carried
):
    """How much the form gained excuses no loss of right answers beyond a general suite's bound."""
    arms = ({"strict": 0.0, "lenient": 0.3}, {"strict": 0.6, "lenient": 0.3 + change.difference})
    suite = make_suite(*arms, task="exact", metric="exact_match", difference=0.6)
    found = decide(Evidence((replace(suite, lenient=change),)))
    assert found.name.split(",")[0] == verdict
    said = [each for each in found.carries if "labels" in each]
    assert len(said) == (carried is not None) and (carried or "") in "".join(said)
    is_for_form = carried is not None and not carried.startswith("much")
    assert ("first see what that scores without tuning" in found.to_do) == is_for_form
    if said:
        assert suite.unit.interval(change.low, change.high) in found.headline


def test_one_suite_that_lost_right_answers_keeps_the_others_from_shipping():
    lost = replace(
        make_suite({}, {}, task="exact", metric="exact_match"),
        lenient=Change(-0.5, -0.6, -0.4, 0.001),
    )
    gained = replace(make_suite({}, {}), name="second")
    assert decide(Evidence((gained, lost))).name == "NEGATIVE"
    unclear = replace(lost, lenient=Change(-0.2, -0.41, 0.01, 0.06))
    assert decide(Evidence((gained, unclear))).name.startswith("SHIP")


def test_the_table_has_a_column_for_every_arm_and_rows_of_what_was_measured():
    table = tabulate_beside(make_suite({"macro_f1": 0.2, "brier": None}, {"macro_f1": 0.4}))
    assert table.arms == ("base", "tuned")
    assert table.rows == (("Macro-F1", (0.2, 0.4)),)
    assert tabulate_beside(make_suite({}, {})) is None


def test_a_verdict_says_for_which_use_it_holds():
    parted = make_suite({"written_accuracy": 0.01}, {"written_accuracy": 0.07})
    verdict = decide(Evidence((parted,)))
    assert verdict.name.startswith("SHIP")
    expected = (
        "on labels it holds for ranking the choices (+30.0 points); "
        "written answers change by +6.0 points"
    )
    assert expected in verdict.carries and expected in verdict.headline
    for after in (0.48, 0.95):  # the same, or what is written gains even more
        suite = make_suite({"written_accuracy": 0.2}, {"written_accuracy": after})
        assert not any("ranking" in each for each in decide(Evidence((suite,))).carries)


def test_confusion_and_reliability_are_drawn_from_the_numbers():
    pairs = [("good", "good")] * 7 + [("bad", "good")] * 2 + [("bad", "bad")] * 3 + [("bad", "")]
    also = asdict(describe_classes(pairs, ["good", "bad <b>"]))
    also |= asdict(describe_classes(pairs, ["good", "bad"]))
    also |= asdict(describe_calibration([[0.9, 0.1], [0.4, 0.6], [0.95, 0.05]], [0, 0, 0]))
    suite = make_suite(also, also)
    shown = show_results([suite], Thresholds())
    confusion, reliability = shown["pictures"]
    numbers = re.findall(r">(\d+)</text>", confusion.drawn)
    assert sorted(numbers) == ["1", "2", "3", "7"]
    assert all(label in confusion.drawn for label in ("good", "bad", "none", "given", "right"))
    assert "10 of 13 are on the diagonal" in confusion.caption
    assert "base" in reliability.drawn and "tuned" in reliability.drawn
    assert "Mean distance from it" in reliability.caption
    assert show_results([make_suite({}, {})], Thresholds())["pictures"] == []
