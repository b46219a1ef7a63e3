"""A comparison is of the same items under the same recipe, and says what it could not show."""

import json
from dataclasses import replace

import pytest

from llmtune.errors import LlmtuneError
from llmtune.evaluation.compare import compare_arms, compare_slices
from llmtune.evaluation.results import ArmResult, ItemScore, read_arm_result, save_arm_result
from llmtune.evaluation.stats import Resampling
from llmtune.io.fingerprint import hash_json

FAST = Resampling(samples=1000)
RECIPE = {"items": "i", "scoring": {"chat": True}, "template": "t", "precision": "bf16"}


def make_arm(arm, scores, *, clusters=None, weights=None, columns=None, **changes):
    items = tuple(
        ItemScore(
            id=str(place),
            score=score,
            prediction="p",
            answer="a",
            cluster=clusters[place] if clusters else None,
            weight=weights[place] if weights else 1.0,
            slices={"kind": columns[place]} if columns else {},
        )
        for place, score in enumerate(scores)
    )
    recipe = changes.pop("recipe", RECIPE)
    values = {
        "suite": "movies",
        "task": "choice",
        "role": "target",
        "description": "",
        "arm": arm,
        "metric": "accuracy",
        "higher_is_better": True,
        "n": len(items),
        "mean": sum(scores) / len(scores),
        "standard_error": 0.0,
        "unparseable": 0,
        "majority": 0.5,
        "chance": 0.5,
        "recipe": recipe,
        "recipe_hash": hash_json(recipe),
        "model": {},
        "seconds": 1.0,
        "items": items,
    }
    return ArmResult(**(values | changes))


BASE = [1.0, 0.0] * 50
BETTER = [1.0] * 90 + [0.0] * 10


def test_identical_arms_differ_by_nothing_with_p_one():
    found = compare_arms(make_arm("base", BASE), make_arm("tuned", BASE), resampling=FAST)
    assert (found.difference, found.p_value) == (0.0, 1.0)
    # 100 items without a change cannot rule out z^2 / (n + z^2)
    assert found.interval == pytest.approx((-0.03699, 0.03699), abs=1e-5)
    assert found.mcnemar_p == 1.0 and found.verdict == "no difference shown"
    assert (found.gained, found.lost) == (0, 0)


def test_a_gain_is_counted_and_clear_of_zero():
    found = compare_arms(make_arm("base", BASE), make_arm("tuned", BETTER), resampling=FAST)
    assert (found.base, found.tuned) == (0.5, 0.9)
    assert found.difference == pytest.approx(0.4)
    assert (found.gained, found.lost, found.n) == (45, 5, 100)
    assert found.low > 0 and found.verdict == "better" and found.p_value < 0.01
    assert found.mcnemar_p < 1e-6
    assert found.as_dict()["interval"] == [found.low, found.high]


def test_a_loss_that_rises_is_worse():
    sides = [[3.0 + n % 7 / 10 for n in range(60)], [3.5 + n % 5 / 10 for n in range(60)]]
    arms = [
        make_arm(arm, side, metric="nats_per_token", higher_is_better=False)
        for arm, side in zip(("base", "tuned"), sides, strict=True)
    ]
    found = compare_arms(*arms, resampling=FAST)
    assert found.difference > 0 > found.gain and found.verdict == "worse"
    assert found.mcnemar_p is None


def test_eight_items_show_nothing_and_say_what_they_could_have_shown():
    arms = make_arm("base", [0, 1] * 4), make_arm("tuned", [1, 1, 0, 1, 1, 0, 0, 1])
    found = compare_arms(*arms, resampling=FAST)
    assert found.verdict == "no difference shown"
    assert found.mde > abs(found.difference)


def test_weights_make_the_means_and_the_difference():
    arms = [
        make_arm("base", [2.0, 4.0], weights=[3.0, 1.0]),
        make_arm("tuned", [2.0, 2.0], weights=[3.0, 1.0]),
    ]
    found = compare_arms(*arms, resampling=FAST)
    assert (found.base, found.tuned, found.difference) == (2.5, 2.0, -0.5)


