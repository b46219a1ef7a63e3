"""Scores read back from disk hold the arms that were asked for."""

from llmtune.evaluation.scores import read_scores
from llmtune.evaluation.stats import Resampling
from tests.reporting.planted import PlantedSuite, plant_run, right_wrong


def test_only_the_arms_asked_for_are_read(tmp_path):
    scores = right_wrong(20, 0.5, seed=0)
    planted = PlantedSuite("sums", "target", dict.fromkeys(("base", "tuned", "merged"), scores))
    run = plant_run(tmp_path, [planted])
    sampling = Resampling(samples=100)
    everything = read_scores(run.evaluations_dir, ["sums"], sampling)
    assert set(everything["sums"]["arms"]) == {"base", "tuned", "merged"}
    chosen = read_scores(run.evaluations_dir, ["sums"], sampling, arms=("base", "tuned"))
    assert set(chosen["sums"]["arms"]) == {"base", "tuned"}
