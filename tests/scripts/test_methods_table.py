"""The table of methods keeps the rate that fits held-out rows best, and does nothing twice."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import methods_table
from methods_table import METHODS, block_lines, finished_methods, main, table_lines

from llmtune.adapters.config import METHODS as UNION
from llmtune.config import load_config


def finish(run, rate: str, loss: float, *, origin: str = "models/SmolLM2.gguf") -> None:
    training = {
        "final_eval_loss": loss,
        "seconds": 61.0,
        "peak_bytes": 3 << 30,
        "adapter_bytes": 3 << 19,
        "injection": {"trainable_parameters": 1234},
    }
    (run / rate).mkdir(parents=True)
    manifest = {
        "created": "2026-11-30T18:26:28+00:00",
        "machine": {"processor": "AMD EPYC", "cores": 2},
        "base": {"origin": origin},
        "config": {"train": {"batch_size": 16}, "evaluate": {"limit": 100}},
        "stages": {"train": {"result": training}},
    }
    (run / rate / "manifest.json").write_text(json.dumps(manifest))


def test_the_best_rate_alone_is_evaluated_and_shown(tmp_path, monkeypatch):
    place = tmp_path / "ia3" / "seed-0-steps-30"
    commands: list[list[str]] = []
    losses = {"1e-3": 0.5, "3e-3": 0.3, "1e-2": 0.9}

    def run(command, **_):
        commands.append(command)
        verb, run_dir = command[3], next(x for x in command if x.startswith("run_dir="))
        rate = run_dir.rpartition("/")[2]
        if verb == "train":
            finish(place, rate, losses[rate])
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
    finished = finished_methods(tmp_path)
    (row,) = table_lines(finished)[2:]
    assert row.startswith("| `ia3` | 3e-3 | 0.300 | +12.0")
    assert re.search(r"\| 1,234 \| 1.5 MiB \| 0 CPU s \| 3.00 GiB \|$", row)
    (place / "3e-3" / "cpu_seconds.json").unlink()
    assert "| 61 s by the clock |" in table_lines(finished)[2]

    said = "\n".join(block_lines(tmp_path))
    assert "on 2 cores of an AMD EPYC" in said and "30 steps of 16 rows, seed 0 alone" in said
    assert "One seed:" in said and "Seconds by the clock depend" in said
    missing = said.partition("Not measured yet: ")[2]
    assert "`lora`" in missing and "`vera`" in missing and "`ia3`" not in missing
    assert "tried" not in said
    finish(tmp_path / "ia3" / "seed-1-steps-30", "1e-2", 0.2)
    shutil.copy(place / "3e-3/report.json", tmp_path / "ia3/seed-1-steps-30/1e-2/report.json")
    said = "\n".join(block_lines(tmp_path))
    assert "| `ia3` | 1 | 1e-2 (highest tried) |" in said and "end of its list" in said
    assert "seeds 0, 1" in said and "One seed:" not in said


def test_the_page_gets_what_is_finished_between_its_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"above\n{methods_table.BEGIN}\nold\n{methods_table.END}\nbelow\n")
    before = page.read_text()
    write = ["write", "--runs", str(tmp_path), "--page", str(page)]
    with pytest.raises(SystemExit, match="no method is finished"):
        main(write)
    assert page.read_text() == before, (
        "a fresh clone has no runs, and keeps the rows that are there"
    )

    place = tmp_path / "ia3" / "seed-0-steps-30"
    finish(place, "3e-3", 0.3, origin="org/SmolLM2-1.7B")
    suite = {"metric": "accuracy", "difference": 0.12, "interval": [0.02, 0.2]}
    report = {"suites": dict.fromkeys(("movies", "passages", "chat"), suite)}
    (place / "3e-3/report.json").write_text(json.dumps(report))
    assert main(write) == 0 and main(write) == 0
    text = page.read_text()
    assert text.startswith("above\n") and text.endswith("\nbelow\n") and "\nold\n" not in text
    assert text.count("Not measured yet: `lora`") == 1 and text.count("| `ia3` |") == 1
    assert "shared with other work: SmolLM2-1.7B," in text
    page.write_text(text.replace("| `ia3` |", "| `lora` |"))
    with pytest.raises(SystemExit, match="has rows of lora, whose runs are not here"):
        main(write)
    page.write_text("no markers")
    with pytest.raises(SystemExit, match="expected the lines"):
        main(write)
    markers = methods_table.PAGE.read_text()
    assert markers.index(methods_table.BEGIN) < markers.index(methods_table.END)


def test_what_a_broken_off_training_took_counts_too(tmp_path, monkeypatch):
    place = tmp_path / "ia3" / "seed-0-steps-30" / "1e-3"

    def run(command, **_):
        place.mkdir(parents=True, exist_ok=True)
        raise subprocess.CalledProcessError(130, command)

    monkeypatch.setattr(methods_table.subprocess, "run", run)
    for _ in range(2):
        with pytest.raises(subprocess.CalledProcessError):
            main(["run", "ia3", "--runs", str(tmp_path)])
    assert json.loads((place / "cpu_seconds.json").read_text()) == 0.0


def test_every_method_of_the_union_has_a_row():
    assert {str(one.adapter["method"]) for one in METHODS.values()} == {
        method.name() for method in UNION
    }


@pytest.mark.parametrize("name", METHODS)
def test_every_row_is_a_config(name, tmp_path, monkeypatch):
    def run(command, **_):
        config = load_config(command[4], command[5:])
        assert config.train.max_steps == 7
        raise StopIteration

    monkeypatch.setattr(methods_table.subprocess, "run", run)
    with pytest.raises(StopIteration):
        main(["run", name, "--steps", "7", "--runs", str(tmp_path)])
