"""How much an evaluation measures: by its extent, by every knob of its own, and only once."""

import json
import logging
import shutil
from types import SimpleNamespace
from typing import Any

import pytest

from llmtune import evaluate, load_config, merge, train
from llmtune.evaluation import measures
from llmtune.evaluation.compare import compare_arms
from llmtune.evaluation.results import arm_result_path, read_arm_result
from llmtune.evaluation.stats import Resampling
from llmtune.io.manifest import read_manifest
from llmtune.runs.pipeline import measure
from llmtune.scoring import live
from tests.conftest import write_jsonl
from tests.project import make_project

PLAIN = {"original", "base", "tuned", "merged"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained")
    config_path = make_project(directory)
    prose = [{"id": f"p{i}", "text": f"The quick brown fox saw {i} lazy dogs."} for i in range(12)]
    write_jsonl(directory / "prose.jsonl", prose)  # a shift needs ten texts a set
    config = load_config(config_path, ["train.max_steps=4", "evaluate.bootstrap_samples=1000"])
    train(config)
    merge(config)
    evaluate(load_config(config_path, ["train.max_steps=4", "evaluate.extent=none"]))
    return config


@pytest.fixture
def config(trained, tmp_path):
    """A trained, merged and plainly evaluated run of this test's own."""
    shutil.copytree(trained.run_dir, tmp_path / "run")
    return trained.model_copy(update={"run_dir": tmp_path / "run"})


def with_knobs(config, **knobs):
    values = config.evaluate.model_dump() | knobs
    return config.model_copy(update={"evaluate": type(config.evaluate)(**values)})


def arms_of(config, suite="sentiment"):
    paths = config.run.evaluations_dir.glob(f"{suite}.*.json")
    return {path.name.removeprefix(f"{suite}.").removesuffix(".json") for path in paths}


def diagnostics_of(config):
    return {path.stem for path in config.run.diagnostics_dir.glob("*.json")}


def result_of(config):
    return read_manifest(config.run).stages["evaluate"]["result"]


def read(config, arm, suite="sentiment"):
    return read_arm_result(arm_result_path(config.run.evaluations_dir, suite, arm))


def test_each_extent_measures_more_and_loads_the_base_once(config, monkeypatch, caplog):
    loads = []

    def load(target, arm):
        loads.append(arm)
        return load_target(target, arm)

    load_target = live.load_target
    monkeypatch.setattr(live, "load_target", load)
    evaluate(config)
    assert arms_of(config) == PLAIN | {"strength-0.5"}
    assert diagnostics_of(config) == {"divergence", "stops", "contamination"}
    before = {arm: read(config, arm) for arm in arms_of(config)}
    caplog.clear()
    with caplog.at_level(logging.INFO, "llmtune"):
        evaluate(with_knobs(config, extent="full"))
    few = {f"few-shot-{n}" for n in (1, 2, 3)}
    strengths = {f"strength-{s}" for s in (0.25, 0.5, 0.75)}
    assert arms_of(config) - {"probe"} == PLAIN | strengths | few
    assert diagnostics_of(config) >= {"divergence", "probe", "shift", "memorization"}
    assert loads == ["tuned", "tuned"]  # one base a call; the merged model's results were read
    assert before == {arm: read(config, arm) for arm in before}
    told = [line for line in caplog.messages if "forward tokens" in line or "in all" in line]
    first_item = next(i for i, line in enumerate(caplog.messages) if "items" in line)
    assert len(told) == 2 and caplog.messages.index(told[1]) < first_item


def test_what_was_measured_to_a_larger_extent_stays(config):
    evaluate(with_knobs(config, extent="full"))
    evaluate(config)
    assert result_of(config)["extent"] == "full"
    assert "few-shot-1" in result_of(config)["suites"]["sentiment"]
    evaluate(with_knobs(config, seed=1))
    assert result_of(config)["extent"] == "quick"


def test_a_run_is_measured_further_by_its_directory_and_only_what_is_missing(config, caplog):
    path = config.run.manifest_path
    values = json.loads(path.read_text())
    values["config"]["run_dir"] = str(config.run_dir)
    path.write_text(json.dumps(values))
    measure(config.run_dir, "full")
    assert result_of(config)["extent"] == "full"
    arm_result_path(config.run.evaluations_dir, "sentiment", "strength-0.25").unlink()
    arm_result_path(config.run.evaluations_dir, "sentiment", "few-shot-2").unlink()
    (config.run.diagnostics_dir / "stops.json").unlink()
    measure(config.run_dir, "full")
    made = {cost["measure"] for cost in result_of(config)["measures"] if cost["tokens"]}
    assert made == {"strengths", "stops"}  # the base's answer with examples is kept elsewhere
    assert read(config, "few-shot-2").about["reused"]
    with caplog.at_level(logging.INFO, "llmtune"):
        measure(config.run_dir, "full")
    assert "skipped" in caplog.text


def test_costs_are_told_in_tokens_and_kept_beside_what_they_were(config):
    evaluate(with_knobs(config, extent="full"))
    costs = {cost["measure"]: cost for cost in result_of(config)["measures"]}
    assert {"few-shot", "strengths", "divergence", "probe"} <= set(costs)
    assert "zero-shot" not in costs and "merged" not in costs  # these were there
    assert all(cost["seconds"] is not None for cost in costs.values())
    assert costs["few-shot"]["tokens"] > 0 < costs["few-shot"]["estimated_seconds"]
    assert costs["contamination"]["tokens"] == 0


def test_draws_are_the_same_again_and_differ_from_each_other(config, tmp_path):
    few = {"few_shot": {"measure": True, "shots": 4}}
    evaluate(with_knobs(config, extent="none", **few))
    first = [read(config, f"few-shot-{n}") for n in (1, 2, 3)]
    assert len({result.recipe["demonstrations"] for result in first}) == 3
    evaluate(with_knobs(config, extent="none", **few), force=True)
    for result in first:
        again = read(config, result.arm)
        assert again.items == result.items and again.recipe == result.recipe
        assert result.about["shots"] == 4 and result.about["demonstration_tokens"] > 40
    found = compare_arms(read(config, "tuned"), first[0], resampling=Resampling(samples=200))
    assert found.recipe_differences == ("demonstrations",)


def test_a_strength_of_the_live_adapter_lies_between_base_and_tuned(config):
    evaluate(with_knobs(config, extent="none", strengths=(0.001, 0.999)))
    for near, far, arm in (
        ("base", "tuned", "strength-0.001"),
        ("tuned", "base", "strength-0.999"),
    ):
        found = read(config, arm, "prose")
        gap = abs(found.mean - read(config, near, "prose").mean)
        assert gap < abs(found.mean - read(config, far, "prose").mean)
        assert found.model["strength"] == found.about["strength"] == float(arm.split("-")[1])


def test_a_prompt_and_a_stronger_models_answers_are_arms(config, tmp_path):
    prompt = tmp_path / "mine.txt"
    prompt.write_text("{% set system %}Judge.{% endset %}Read this. {{ prompt }}")
    items = read(config, "base").items
    answers = tmp_path / "large.jsonl"
    answers.write_text("".join(json.dumps({"prediction": i.answer}) + "\n" for i in items))
    knobs = {"prompts": {"mine": prompt}, "predictions": {"large": answers}}
    evaluate(with_knobs(config, extent="none", **knobs))
    assert arms_of(config) == PLAIN | {"prompt-mine", "other-large"}
    assert read(config, "other-large").mean == 1.0
    assert read(config, "prompt-mine").items != read(config, "base").items
    fast = Resampling(samples=200)
    found = compare_arms(read(config, "base"), read(config, "prompt-mine"), resampling=fast)
    assert found.recipe_differences == ("prompt",)
    compare_arms(read(config, "tuned"), read(config, "other-large"), resampling=fast)
    prompt.write_text("Read that. {{ prompt }}")
    before = read(config, "prompt-mine")
    evaluate(with_knobs(config, extent="none", **knobs))
    assert read(config, "prompt-mine").recipe["prompt"] != before.recipe["prompt"]


@pytest.mark.parametrize(
    ("knobs", "arms", "diagnostics"),
    [
        ({"few_shot": {"measure": True, "draws": 1}}, {"few-shot-1"}, set()),
        ({"strengths": [0.1]}, {"strength-0.1"}, set()),
        ({"divergence": True}, set(), {"divergence"}),
        ({"stops": True}, set(), {"stops"}),
        ({"contamination": True}, set(), {"contamination"}),
        ({"shift": True}, set(), {"shift"}),
        ({"memorization": True}, set(), {"memorization"}),
        ({"probe": True}, {"probe"}, {"probe"}),
    ],
)
def test_each_measure_has_a_switch_of_its_own(config, knobs, arms, diagnostics):
    evaluate(with_knobs(config, extent="none", **knobs))
    assert arms_of(config) == PLAIN | arms
    assert diagnostics_of(config) == diagnostics


def test_every_knob_of_the_few_shot_arm_is_another_recipe(config):
    def measure(**few):
        few_shot = {"measure": True, "draws": 1, "shots": 4, **few}
        evaluate(with_knobs(config, extent="none", few_shot=few_shot))
        return read(config, "few-shot-1")

    first = measure()
    assert measure(shots=2).about["shots"] == 2
    assert measure(seed=5).recipe["demonstrations"] != first.recipe["demonstrations"]
    some = measure(limit=3)
    assert (some.n, first.n) == (3, 12)
    assert compare_arms(read(config, "base"), some, resampling=Resampling(samples=99)).n == 3


def test_a_general_suite_is_halved_at_other_strengths_and_a_transfer_suite_left_out():
    items = tuple(SimpleNamespace(id=f"i{n}") for n in range(200))

    class Items(SimpleNamespace):
        def select(self, ids):
            return Items(role=self.role, items=tuple(i for i in self.items if i.id in ids))

    def count(role, number=200):
        suite: Any = Items(role=role, items=items[:number])
        chosen = measures.items_at_strength(suite)
        return None if chosen is None else len(chosen.items)

    assert count("target") == 200 and count("transfer") is None
    assert 70 < count("general") < 130 and count("general", 30) == 30
