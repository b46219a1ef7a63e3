"""The training benchmark: its rows, its gate, and one whole run of its arms on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.tiny import make_model

SCRIPTS_DIR = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS_DIR))

from bench_arms.parity import (  # noqa: E402
    Parity,
    allowed_loss_difference,
    compare_gradients,
    compare_losses,
)
from bench_arms.rows import IGNORE_INDEX, follow_rule, make_rows  # noqa: E402


def test_rows_are_as_long_as_the_mix_says_and_train_their_end():
    stream = follow_rule(5000)
    rows = make_rows("chat", 400, full_length=64, stream=stream)
    assert np.mean([len(ids) for ids, _ in rows]) == pytest.approx(200, rel=0.1)
    short = make_rows("short", 400, full_length=64, stream=stream)
    assert np.median([len(ids) for ids, _ in short]) == pytest.approx(110, rel=0.1)
    assert {len(ids) for ids, _ in make_rows("full", 5, full_length=64, stream=stream)} == {64}
    for ids, labels in rows:
        trained = [label for label in labels if label != IGNORE_INDEX]
        assert len(labels) == len(ids) and trained == ids[-len(trained) :] and len(trained) >= 2


def test_gate_sees_one_tensor_that_is_worse_than_stock(tmp_path):
    exact = {f"{batch} {name}": torch.ones(4) for batch in range(2) for name in ("a", "b")}
    stock = {name: value + 0.1 for name, value in exact.items()}
    worse = {name: value + (0.2 if name.endswith("b") else 0.1) for name, value in exact.items()}
    files = [tmp_path / name for name in ("worse", "stock", "exact")]
    for file, tensors in zip(files, (worse, stock, exact), strict=True):
        save_file(tensors, file)
    ratios = compare_gradients(*files)
    assert ratios["a"] == pytest.approx(1.0, abs=1e-5)
    assert ratios["b"] == pytest.approx(2.0, abs=1e-5)
    assert not Parity(max(ratios.values()), 1.0, 0.0, 0.0, 2e-3).holds


def test_gate_is_not_decided_by_one_batch(tmp_path):
    """Neither a batch of a large gradient nor one of unlucky rounding outweighs the rest."""
    sizes = (100.0, 1.0, 1.0, 1.0)
    errors = {"arm": (0.4, 0.1, 0.2, 0.1), "stock": (0.1, 0.2, 0.2, 0.2)}
    exact = {f"{batch} a": torch.full((4,), size) for batch, size in enumerate(sizes)}
    save_file(exact, tmp_path / "exact")
    for name, of_batches in errors.items():
        found = {
            one: exact[one] * (1 + error) for one, error in zip(exact, of_batches, strict=True)
        }
        save_file(found, tmp_path / name)
    ratios = compare_gradients(*(tmp_path / name for name in ("arm", "stock", "exact")))
    assert ratios["a"] == pytest.approx(1.0, abs=1e-4)


def test_gate_judges_the_median_loss_and_reports_the_largest():
    median, largest = compare_losses([1.0, 2.0, 3.5], [1.0, 2.001, 3.0])
    assert (median, largest) == (pytest.approx(0.001), pytest.approx(0.5))
    allowed = allowed_loss_difference(960)
    assert allowed == allowed_loss_difference(2000) == pytest.approx(2e-3, rel=0.01)
    assert allowed_loss_difference(240) == pytest.approx(2 * allowed)
    assert Parity(1.0, 1.0, median, largest, allowed).holds
    assert not Parity(1.0, 1.0, 0.003, largest, allowed).holds
    assert Parity(1.0, 1.0, 0.003, largest, allowed_loss_difference(240)).holds


@pytest.mark.parametrize(("rows", "trained"), [(16, 2), (8, 120)], ids=["task", "chat"])
def test_gate_lets_rounding_pass_and_no_wrong_mask(rows, trained):
    random = np.random.default_rng(0)
    steps, spread, rounding = 6, 2.0, 2**-4  # nats
    exact = random.exponential(spread, size=(steps, rows, trained))

    def holds(kept: slice) -> bool:
        arms = [exact + random.uniform(-1, 1, exact.shape) * rounding for _ in range(2)]
        ours = arms[0][:, :, kept]
        differences = np.abs(ours.mean(axis=(1, 2)) - arms[1].mean(axis=(1, 2)))
        median = float(np.median(differences))
        return Parity(1.0, 1.0, median, median, allowed_loss_difference(rows * trained)).holds

    assert holds(slice(None))
    assert not holds(slice(1, None)), "a token of each row is missing"


@pytest.mark.slow
def test_arms_agree_on_a_tiny_model_and_fill_the_table(tmp_path):
    make_model("llama", vocab_size=512).save_pretrained(tmp_path / "base")
    command = [sys.executable, "scripts/bench_train.py", "--model", str(tmp_path / "base")]
    command += ["--full-length", "48", "--mix", "full", "--batch-size", "16", "--steps", "2"]
    command += ["--rounds", "1", "--json", str(tmp_path / "out.json")]
    done = subprocess.run(
        command, cwd=SCRIPTS_DIR.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads(line) for line in (tmp_path / "out.json").read_text().splitlines()]
    assert [result["arm"] for result in results] == ["trl-default", "trl-best", "llmtune"]
    assert all(result["tokens_per_second"] > 0 and result["parity"] for result in results)
    assert "parity of llmtune holds" in done.stdout
