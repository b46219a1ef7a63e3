"""Files in the shapes of published instruction data: what a person expects is what is trained.

The rows in `instruction_files/` are written by hand after the schemas of the data sets they are
named for. `expected.json` says of each what is trained, what is before it, or why it is refused.
"""

import json
from pathlib import Path

import pytest

from tests.data.instruction_files import assert_read_as_expected, make_base

FILES = Path(__file__).parent / "instruction_files"
EXPECTED = json.loads((FILES / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("instruction"))


def test_every_file_has_an_expectation():
    written = {path.name for path in FILES.iterdir()} - {"expected.json"}
    assert written == {name for name, case in EXPECTED.items() if "made_from" not in case}
    assert len(EXPECTED) >= 40


@pytest.mark.parametrize("name", EXPECTED)
def test_a_file_is_read_as_a_person_would(name, base, tmp_path, monkeypatch, capsys):
    case = EXPECTED[name]
    monkeypatch.chdir(tmp_path)
    source = FILES / case.get("made_from", name)
    assert_read_as_expected(case, name, source, base, capsys)
