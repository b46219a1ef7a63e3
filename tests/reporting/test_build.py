"""A report read from a run directory: its numbers, its JSON, and what it says is missing."""

import dataclasses
import json
import math
import re
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from llmtune.adapters.manifest import adapter_fingerprint
from llmtune.errors import LlmtuneError
from llmtune.evaluation.results import arm_result_path, read_arm_result, save_arm_result
from llmtune.io.manifest import Manifest, read_manifest
from llmtune.io.run_dir import RunDir, atomic_write_text
from llmtune.models.checkpoint import Checkpoint
from llmtune.reporting.build import build_report, write_report
from llmtune.reporting.run_results import Models, current_results
from llmtune.reporting.terminal import format_cost
from tests.reporting.planted import (
    PlantedSuite,
    improve,
    plant_generations,
    plant_log,
    plant_run,
    right_wrong,
    worsen,
)

BASE = right_wrong(300, 0.6, seed=0)
HELPED = improve(BASE, 0.2, seed=1)


def names_of_missing(report):
    return [missing.name for missing in report.missing]


@pytest.fixture
def full_run(tmp_path):
    """A run with every part: three suites, a log, generations, adapter, and stage results."""
    general = right_wrong(200, 0.5, seed=2)
    hurt = [score if index % 2 else 0.0 for index, score in enumerate(general)]
    prose = [3.0 + index / 100 for index in range(40)]
    stages: dict[str, Any] = {
        "train": {
            "fingerprint": "a" * 64,
            "finished": "now",
            "seconds": 100.0,
            "peak_bytes": 3_000,
            "result": {"steps": 30, "tokens": 5000, "trained_tokens": 900, "seconds": 50.0},
        },
        "merge": {
            "finished": "now",
            "seconds": 5.0,
            "peak_bytes": 2_000,
            "result": {"check": {"kl": 1e-7}},
        },
        "evaluate": {
            "finished": "now",
            "seconds": 20.0,
            "peak_bytes": 4_000,
            "result": {
                "suites": {
                    "movies": {"base": 0.6, "tuned": 0.8, "merged": 0.8},
                    "general": {"base": 0.5, "tuned": 0.4},
                    "prose": {"base": 3.0, "tuned": 3.1},
                }
            },
        },
    }
    manifest = Manifest(
        config={"seed": 0, "evaluate": {"bootstrap_samples": 1000, "confidence": 0.9}},
        base={"origin": "org/name", "fingerprint": "b" * 64},
        data={"train": {"rows_read": 10, "fingerprint": "c" * 64}},
        stages=stages,
    )
    run = plant_run(
        tmp_path / "full",
        [
            PlantedSuite(
                "movies",
                "target",
                {"base": BASE, "tuned": HELPED, "merged": HELPED},
                majority=0.55,
                clusters=[f"film-{index % 60}" for index in range(300)],
            ),
            PlantedSuite(
                "general",
                "general",
                {"base": general, "tuned": hurt},
                slices=[{"topic": "odd" if index % 2 else "even"} for index in range(200)],
            ),
            PlantedSuite(
                "prose",
                "general",
                {"base": prose, "tuned": [score + 0.05 for score in prose]},
                metric="nats_per_token",
                weights=[float(index + 1) for index in range(40)],
            ),
        ],
        manifest=manifest,
    )
    plant_log(run, [2.0, 1.5, 1.0], {2: 1.4, 3: 1.1})
    plant_generations(run, [{"prompt": "p", "base": "b", "tuned": "t", "reference": None}])
    run.adapter_dir.mkdir()
    (run.adapter_dir / "adapter_model.safetensors").write_bytes(b"x" * 123)
    return run


