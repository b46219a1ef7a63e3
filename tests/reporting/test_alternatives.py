"""Planted runs in which something else than tuning was as good, or a strength saves it."""

import re
from dataclasses import replace
from statistics import mean

import pytest

from llmtune.evaluation.diagnosis.base import write_diagnostic
from llmtune.evaluation.diagnosis.contamination import ContaminationResult, SuiteContamination
from llmtune.evaluation.halves import in_selection_half
from llmtune.reporting.build import build_report, write_report
from llmtune.reporting.html import render_html
from llmtune.reporting.verdict.outcome import MEANINGS
from tests.reporting.full import plant_curve, plant_full_run
from tests.reporting.planted import (
    PlantedSuite,
    improve,
    item_ids,
    plant_run,
    right_wrong,
    worsen,
)

N = 300
BASE = right_wrong(N, 0.6, seed=0)
TUNED = improve(BASE, 0.2, seed=1)
SLIGHTLY = improve(BASE, 0.01, seed=2)


def report_on(path, arms, *others, **fields):
    """Return the report of a run with one target suite with these arms, and other suites."""
    movies = PlantedSuite("movies", "target", {"base": BASE, **arms}, **fields)
    return build_report(plant_run(path, [movies, *others]))


def prose(full: float, half: float | None = None) -> PlantedSuite:
    """Return a general suite that rises by `full` nats, and by `half` at strength 0.5."""
    base = [3.0 + index % 13 / 10 for index in range(120)]
    arms = {"base": base, "tuned": [score + full + i % 3 / 100 for i, score in enumerate(base)]}
    if half is not None:
        arms["strength-0.5"] = [score + half + i % 3 / 100 for i, score in enumerate(base)]
    return PlantedSuite("prose", "general", arms, metric="nats_per_token")


def test_few_shot_that_ties_with_tuning_is_use_prompt(tmp_path):
    draws = {f"few-shot-{draw}": improve(BASE, 0.2, seed=10 + draw) for draw in (1, 2, 3)}
    report = report_on(tmp_path, {"tuned": TUNED, **draws})
    assert report.verdict.name == "USE-PROMPT"
    rival = report.verdict.numbers["movies"]["few-shot"]
    assert rival["tuned_over"]["low"] <= 0 < rival["over_base"]["low"]
    assert "mean of 3 draws" in report.verdict.reasons[0]
    assert "can show" in report.verdict.reasons[0]
    assert "SHIP, general not shown" in report.verdict.also


def test_a_prompt_of_ones_own_that_ties_is_use_prompt(tmp_path):
    report = report_on(tmp_path, {"tuned": TUNED, "prompt-long": improve(BASE, 0.21, seed=3)})
    assert report.verdict.name == "USE-PROMPT"
    assert list(report.verdict.numbers["movies"]) == ["prompt-long"]


def test_tuning_that_beats_every_prompt_ships(tmp_path):
    arms = {"tuned": TUNED, "few-shot-1": improve(BASE, 0.05, seed=4), "prompt-x": SLIGHTLY}
    assert report_on(tmp_path, arms, prose(0.01)).verdict.name == "SHIP"


def test_a_prompt_that_may_be_far_behind_is_no_rival_but_is_named(tmp_path):
    """Two answers worse of 40, so the items cannot tell it from ten points."""
    base = right_wrong(40, 0.5, seed=0)
    tuned = improve(base, 0.4, seed=1)
    arms = {"base": base, "tuned": tuned, "prompt-x": worsen(tuned, 0.05, seed=2)}
    report = build_report(plant_run(tmp_path, [PlantedSuite("movies", "target", arms)]))
    assert report.verdict.name == "SHIP, general not shown"
    assert any("not shown to beat Own prompt x" in caveat for caveat in report.caveats)


