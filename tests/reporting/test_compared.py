"""What ships is compared with what was there, part by part; what is missing is said."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llmtune.io.manifest import BaseRecord, Manifest
from llmtune.io.run_dir import RunDir
from llmtune.reporting.build import build_report, write_report
from llmtune.reporting.report import Report
from tests.reporting.planted import PlantedSuite, improve, plant_run, right_wrong, worsen

N = 300
ORIGINAL = right_wrong(N, 0.7, seed=0)
BASE = worsen(ORIGINAL, 0.02, seed=1)
TUNED = improve(BASE, 0.2, seed=2)
MERGED = worsen(TUNED, 0.01, seed=3)
ARMS = {"original": ORIGINAL, "base": BASE, "tuned": TUNED, "merged": MERGED}


def report_on(path: Path, *arms: str, quantization: str = "nf4") -> Report:
    base: BaseRecord = {
        "origin": "org/small",
        "fingerprint": "b" * 64,
        "quantization": quantization,
    }
    config = {"evaluate": {"bootstrap_samples": 400}}
    suite = PlantedSuite("movies", "target", {arm: ARMS[arm] for arm in arms})
    run = plant_run(path, [suite], manifest=Manifest(config=config, base=base))
    report = build_report(run)
    write_report(report, run)
    return report


def test_merged_is_compared_with_the_original_and_the_parts_add_up(tmp_path):
    report = report_on(tmp_path, *ARMS)
    (movies,) = report.suites
    assert movies.compared == ("original", "merged")
    assert movies.change.difference == pytest.approx(movies.after - movies.before)
    assert list(movies.chain) == ["quantization", "training", "merging"]
    parts = sum(part.difference for part in movies.chain.values())
    assert movies.change.difference == pytest.approx(parts)
    assert report.compared == (
        "Compared: the merged model against the original base, on the same items."
    )
    values = json.loads((tmp_path / "report.json").read_text())
    assert values["compared"] == report.compared
    assert values["suites"]["movies"]["compared"] == ["original", "merged"]
    for page in ("report.html", "report.md"):
        text = (tmp_path / page).read_text().replace("\N{NO-BREAK SPACE}", " ")
        assert "the merged model against the original base" in text
        assert "What the change is made of" in text


@pytest.mark.parametrize(
    ("arms", "compared", "said"),
    [
        (("base", "tuned", "merged"), ("base", "merged"), "against the quantized base (nf4)"),
        (("base", "tuned"), ("base", "tuned"), "what merging costs is not counted"),
        (("original", "base", "tuned"), ("original", "tuned"), "base + adapter against the orig"),
    ],
)
def test_what_was_not_measured_is_replaced_and_said(tmp_path, arms, compared, said):
    report = report_on(tmp_path, *arms)
    assert report.suites[0].compared == compared
    assert said in report.compared


def test_an_unquantized_base_is_not_called_quantized(tmp_path):
    report = report_on(tmp_path, "base", "tuned", "merged", quantization="none")
    assert "against the base, on the same items" in report.compared


def test_the_merge_base_of_the_manifest_decides_the_advice(tmp_path):
    manifest = report_on(tmp_path / "fine", *ARMS).manifest
    manifest = replace(manifest, stages={"merge": {"finished": "now", "result": {}}})
    suite = PlantedSuite("movies", "target", ARMS | {"merged": worsen(TUNED, 0.15, seed=4)})
    report = build_report(plant_run(tmp_path / "lost", [suite], manifest=manifest))
    assert report.verdict.name == "MERGE-DIFFERENTLY"
    assert "merge.base=dequantized" in report.verdict.reasons[-1]


def test_a_model_that_nearly_always_gives_the_commonest_answer_does_not_ship(tmp_path):
    answers = ["yes"] * 180 + ["no"] * 120
    always = [float(answer == "yes") for answer in answers]
    nearly = always[:-6] + [1.0] * 4 + [0.0] * 2
    base = worsen(always, 0.3, seed=1)
    for name, tuned, verdict in (
        ("nearly", nearly, "INCONCLUSIVE"),
        ("better", always[:-20] + [1.0] * 20, "SHIP, general not shown"),
    ):
        suite = PlantedSuite(
            "movies", "target", {"base": base, "tuned": tuned}, majority=0.6, answers=answers
        )
        report = build_report(plant_run(tmp_path / name, [suite]))
        assert report.verdict.name == verdict
        [movies] = report.suites
        assert movies.after > movies.majority
    built = build_report(RunDir(tmp_path / "nearly"))
    assert "is not shown to be above that (+1.3 points" in " ".join(built.verdict.reasons)
    assert any("is not shown to be above that" in each for each in built.caveats)