def test_report_json_holds_the_names_that_scripts_rely_on(full_run):
    write_report(build_report(full_run), full_run)
    written = json.loads(full_run.report_json_path.read_text())
    movies = written["suites"]["movies"]
    assert written["verdict"] == "BROKE-GENERAL"
    assert movies["base"] == pytest.approx(0.6)
    assert movies["tuned"] == movies["merged"] == pytest.approx(0.8)
    assert movies["majority"] == 0.55
    assert movies["difference"] == pytest.approx(0.2)
    assert movies["interval"][0] < 0.2 < movies["interval"][1]
    assert (movies["n"], movies["clusters"], movies["role"]) == (300, 60, "target")
    assert movies["p_value"] < 0.01 and movies["mde"] > 0
    assert written["seconds"] == {"train": 100, "merge": 5, "evaluate": 20, "total": 125}
    assert written["peak_bytes"] == 4_000
    assert written["cost"]["adapter_bytes"] == 123
    assert written["cost"]["tokens_per_second"] == 100
    assert written["loss"]["train"] == [[1, 2.0], [2, 1.5], [3, 1.0]]
    assert written["loss"]["evaluation"] == [[2, 1.4], [3, 1.1]]
    assert written["fingerprints"]["base.fingerprint"] == "b" * 64
    assert written["fingerprints"]["stages.train.fingerprint"] == "a" * 64
    assert "loss curve" not in written["missing"] and "merge check" not in written["missing"]
    assert written["how_to_measure"]["memorization"] == "llmtune report RUN --full"
    assert "one training seed" in written["statistics"]["training_noise"]


def test_the_slice_that_regressed_is_found(full_run):
    report = build_report(full_run)
    general = next(suite for suite in report.suites if suite.name == "general")
    assert general.slices[0].value == "even" and general.slices[0].change.high < 0
    assert general.slices[1].change.difference == 0
    assert any("topic = even" in caveat for caveat in report.caveats)


def test_perplexity_is_weighted_by_tokens_and_a_rise_is_worse(full_run):
    prose = next(suite for suite in build_report(full_run).suites if suite.name == "prose")
    assert prose.change is not None
    assert prose.change.difference == pytest.approx(0.05)
    assert prose.gain(prose.change)[0] == pytest.approx(-0.05)
    assert prose.score("base") > 3.2


def test_targets_come_first(full_run):
    assert [suite.role for suite in build_report(full_run).suites] == [
        "target",
        "general",
        "general",
    ]


def test_flipped_labels_are_negative(tmp_path):
    hurt = worsen(BASE, 0.3, seed=4)
    run = plant_run(tmp_path, [PlantedSuite("movies", "target", {"base": BASE, "tuned": hurt})])
    assert build_report(run).verdict.name == "NEGATIVE"


def test_eight_items_are_inconclusive_and_the_needed_number_follows_the_formula(tmp_path):
    base, tuned = [1, 0, 1, 0, 1, 0, 1, 0], [1, 1, 1, 0, 1, 0, 1, 1]
    run = plant_run(tmp_path, [PlantedSuite("movies", "target", {"base": base, "tuned": tuned})])
    verdict = build_report(run).verdict
    assert verdict.name == "INCONCLUSIVE"
    mde = 2.8 * (0.25 / 8) ** 0.5
    assert verdict.numbers["movies"]["mde"] == pytest.approx(mde)
    assert verdict.numbers["movies"]["needed_items"] == pytest.approx(8 * (mde / 0.25) ** 2, abs=1)


def test_identical_models_have_difference_zero_and_p_one(tmp_path):
    run = plant_run(tmp_path, [PlantedSuite("movies", "target", {"base": BASE, "tuned": BASE})])
    movies = build_report(run).as_json()["suites"]["movies"]
    assert (movies["difference"], movies["p_value"]) == (0, 1)
    low, high = movies["interval"] or (0, 0)
    assert low < 0 < high


def test_a_run_that_was_only_trained_says_what_is_missing(tmp_path):
    run = plant_run(tmp_path)
    plant_log(run, [2.0, 1.0], {})
    report = build_report(run)
    write_report(report, run)
    written = json.loads(run.report_json_path.read_text())
    assert written["verdict"] == "NOT-MEASURED"
    assert written["suites"] == {} and written["seconds"]["evaluate"] is None
    assert "evaluation of the tuned model" in written["missing"]
    assert "merge check" in written["missing"] and "loss curve" not in written["missing"]
    assert "Not measured" in run.report_html_path.read_text()