def test_near_copies_and_shared_words_block_like_exact_ones(tmp_path):
    run = plant_run(tmp_path, [PlantedSuite("movies", "target", {"base": BASE, "tuned": TUNED})])
    leaked = SuiteContamination(0, 2, 2, N, tuple(item_ids("movies", 4)))
    result = ContaminationResult(inputs={}, suites={"movies": leaked}, n_train_rows=900)
    write_diagnostic(result, run.diagnostics_dir)
    verdict = build_report(run).verdict
    assert verdict.name == "CONTAMINATED"
    assert "0 word for word, 2 nearly, 2 with many words in a row" in verdict.reasons[0]


def test_a_prompt_that_is_no_better_than_the_bare_base_is_not_advised(tmp_path):
    report = report_on(tmp_path, {"tuned": SLIGHTLY, "few-shot-1": SLIGHTLY})
    assert report.verdict.name == "INCONCLUSIVE"


def test_the_best_of_many_prompts_is_not_believed_for_being_the_best(tmp_path):
    """Each prompt alone beats the base at p = 0.005 or so; among forty that is chance."""
    nearly = worsen(improve(BASE, 0.06, seed=5), 0.015, seed=6)
    one = report_on(tmp_path / "one", {"tuned": nearly, "prompt-0": nearly})
    assert one.verdict.name == "USE-PROMPT"
    many = {f"prompt-{index}": nearly for index in range(40)}
    assert report_on(tmp_path / "many", {"tuned": nearly, **many}).verdict.name != "USE-PROMPT"


def test_a_probe_that_ties_with_tuning_is_use_probe(tmp_path):
    report = report_on(tmp_path, {"tuned": TUNED, "probe": improve(TUNED, 0.01, seed=7)})
    assert report.verdict.name == "USE-PROBE"
    assert "Linear probe on the base 81.0 %" in report.verdict.reasons[0]
    worse = report_on(tmp_path / "w", {"tuned": TUNED, "probe": improve(BASE, 0.1, seed=8)})
    assert worse.verdict.name == "SHIP, general not shown"


def test_train_rows_among_the_target_items_block_the_verdict(tmp_path):
    run = plant_run(tmp_path, [PlantedSuite("movies", "target", {"base": BASE, "tuned": TUNED})])

    def leak(exact: int) -> None:
        leaked = SuiteContamination(exact, 0, 0, N, tuple(item_ids("movies", exact)))
        result = ContaminationResult(inputs={}, suites={"movies": leaked}, n_train_rows=900)
        write_diagnostic(result, run.diagnostics_dir)

    leak(4)
    report = build_report(run)
    assert report.verdict.name == "CONTAMINATED"
    assert report.verdict.numbers["movies"] == {
        "exact": 4,
        "near": 0,
        "ngram": 0,
        "n": 300,
        "bound": 0.01,
    }
    assert report.verdict.also == ("SHIP, general not shown",)
    clean = report.suites[0].clean
    others = BASE[4:], TUNED[4:]
    assert (clean.n, clean.before, clean.after) == (296, *(pytest.approx(mean(o)) for o in others))
    assert f"{100 * mean(others[1]):.1f} %, a change of" in " ".join(report.verdict.reasons)
    leak(3)
    report = build_report(run)
    assert report.verdict.name == "SHIP, general not shown"
    said = next(each for each in report.caveats if "3 of 300 items are in the training" in each)
    shown = [f"{100 * mean(scores):.1f} %" for scores in (BASE[3:], TUNED[3:])]
    assert " → ".join(shown) in said
    assert all(f"→ {score}" in render_html(report) for score in shown)


def test_general_broken_at_full_strength_and_fine_at_half_ships_at_half(tmp_path):
    arms = {"tuned": TUNED, "strength-0.5": worsen(TUNED, 0.01, seed=9), "strength-0.25": BASE}
    report = report_on(tmp_path, arms, prose(0.5, 0.08))
    assert report.verdict.name == "SHIP at strength 0.5"
    assert "BROKE-GENERAL" in report.verdict.also
    choice = report.strengths.choice
    assert choice.strength == report.verdict.numbers["strength"] == 0.5
    held = [not in_selection_half(item) for item in item_ids("movies", N)]
    right = sum(score for score, is_held in zip(arms["strength-0.5"], held, strict=True) if is_held)
    assert choice.held_scores["movies"][1] == pytest.approx(right / sum(held))
    assert choice.held["prose"].difference == pytest.approx(0.09, abs=0.005)
    assert choice.num_held == sum(held) + sum(
        not in_selection_half(item) for item in item_ids("prose", 120)
    )


