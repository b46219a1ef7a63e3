"""The readers of small files stand a few mutated ones each; the script runs them for minutes."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import fuzz_readers


@pytest.mark.parametrize("name", fuzz_readers.LIGHT)
def test_a_few_mutated_files_are_accepted_or_refused(name):
    result = fuzz_readers.fuzz(name, seed=1, first=0, seconds=60, most_cases=40)
    assert result.findings == {} and result.cases == 40
    assert result.accepted < 40


def test_what_falls_is_found(monkeypatch):
    """A reader that dies, hangs or raises is a finding, and the cases go on behind it."""
    said = iter(
        ["ready", "case 0", "done ValueError in a.py:1 (b.py): x", "case 1", "hangs for 9 s"]
    )
    later = iter(["ready", "case 2", "done refused"])

    class Process:
        def kill(self):
            pass

        def wait(self):
            pass

    monkeypatch.setattr(fuzz_readers, "_start", lambda *_: Process())
    monkeypatch.setattr(fuzz_readers, "_line", lambda *_: next(said, None) or next(later))
    result = fuzz_readers.fuzz("json", seed=0, first=0, seconds=60, most_cases=3)
    assert result.cases == 3
    assert result.findings == {"ValueError in a.py:1 (b.py): x": [0], "hangs for 9 s": [1]}