def test_an_arm_without_its_partner_is_shown_and_not_compared(tmp_path):
    run = plant_run(tmp_path, [PlantedSuite("movies", "target", {"base": BASE})])
    movies = build_report(run).as_json()["suites"]["movies"]
    assert movies["base"] == pytest.approx(0.6)
    assert movies["tuned"] is None and movies["difference"] is None and movies["interval"] is None


def test_the_same_run_gives_the_same_report(full_run):
    write_report(build_report(full_run), full_run)
    first = full_run.report_json_path.read_text(), full_run.report_html_path.read_text()
    write_report(build_report(full_run), full_run)
    assert first == (full_run.report_json_path.read_text(), full_run.report_html_path.read_text())


def test_report_json_is_json_without_nan(full_run):
    plant_log(full_run, [2.0, float("nan"), 1.0], {})
    manifest = read_manifest(full_run)
    stages: dict[str, Any] = {**manifest.stages, "merge": {"result": {"check": {"kl": math.nan}}}}
    dataclasses.replace(manifest, stages=stages).save(full_run)
    assert "NaN" in full_run.manifest_path.read_text()
    write_report(build_report(full_run), full_run)
    written = full_run.report_json_path.read_text()
    assert not re.search(r"NaN|Infinity", written)
    assert json.loads(written)["merge"] == {"check": {"kl": None}}


def test_a_log_cut_off_by_a_crash_is_read_up_to_there(full_run):
    text = full_run.metrics_path.read_text()
    atomic_write_text(full_run.metrics_path, text + '{"step": 4, "lo')
    assert build_report(full_run).curve.train[-1] == (3, 1.0)


def test_damaged_files_and_foreign_directories_are_one_clear_error(full_run, tmp_path):
    with pytest.raises(LlmtuneError, match="not a run"):
        build_report(RunDir(tmp_path / "nothing"))
    atomic_write_text(full_run.metrics_path, '{"step": 1\n{"step": 2, "loss": 1}\n')
    with pytest.raises(LlmtuneError, match=r"metrics\.jsonl:1"):
        build_report(full_run)
    atomic_write_text(full_run.metrics_path, "")
    atomic_write_text(full_run.generations_path, '[{"prompt": "only"}]')
    with pytest.raises(LlmtuneError, match=r"generations\.json"):
        build_report(full_run)


def test_results_left_by_an_earlier_evaluation_are_not_shown(full_run):
    stale = PlantedSuite("old", "target", {"base": BASE, "tuned": worsen(BASE, 0.3, seed=5)})
    plant_run(full_run.path, [stale], manifest=read_manifest(full_run))
    assert [suite.name for suite in build_report(full_run).suites] == ["movies", "general", "prose"]


def test_a_stage_that_did_not_end_is_named(full_run):
    manifest = read_manifest(full_run).start("merge", "f" * 64, {})
    manifest.save(full_run)
    missing = names_of_missing(build_report(full_run))
    assert "the end of merge" in missing and "evaluation is not finished" in missing