def test_a_strength_does_not_rescue_a_form_learned_at_the_cost_of_right_answers(tmp_path):
    arms = {"tuned": TUNED, "strength-0.5": worsen(TUNED, 0.01, seed=9), "strength-0.25": BASE}
    lenient = {"base": [1.0] * N, **arms}
    report = report_on(tmp_path, arms, prose(0.5, 0.08), lenient=lenient)
    assert (report.verdict.name, report.verdict.also) == ("NEGATIVE", ("BROKE-GENERAL",))


def test_a_strength_that_loses_the_gain_does_not_rescue(tmp_path):
    report = report_on(tmp_path, {"tuned": TUNED, "strength-0.5": SLIGHTLY}, prose(0.5, 0.08))
    assert report.verdict.name == "BROKE-GENERAL"
    assert report.strengths.choice is None


def test_a_strength_chosen_by_luck_must_pass_on_the_other_half(tmp_path):
    """On the half that chooses it keeps the gain, on the half that reports it has none."""
    chosen = [in_selection_half(item) for item in item_ids("movies", N)]
    lucky = [t if is_chosen else b for t, b, is_chosen in zip(TUNED, BASE, chosen, strict=True)]
    report = report_on(tmp_path, {"tuned": TUNED, "strength-0.5": lucky}, prose(0.5, 0.08))
    assert report.strengths.choice is not None and not report.strengths.choice.keeps_target
    assert report.verdict.name == "BROKE-GENERAL"


def test_items_of_a_cluster_all_choose_a_strength_or_none_does(tmp_path):
    clusters = [f"text-{place // 10}" for place in range(N)]
    arms = {"tuned": TUNED, "strength-0.5": worsen(TUNED, 0.01, seed=9)}
    choice = report_on(tmp_path, arms, prose(0.5, 0.08), clusters=clusters).strengths.choice
    held = sum(not in_selection_half(name) for name in clusters)
    prose_held = sum(not in_selection_half(item) for item in item_ids("prose", 120))
    assert held % 10 == 0 and choice.num_held == held + prose_held


def test_a_strength_whose_forgetting_was_not_measured_does_not_rescue(tmp_path):
    report = report_on(tmp_path, {"tuned": TUNED, "strength-0.5": TUNED}, prose(0.5))
    assert report.verdict.name == "BROKE-GENERAL"


def test_full_strength_that_forgets_little_is_shipped_as_it_is(tmp_path):
    report = report_on(tmp_path, {"tuned": TUNED, "strength-0.5": TUNED}, prose(0.03, 0.01))
    assert report.verdict.name == "SHIP"
    assert any(each.startswith("Strength 0.5 keeps the target") for each in report.caveats)


def test_no_gain_yet_with_a_falling_learning_curve_is_more_data(tmp_path):
    run = plant_run(tmp_path, [PlantedSuite("movies", "target", {"base": BASE, "tuned": SLIGHTLY})])
    write_diagnostic(plant_curve(gain=(0.02, 0.09)), run.diagnostics_dir)
    verdict = build_report(run).verdict
    assert verdict.name == "MORE-DATA" and verdict.also == ("INCONCLUSIVE",)
    assert verdict.numbers["learning_curve"]["rows"] == 1920
    write_diagnostic(plant_curve(gain=(-0.01, 0.09)), run.diagnostics_dir)
    assert build_report(run).verdict.name == "INCONCLUSIVE"
    refused = replace(plant_curve(gain=(0.02, 0.09)), refused="too few points")
    write_diagnostic(refused, run.diagnostics_dir)
    assert build_report(run).verdict.name == "INCONCLUSIVE"


