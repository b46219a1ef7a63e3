"""On the real small model: a reckless learning rate breaks general ability, KL replay keeps it."""

from pathlib import Path

import pytest

from llmtune import load_config
from llmtune.runs import pipeline

ROOT = Path(__file__).parent.parent
# Without protection 0.64 nats/token, far beyond the bound of 0.2: training at such a rate is
# chaotic, and a change of rounding moves the result.
RECKLESS = [
    "model.quantization=null",
    "data.train=[{path: data/quickstart/movies_train.jsonl, limit: 120}]",
    "train.learning_rate=3e-3",
    "train.max_steps=12",
    "train.batch_size=10",
    "train.eval_every=null",
    "evaluate.suites=[evals/movies.yaml, evals/passages.yaml]",
    "evaluate.arms=[base, tuned]",
    "evaluate.extent=none",
    "evaluate.limit=50",
]
HELD = "protect.kl_to_base={weight: 1.0, source: self, rows: 3, max_length: 64}"


def tune(run_dir, *overrides):
    """Return all verdicts that hold, the rise of general loss (nats/token), the tuned accuracy."""
    config = load_config(
        ROOT / "configs" / "quickstart.yaml", [*RECKLESS, f"run_dir={run_dir}", *overrides]
    )
    pipeline.train(config)
    scores = pipeline.evaluate(config)
    rise = scores["passages"]["comparison"]["difference"]
    verdict = pipeline.report(config.run_dir).verdict
    return (verdict.name, *verdict.also), rise, scores["movies"]["arms"]["tuned"]["mean"]


@pytest.mark.slow
def test_kl_replay_keeps_what_a_reckless_learning_rate_breaks(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    verdicts, rise, accuracy = tune(tmp_path / "plain", "protect.kl_to_base=null")
    assert "BROKE-GENERAL" in verdicts
    held_verdicts, held_rise, held_accuracy = tune(tmp_path / "held", HELD)
    assert "BROKE-GENERAL" not in held_verdicts
    assert held_rise <= 0.3 * rise
    assert held_accuracy >= accuracy - 0.06