def test_without_a_finished_evaluation_only_results_of_the_models_on_disk_are_shown(full_run):
    (full_run.adapter_dir / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    full_run.merged_dir.mkdir()
    save_file({"w": np.ones((4, 4), np.float32)}, full_run.merged_dir / "model.safetensors")
    for name in ("movies", "general", "prose"):
        for arm in ("base", "tuned", "merged"):
            path = arm_result_path(full_run.evaluations_dir, name, arm)
            if path.is_file():
                model = {"base": "b" * 64, "adapter": None}
                if arm == "tuned":
                    model["adapter"] = adapter_fingerprint(full_run.adapter_dir)
                if arm == "merged":
                    model["base"] = Checkpoint.open(full_run.merged_dir).fingerprint
                save_arm_result(
                    dataclasses.replace(read_arm_result(path), model=model),
                    full_run.evaluations_dir,
                )
    read_manifest(full_run).start("merge", "f" * 64, {}).save(full_run)
    movies = build_report(full_run).suites[0]
    assert set(movies.arms) == {"base", "tuned", "merged"}
    save_file({"w": np.zeros((4, 4), np.float32)}, full_run.merged_dir / "model.safetensors")
    assert set(build_report(full_run).suites[0].arms) == {"base", "tuned"}
    (full_run.adapter_dir / "adapter_model.safetensors").write_bytes(b"y" * 123)
    assert set(build_report(full_run).suites[0].arms) == {"base"}
    manifest = read_manifest(full_run)
    dataclasses.replace(manifest, base={"fingerprint": "other"}).save(full_run)
    report = build_report(full_run)
    assert report.suites == () and "evaluation is not finished" in names_of_missing(report)


def test_the_planned_memory_stands_beside_the_measured_peak(full_run):
    manifest = read_manifest(full_run)
    estimate = {"total_bytes": 2_800, "components": {"base": 2_000, "activations": 800}}
    result = {**manifest.stages["train"]["result"], "estimate": estimate, "peak_bytes": 3_500}
    train: Any = {**manifest.stages["train"], "result": result}
    stages = {**manifest.stages, "train": train}
    assert build_report(full_run).as_json()["plan"] is None
    dataclasses.replace(manifest, stages=stages).save(full_run)
    report = build_report(full_run)
    write_report(report, full_run)
    planned = json.loads(full_run.report_json_path.read_text())["plan"]
    assert planned["estimated_bytes"] == 2_800
    assert planned["measured_bytes"] == 3_500
    assert planned["ratio"] == 0.8
    assert "80 % of the peak" in full_run.report_html_path.read_text()


def test_gpu_memory_of_training_is_told_apart_from_the_host_peak(full_run):
    manifest = read_manifest(full_run)
    for device, expected in (("cuda:0", 7_000), ("cpu", None)):
        result = {**manifest.stages["train"]["result"], "device": device, "peak_bytes": 7_000}
        train: Any = {**manifest.stages["train"], "result": result}
        stages = {**manifest.stages, "train": train}
        dataclasses.replace(manifest, stages=stages).save(full_run)
        report = build_report(full_run)
        write_report(report, full_run)
        written = json.loads(full_run.report_json_path.read_text())
        assert written["cost"]["training_gpu_peak_bytes"] == expected
        assert written["peak_bytes"] == 4_000
        page = full_run.report_html_path.read_text()
        assert ("peak memory of training (GPU)" in page) == (device == "cuda:0")
        assert ("on the GPU" in format_cost(report)) == (device == "cuda:0")


def test_a_log_may_hold_any_character_in_its_strings(full_run):
    lines = ['{"step": 1, "loss": 2.0, "note": "a\u2028b\x85c"}', '{"step": 2, "loss": 1.0}']
    atomic_write_text(full_run.metrics_path, "\n".join(lines) + "\n")
    assert build_report(full_run).curve.train == ((1, 2.0), (2, 1.0))


def test_scores_of_an_adapter_that_was_replaced_since_are_not_shown(tmp_path):
    scores = right_wrong(40, 0.5, seed=0)
    arms = {"base": scores, "tuned": improve(scores, 0.4, seed=1)}
    run = plant_run(tmp_path, [PlantedSuite("movies", "target", arms)])
    tuned = read_arm_result(run.evaluations_dir / "movies.tuned.json")
    tuned = dataclasses.replace(tuned, model={"base": "b" * 64, "adapter": "a" * 64})
    manifest = read_manifest(run)
    for adapter, is_shown in (("a" * 64, True), (None, True), ("c" * 64, False)):
        is_current = current_results(run, manifest, Models("b" * 64, adapter))
        assert is_current(tuned) == is_shown
