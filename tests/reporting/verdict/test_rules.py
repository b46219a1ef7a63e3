"""Planted numbers give the verdict they stand for, with the numbers that decided it."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from llmtune.reporting.numbers import FRACTION
from llmtune.reporting.suites import ArmScore, Change, SliceReport, SuiteReport, Thresholds
from llmtune.reporting.verdict.caveats import find_caveats
from llmtune.reporting.verdict.evidence import Evidence
from llmtune.reporting.verdict.outcome import MEANINGS, Verdict
from llmtune.reporting.verdict.rules import decide
from llmtune.reporting.verdict.sentences import format_can_show


def suite(
    difference: float,
    half_width: float,
    *,
    name: str = "movies",
    role: str = "target",
    base: float = 0.7,
    **fields: Any,
) -> SuiteReport:
    """Return a suite of 200 items whose interval is symmetric around the difference."""
    is_loss = fields.get("metric") == "nats_per_token"
    p_value = 0.001 if abs(difference) > half_width else 0.4
    low, high = difference - half_width, difference + half_width
    values: dict[str, Any] = {
        "name": name,
        "role": role,
        "task": "perplexity" if is_loss else "choice",
        "metric": "accuracy",
        "higher_is_better": not is_loss,
        "n": 200,
        "arms": {"base": ArmScore(base), "tuned": ArmScore(base + difference)},
        "compared": ("base", "tuned"),
        "change": Change(difference, low, high, p_value, half_width / 1.96),
        "chance": None if is_loss else 0.5,
        "mde": half_width / 1.96 * 2.8,
        "gained": 10,
        "lost": 5,
    }
    return SuiteReport(**(values | fields))


def prose(rise: float, half_width: float = 0.01) -> SuiteReport:
    return suite(rise, half_width, name="prose", role="general", base=3.0, metric="nats_per_token")


def verdict_on(*suites: SuiteReport, **fields: Any) -> Verdict:
    return decide(Evidence(suites, **fields))


def test_gain_clear_of_zero_with_general_intact_ships():
    verdict = verdict_on(suite(0.16, 0.03), suite(0.0, 0.02, name="general", role="general"))
    assert verdict.name == "SHIP"
    assert verdict.numbers["movies"]["difference"] == 0.16
    assert "+16.0 points" in verdict.reasons[0]
    assert "[+13.0, +19.0]" in verdict.reasons[0]


def test_loss_on_the_target_is_negative_whatever_else_holds():
    verdict = verdict_on(suite(-0.1, 0.03), prose(0.9))
    assert verdict.name == "NEGATIVE"
    assert verdict.also == ("BROKE-GENERAL",)


def test_one_target_lost_and_one_gained_is_negative():
    assert verdict_on(suite(0.2, 0.03), suite(-0.1, 0.03, name="second")).name == "NEGATIVE"


def test_general_drop_beyond_the_bound_is_broke_general():
    verdict = verdict_on(suite(0.16, 0.03), suite(-0.08, 0.03, name="general", role="general"))
    assert verdict.name == "BROKE-GENERAL"
    assert list(verdict.numbers) == ["general"]
    assert "5 points" in verdict.reasons[-1]


def test_general_drop_beyond_the_bound_but_not_clear_of_zero_decides_nothing():
    noisy = suite(-0.08, 0.09, name="general", role="general", needed_items=400)
    verdict = verdict_on(suite(0.16, 0.03), noisy)
    assert verdict.name == "INCONCLUSIVE"
    assert "cannot tell whether that is chance. About 400 items" in verdict.reasons[-1]
    caveats = find_caveats(Evidence((suite(0.16, 0.03), noisy)))
    assert any("cannot rule out" in caveat and "17.0 points" in caveat for caveat in caveats)


def test_general_ability_is_within_its_bound_only_if_the_whole_interval_is():
    for drop, half_width, name in (
        (-0.02, 0.02, "SHIP"),
        (-0.02, 0.04, "SHIP, general not shown"),
        (0.0, 0.06, "SHIP, general not shown"),
    ):
        general = suite(drop, half_width, name="general", role="general")
        verdict = verdict_on(suite(0.16, 0.03), general)
        assert verdict.name == name
        assert any("the whole interval is" in each for each in verdict.reasons) == (name == "SHIP")
    assert "general ability not shown: general may have lost 6.0 points" in verdict.headline
    assert "200 items can show" in verdict.headline


def test_headline_names_what_was_not_measured_and_what_to_do():
    verdict = verdict_on(suite(0.16, 0.03))
    assert verdict.headline.startswith("SHIP, general not shown; general ability not measured; ")
    assert "few-shot prompting and a linear probe were not measured" in verdict.headline
    assert "llmtune report RUN --full" in verdict.to_do
    assert verdict.as_json()["headline"] == verdict.headline
    assert verdict_on(suite(-0.1, 0.03)).carries == ()


def test_more_suites_do_not_hide_harm():
    barely = Change(-0.08, -0.159, -0.001, 0.047, 0.04)
    broken = suite(-0.08, 0.079, name="general", role="general", change=barely)
    others = [suite(0.0, 0.02, name=f"other-{place}", role="general") for place in range(5)]
    assert verdict_on(suite(0.16, 0.03), broken, *others).name == "BROKE-GENERAL"
    lost = suite(-0.08, 0.079, name="lost", change=barely)
    assert verdict_on(*(suite(0.16, 0.03, name=f"t{i}") for i in range(5)), lost).name == "NEGATIVE"


def test_below_the_floor_no_gain_is_claimed_and_harm_still_is():
    few = Change(0.5, 0.2, 0.8, 0.001, 0.1, is_enough=False)
    verdict = verdict_on(suite(0.5, 0.3, n=10, change=few))
    assert verdict.name == "INCONCLUSIVE"
    assert any("10 items, of 20 in 8 that are the least" in each for each in verdict.reasons)
    harm = Change(-0.5, -0.8, -0.2, 0.001, 0.1, is_enough=False)
    few_general = suite(-0.5, 0.3, n=10, change=harm, name="general", role="general")
    assert verdict_on(suite(0.16, 0.03), few_general).name == "BROKE-GENERAL"
    intact = Change(0.0, -0.01, 0.01, 0.9, 0.01, is_enough=False)
    tiny = suite(0.0, 0.01, n=10, change=intact, name="general", role="general")
    assert verdict_on(suite(0.16, 0.03), tiny).name == "SHIP, general not shown"


def test_a_gain_with_a_long_tail_of_harm_needs_a_smaller_p_value():
    for p_value, tail, name in (
        (0.03, 1.6, "INCONCLUSIVE"),
        (0.01, 1.6, "SHIP, general not shown"),
        (0.03, 0.2, "SHIP, general not shown"),
    ):
        change = Change(-0.2, -0.38, -0.02, p_value, 0.09, harm_tail=tail)
        prose = suite(-0.2, 0.18, base=3.0, metric="nats_per_token", change=change)
        verdict = verdict_on(prose)
        assert verdict.name == name
        assert any("skewness 1.6" in each for each in verdict.reasons) == (name == "INCONCLUSIVE")


def test_an_item_alone_can_show_nothing():
    assert format_can_show(1, 2.8, FRACTION) == "1 item cannot show any difference"
    assert format_can_show(200, 0.05, FRACTION) == "200 items can show 5.0 points or more"


def test_loss_rise_beyond_a_fifth_of_a_nat_is_broke_general():
    assert verdict_on(suite(0.16, 0.03), prose(0.21)).name == "BROKE-GENERAL"
    assert verdict_on(suite(0.16, 0.03), prose(0.19)).name == "SHIP"
    assert verdict_on(suite(0.16, 0.03), prose(-0.5)).name == "SHIP"


def test_the_bound_is_the_callers():
    strict = Thresholds(general_loss_rise=0.1)
    assert verdict_on(suite(0.16, 0.03), prose(0.19), thresholds=strict).name == "BROKE-GENERAL"


def test_interval_that_spans_zero_is_inconclusive_and_says_how_many_items_would_decide():
    verdict = verdict_on(suite(0.02, 0.05, needed_items=2551))
    assert verdict.name == "INCONCLUSIVE"
    assert verdict.numbers["movies"]["needed_items"] == 2551
    assert "2\N{NARROW NO-BREAK SPACE}551 items would decide" in verdict.reasons[1]


def test_identical_models_are_inconclusive_and_no_number_of_items_is_named():
    same = suite(0.0, 0.0, gained=0, lost=0, needed_items=None)
    verdict = verdict_on(same)
    assert verdict.name == "INCONCLUSIVE"
    assert "No item of movies changed its score." in verdict.reasons


def test_gain_that_stays_below_the_majority_class_does_not_ship():
    verdict = verdict_on(suite(0.16, 0.03, base=0.5, majority=0.75))
    assert verdict.name == "INCONCLUSIVE"
    assert "75.0 %" in verdict.reasons[1]


def test_barely_clear_gain_does_not_survive_holm_over_many_targets():
    barely = Change(0.05, 0.001, 0.099, 0.04, 0.025)
    targets = [suite(0.05, 0.05, name="first", change=barely)]
    assert verdict_on(*targets).name == "SHIP, general not shown"
    targets += [suite(0.0, 0.05, name=f"other-{index}") for index in range(3)]
    verdict = verdict_on(*targets)
    assert verdict.name == "INCONCLUSIVE"
    assert any("after Holm" in reason for reason in verdict.reasons)


@pytest.mark.parametrize("suites", [(), (suite(0.1, 0.01, role="transfer"),)])
def test_without_a_compared_target_nothing_is_claimed(suites):
    verdict = verdict_on(*suites)
    assert verdict.name == "NOT-MEASURED"
    assert verdict.numbers == {}


def part(difference: float, half_width: float = 0.01) -> Change:
    p_value = 0.001 if abs(difference) > half_width else 0.4
    return Change(difference, difference - half_width, difference + half_width, p_value, 0.005)


@pytest.mark.parametrize(
    ("merge_base", "advice"),
    [
        ("original", "merge.base=dequantized"),
        ("dequantized", "merge.base=original"),
        (None, "without merging"),
    ],
)
def test_a_merged_model_that_lost_the_gain_is_to_be_merged_differently(merge_base, advice):
    lost = suite(0.1, 0.03, chain={"training": part(0.4), "merging": part(-0.3)})
    verdict = verdict_on(lost, merge_base=merge_base)
    assert verdict.name == "MERGE-DIFFERENTLY"
    assert advice in verdict.reasons[-1]
    assert verdict.numbers["movies"]["difference"] == -0.3


def test_what_merging_broke_in_general_is_not_blamed_on_training():
    broken = dataclasses.replace(prose(0.3), chain={"training": part(0.02), "merging": part(0.28)})
    assert verdict_on(suite(0.16, 0.03), broken).name == "MERGE-DIFFERENTLY"


def test_a_small_loss_in_merging_ships_with_a_caveat():
    fine = suite(0.35, 0.03, chain={"training": part(0.4), "merging": part(-0.05)})
    assert verdict_on(fine, prose(0.01)).name == "SHIP"
    assert any("merged model is worse" in each for each in find_caveats(Evidence((fine,))))


def test_every_verdict_is_explained_in_the_documentation():
    page = (Path(__file__).parents[3] / "docs" / "report.md").read_text(encoding="utf-8")
    for name in MEANINGS:
        assert f"| `{name}` |" in page


def test_caveats_name_what_the_verdict_does_not():
    lost = SliceReport("topic", "war", 40, 0.8, 0.6, Change(-0.2, -0.3, -0.1, 0.001, 0.05), 0.004)
    target = suite(0.16, 0.03, slices=(lost,))
    target = dataclasses.replace(
        target,
        arms={**target.arms, "merged": ArmScore(0.8, unparseable=20)},
        chain={"merging": Change(-0.06, -0.08, -0.04, 0.001, 0.01)},
    )
    worse_domain = suite(-0.1, 0.03, name="tweets", role="transfer")
    caveats = " ".join(find_caveats(Evidence((target, worse_domain))))
    for part in ("topic = war", "merged model is worse", "tweets", "not measured", "10.0 % of"):
        assert part in caveats


def test_no_caveats_where_nothing_is_amiss():
    fine = suite(0.01, 0.02, name="general", role="general")
    assert find_caveats(Evidence((suite(0.16, 0.03), fine))) == ()


GENERAL: dict[str, Any] = {"name": "general", "role": "general"}


def test_what_nothing_can_be_lost_of_shows_no_general_ability():
    at_chance = suite(0.0, 0.02, base=0.27, chance=0.25, **GENERAL)
    verdict = verdict_on(suite(0.16, 0.03), at_chance)
    assert verdict.name == "SHIP, general not shown"
    assert "there was next to nothing to lose (27.0 % before, and guessing" in verdict.headline
    above = suite(0.0, 0.02, base=0.31, chance=0.25, **GENERAL)
    assert verdict_on(suite(0.16, 0.03), above).name == "SHIP"


def test_a_verdict_to_ship_names_the_arms_that_were_not_measured():
    def arms(*names: str) -> dict[str, ArmScore]:
        return {name: ArmScore(0.7) for name in names}

    both = ("original", "merged")
    whole: dict[str, Any] = {"arms": arms(*both), "compared": both}
    general = suite(0.0, 0.02, **GENERAL)
    target = suite(0.16, 0.03, **whole)
    headline = verdict_on(target, general, merge_base="original").headline
    assert "against the quantized base on general: the original was not measured" in headline
    assert "the merged model was not measured on general" in headline
    headline = verdict_on(
        target, dataclasses.replace(general, **whole), merge_base="original"
    ).headline
    assert "quantized base" not in headline and "merged" not in headline
    alone = verdict_on(suite(0.16, 0.03), general, merge_base="original").headline
    assert "against the quantized base: the original" in alone and "merged" not in alone
    assert "quantized" not in verdict_on(suite(0.16, 0.03), general).headline


def test_a_verdict_to_ship_names_abilities_that_nobody_asked_about_or_that_are_given_up():
    general = suite(0.0, 0.02, **GENERAL)
    headline = verdict_on(suite(0.16, 0.03), general).headline
    assert "reading of text and open chat not measured" in headline
    only = verdict_on(suite(0.16, 0.03), general, keep=("knowledge",)).headline
    assert "open chat" not in only
    unasked = verdict_on(suite(0.16, 0.03), prose(0.0), keep=("knowledge",))
    assert unasked.name == "SHIP, general not shown"
    assert "general knowledge not measured" in unasked.headline
    gone = verdict_on(suite(0.16, 0.03), general, prose(0.9), keep=("knowledge",))
    assert gone.name == "SHIP" and "for this task only: reading of text is gone" in gone.headline


def test_a_verdict_to_ship_names_a_target_measured_lower_and_a_low_confidence():
    second = suite(-0.04, 0.05, name="second")
    verdict = verdict_on(suite(0.28, 0.03), second, confidence=0.6)
    assert verdict.name.startswith("SHIP")
    assert "second was measured lower (−4.0 points, interval" in verdict.headline
    assert "at a confidence of 60 % only" in verdict.headline


def test_a_verdict_to_ship_says_if_nobody_looked_for_the_items_among_the_rows():
    assert "whether items are among the training rows was not checked" in (
        verdict_on(suite(0.16, 0.03)).headline
    )


def test_answers_that_do_not_end_any_more_or_repeat_themselves_are_broken_chat():
    before = {"answer_words": 40.0, "length_ratio": 1.0, "short_answers": 0.0, "ended_answers": 0.9}
    before |= {"distinct_words": 0.4, "shared_words": 0.6}
    for change, is_broken in (
        ({}, False),
        ({"ended_answers": 0.7, "distinct_words": 0.25}, False),
        ({"ended_answers": 0.5}, True),
        ({"distinct_words": 0.15}, True),
        ({"shared_words": 0.3}, False),
        ({"shared_words": 0.1}, True),
    ):
        arms = {
            "base": ArmScore(3.0, also=before),
            "tuned": ArmScore(3.0, also=before | change),
        }
        chat = suite(0.0, 0.01, name="chat", role="general", metric="nats_per_token", arms=arms)
        chat = dataclasses.replace(chat, task="chat")
        verdict = verdict_on(suite(0.16, 0.03), chat)
        assert (verdict.name == "BROKE-GENERAL") == is_broken
    assert "10.0 % are also in the other answers of the base model, before 60.0 %" in " ".join(
        verdict.reasons
    )


def test_answers_cut_off_before_and_not_after_are_a_caveat():
    def written(before: float, after: float) -> SuiteReport:
        arms = {
            "base": ArmScore(0.2, also={"cut_off": before}),
            "tuned": ArmScore(0.6, also={"cut_off": after}),
        }
        return suite(0.4, 0.03, task="exact", arms=arms)

    said = "80.0 % of the answers of the base model were cut off at max_new_tokens"
    assert any(said in each for each in find_caveats(Evidence((written(0.8, 0.0),))))
    assert not any("cut off" in each for each in find_caveats(Evidence((written(0.8, 0.75),))))