def test_clusters_widen_the_interval():
    clusters = [str(place // 10) for place in range(100)]
    moved = [1.0] * 20 + BASE[20:]
    plain = compare_arms(make_arm("base", BASE), make_arm("tuned", moved), resampling=FAST)
    arms = [
        make_arm(arm, side, clusters=clusters) for arm, side in (("base", BASE), ("tuned", moved))
    ]
    clustered = compare_arms(*arms, resampling=FAST)
    assert clustered.num_clusters == 10
    assert clustered.high - clustered.low > 1.3 * (plain.high - plain.low)
    assert clustered.difference == plain.difference


def test_another_recipe_is_refused_by_the_name_of_what_differs():
    other = make_arm("tuned", BASE, recipe={**RECIPE, "template": "u"})
    with pytest.raises(LlmtuneError, match="template: 't' / 'u'"):
        compare_arms(make_arm("base", BASE), other, resampling=FAST)


def test_other_items_and_other_suites_are_refused():
    base = make_arm("base", BASE)
    with pytest.raises(LlmtuneError, match="other items"):
        compare_arms(base, make_arm("tuned", BASE[:-1]), resampling=FAST)
    with pytest.raises(LlmtuneError, match="suite: 'movies' / 'tweets'"):
        compare_arms(base, make_arm("tuned", BASE, suite="tweets"), resampling=FAST)


def test_what_may_differ_is_allowed_and_listed():
    other = make_arm("tuned", BASE, recipe={**RECIPE, "precision": "nf4"})
    base = make_arm("base", BASE)
    with pytest.raises(LlmtuneError, match="precision"):
        compare_arms(base, other, resampling=FAST)
    found = compare_arms(base, other, resampling=FAST, across=("precision",))
    assert found.recipe_differences == ("precision",)


@pytest.mark.parametrize(
    ("arm", "key"),
    [
        ("merged", "precision"),
        ("merged", "base"),
        ("few-shot-2", "demonstrations"),
        ("prompt-mine", "prompt"),
        ("strength-0.5", "selection"),
        ("probe", "template"),
        ("other-large", "scoring"),
    ],
)
def test_each_kind_of_arm_may_differ_in_its_own_way_from_either_side(arm, key):
    recipe = {**RECIPE, key: "changed"}
    for other in ("base", "tuned"):
        arms = make_arm(other, BASE), make_arm(arm, BETTER, recipe=recipe)
        for pair in (arms, arms[::-1]):
            assert compare_arms(*pair, resampling=FAST).recipe_differences == (key,)
    with pytest.raises(LlmtuneError, match="items: 'i' / 'j'"):
        compare_arms(make_arm("base", BASE), make_arm(arm, BASE, recipe={**recipe, "items": "j"}))
    for plain in ("few-shots", "promptly", "tuned"):
        with pytest.raises(LlmtuneError, match=key):
            compare_arms(make_arm("base", BASE), make_arm(plain, BASE, recipe=recipe))


def test_an_arm_on_half_of_the_items_is_compared_on_the_items_in_common():
    recipe = {**RECIPE, "num_items": 100}
    base = make_arm("base", BASE, recipe=recipe)
    whole = make_arm("strength-0.5", BETTER, recipe=recipe)
    half = replace(whole, items=whole.items[60:], n=40)
    found = compare_arms(base, half, resampling=FAST)
    assert (found.n, found.base, found.tuned) == (40, 0.5, 0.75)
    assert compare_arms(half, base, resampling=FAST).difference == -found.difference
    with pytest.raises(LlmtuneError, match="0 in common"):
        compare_arms(half, replace(base, items=base.items[:60]), resampling=FAST)


def test_another_right_answer_to_the_same_item_is_refused():
    other = make_arm("other-large", BASE)
    items = (replace(other.items[0], answer="b"), *other.items[1:])
    with pytest.raises(LlmtuneError, match="a different answer to '0'"):
        compare_arms(make_arm("base", BASE), replace(other, items=items), resampling=FAST)


def test_the_slice_that_regresses_comes_first():
    columns = ["good"] * 50 + ["bad"] * 50
    after = [1.0] * 50 + [0.0] * 50
    arms = (make_arm("base", BASE, columns=columns), make_arm("tuned", after, columns=columns))
    worst, best = compare_slices(*arms, "kind", resampling=FAST)
    assert (worst.value, worst.comparison.verdict) == ("bad", "worse")
    assert (best.value, best.comparison.verdict) == ("good", "better")
    assert worst.comparison.p_value <= worst.holm_p <= 2 * worst.comparison.p_value
    with pytest.raises(LlmtuneError, match="no slice column 'color'"):
        compare_slices(*arms, "color", resampling=FAST)


def test_results_come_back_from_disk_as_they_were(tmp_path):
    result = make_arm("base", BASE, columns=["x"] * 100)
    path = save_arm_result(result, tmp_path)
    assert path.name == "movies.base.json"
    assert read_arm_result(path) == result
    told = replace(result, about={"shots": 8})
    assert read_arm_result(save_arm_result(told, tmp_path)) == told
    values = json.loads(path.read_text())
    del values["about"]
    path.write_text(json.dumps(values))
    assert read_arm_result(path) == result


def test_facts_of_an_arm_come_back_and_files_without_them_can_be_read(tmp_path):
    result = make_arm("few-shot-1", BASE, about={"shots": 8})
    path = save_arm_result(result, tmp_path)
    assert read_arm_result(path).about == {"shots": 8}
    values = json.loads(path.read_text())
    del values["about"]
    path.write_text(json.dumps(values))
    assert read_arm_result(path) == replace(result, about={})


def test_a_broken_result_is_refused(tmp_path):
    path = save_arm_result(replace(make_arm("base", BASE), suite="x"), tmp_path)
    path.write_text(path.read_text()[:100])
    with pytest.raises(LlmtuneError, match="is not JSON"):
        read_arm_result(path)
    path.write_text('{"suite": "x"}')
    with pytest.raises(LlmtuneError, match="expected the keys"):
        read_arm_result(path)
    with pytest.raises(LlmtuneError, match="no such result"):
        read_arm_result(tmp_path / "y.base.json")
