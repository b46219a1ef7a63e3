"""The table of methods keeps the rate that fits held-out rows best, and does nothing twice."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import methods_table
from methods_table import METHODS, main, table_lines

from llmtune.config import load_config


def finish(run, rate: str, loss: float) -> None:
    training = {
        "final_eval_loss": loss,
        "seconds": 61.0,
        "peak_bytes": 3 << 30,
        "injection": {"trainable_parameters": 1234},
    }
    (run / rate).mkdir(parents=True)
    manifest = {"stages": {"train": {"result": training}}}
    (run / rate / "manifest.json").write_text(json.dumps(manifest))


def test_the_best_rate_alone_is_evaluated_and_shown(tmp_path, monkeypatch):
    place = tmp_path / "ia3" / "seed-0-steps-30"
    commands: list[list[str]] = []

    def run(command, **_):
        commands.append(command)
        verb, run_dir = command[3], next(x for x in command if x.startswith("run_dir="))
        rate = run_dir.rpartition("/")[2]
        if verb == "train":
            finish(place, rate, {"1e-3": 0.5, "3e-3": 0.3, "1e-2": 0.9}[rate])
            return
        suite = {"metric": "accuracy", "difference": 0.12, "interval": [0.02, 0.2]}
        prose = {"metric": "nll_per_token", "difference": 0.01, "interval": [0.0, 0.02]}
        suites = {"movies": suite, "passages": prose, "chat": prose}
        (place / rate / "report.json").write_text(json.dumps({"suites": suites}))

    monkeypatch.setattr(methods_table.subprocess, "run", run)
    assert main(["run", "ia3", "--runs", str(tmp_path), "--seconds", "-1"]) == 3 and not commands
    assert main(["run", "ia3", "--runs", str(tmp_path)]) == 0
    assert [one[3] for one in commands] == ["train"] * 3 + ["run"]
    assert main(["run", "ia3", "--runs", str(tmp_path)]) == 0
    assert len(commands) == 4, "what is finished is not done again"
    (row,) = table_lines(tmp_path)[2:]
    assert row.startswith("| `ia3` | 3e-3 | 0.300 | +12.0")
    assert row.endswith("| 1,234 | 61 | 3.00 GiB |")


@pytest.mark.parametrize("name", METHODS)
def test_every_row_is_a_config(name, tmp_path, monkeypatch):
    def run(command, **_):
        config = load_config(command[4], command[5:])
        assert config.train.max_steps == 7
        raise StopIteration

    monkeypatch.setattr(methods_table.subprocess, "run", run)
    with pytest.raises(StopIteration):
        main(["run", name, "--steps", "7", "--runs", str(tmp_path)])
