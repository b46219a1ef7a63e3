"""Long work shows a bar in a terminal, a line every few seconds elsewhere, nothing if asked."""

import io
import logging
import sys

import pytest

from llmtune.cli import run_command
from llmtune.io import progress
from llmtune.io.fingerprint import hash_file
from llmtune.io.progress import ProgressBar
from tests.project import make_project


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def at_once(monkeypatch):
    """Draw at every update."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_DRAWINGS", 0.0)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setenv("COLUMNS", "100")


def test_a_command_draws_bars_in_a_terminal_only(tmp_path, at_once, monkeypatch, capsys):
    config = str(make_project(tmp_path))

    def check(stream, *options):
        monkeypatch.setattr(sys, "stderr", stream)
        assert run_command(["data", "check", config, "--no-cache", *options]) == 0
        return stream.getvalue()

    drawn = check(Terminal())
    assert "train data: 48 rows, 0:0" in drawn and "near-duplicates: 52 of 52 texts" in drawn
    assert drawn.endswith("\r\x1b[2K"), "the last bar is taken away"
    piped = check(io.StringIO())
    assert "train data: 48 rows, 0:0" in piped and "\x1b" not in piped
    assert check(Terminal(), "--quiet") == ""
    assert "\x1b" not in check(Terminal(), "--json")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    rows = str(tmp_path / "train.jsonl")
    assert run_command(["init", rows, "--out", str(tmp_path / "first.yaml")]) == 0
    assert f"{rows}: 48 rows, 0:0" in terminal.getvalue()


def test_a_bar_says_what_is_left_and_messages_stay_above_it(at_once, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("llmtune.io.progress.time.monotonic", lambda: now[0])
    terminal = Terminal()
    log = logging.getLogger("llmtune")
    monkeypatch.setattr(log, "handlers", [progress.MessageHandler(terminal, draws_bars=True)])
    monkeypatch.setattr(log, "level", logging.INFO)
    bar = ProgressBar("predict", 100, unit="rows")
    bar.update(40)  # an earlier call made them: they say nothing of the pace
    now[0] = 40.0
    bar.update(60)
    log.warning("row 7 is odd")
    bar.close()
    steps = terminal.getvalue().split("\r\x1b[2K")
    assert steps[2] == "[############--------]  60 % predict: 60 of 100 rows, 0:40, left 1:20"
    assert steps[3] == "row 7 is odd\n"
    assert steps[4] == steps[2] and steps[-1] == ""


def test_the_bar_of_a_file_ends_at_its_size(tmp_path, at_once, caplog):
    file = tmp_path / "weights"
    file.write_bytes(b"0" * (3 * 2**20 // 2))
    with caplog.at_level(logging.INFO, logger="llmtune"):
        hash_file(file)
    assert [line.split(",")[0] for line in caplog.messages] == [
        "weights: 1 of 2 MiB read",
        "weights: 2 of 2 MiB read",
    ]