def test_a_diagnosis_of_another_adapter_is_not_shown(tmp_path):
    run = plant_run(tmp_path, [PlantedSuite("movies", "target", {"base": BASE, "tuned": TUNED})])
    stale = replace(plant_curve(gain=(0.1, 0.2)), inputs={"adapter": "other"})
    write_diagnostic(stale, run.diagnostics_dir)
    report = build_report(run)
    assert "learning_curve" not in report.diagnostics.found
    assert "learning curve" in [missing.name for missing in report.missing]


def test_few_shot_draws_are_averaged_item_by_item(tmp_path):
    draws = {f"few-shot-{draw}": improve(BASE, draw / 20, seed=draw) for draw in (1, 2)}
    suite = report_on(tmp_path, {"tuned": TUNED, **draws}).suites[0]
    means = [sum(scores) / N for scores in draws.values()]
    assert suite.score("few-shot") == pytest.approx(sum(means) / 2)
    assert list(suite.arms["few-shot"].about["draws"].values()) == pytest.approx(means)


def test_a_stronger_model_says_how_much_of_the_gap_was_closed(tmp_path):
    suite = report_on(tmp_path, {"tuned": TUNED, "other-big": improve(BASE, 0.4, seed=3)}).suites[0]
    assert suite.rivals["other-big"].gap_closed == pytest.approx(0.5)


def test_break_even_follows_the_formula(tmp_path):
    run = plant_full_run(tmp_path)
    paid = build_report(run).cost.break_even
    assert paid.demonstration_tokens == pytest.approx(412)
    assert paid.requests_by_tokens == pytest.approx(2.4 * 60_000 / 412)


def test_the_full_report_says_everything_and_repeats_itself(tmp_path):
    run = plant_full_run(tmp_path)
    report = build_report(run)
    assert report.missing == ()
    write_report(report, run)
    first = [
        p.read_text() for p in (run.report_html_path, run.report_json_path, run.report_md_path)
    ]
    for title in (
        "What else would have done it?",
        "How much of the adapter?",
        "How far the predictions moved",
        "Do answers still end?",
        "How sure of the right answer?",
        "Would more data help?",
        "Did the test leak into the training?",
        "Learned, or learned by heart?",
        "How far apart are the texts?",
        "The linear probe",
        "What it cost",
    ):
        assert title in first[0], title
    assert "| movies | Few-shot, mean of the draws | 69.0 % |" in first[2]
    for term in ("Interval", "p", "nats/token"):
        assert f"<i>{term}</i>: " in first[0], term
    # For those who hear the page: what a table is about, and what a head is the head of.
    tables, captions = (len(re.findall(tag, first[0])) for tag in ("<table", r"<caption>[^<]+<"))
    assert tables == captions > 10
    assert not re.search(r"<th(?![a-z])(?![^>]*scope=)", first[0])
    write_report(build_report(run), run)
    assert first == [
        p.read_text() for p in (run.report_html_path, run.report_json_path, run.report_md_path)
    ]


def test_every_verdict_can_be_reached_and_has_a_meaning(tmp_path):
    """The kinds that the planted truths of this file and of test_verdict give."""
    reached = {
        "SHIP",
        "MERGE-DIFFERENTLY",
        "NEGATIVE",
        "BROKE-GENERAL",
        "INCONCLUSIVE",
        "NOT-MEASURED",
    }
    reached |= {
        "SHIP, general not shown",
        "USE-PROMPT",
        "USE-PROBE",
        "CONTAMINATED",
        "MORE-DATA",
        "SHIP at strength x",
    }
    assert reached == set(MEANINGS)


def test_a_bound_far_beyond_every_strength_is_named_and_not_drawn(tmp_path):
    arms = {"tuned": TUNED, "strength-0.5": worsen(TUNED, 0.01, seed=9)}
    near = render_html(report_on(tmp_path / "near", arms, prose(0.15, 0.08)))
    far = render_html(report_on(tmp_path / "far", arms, prose(0.02, 0.01)))
    assert "the dotted line is the most that may be lost" in near
    assert "the most that may be lost, 0.2 nats/token, is beyond the right edge" in far
