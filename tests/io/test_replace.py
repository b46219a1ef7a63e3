"""Nothing is replaced unasked, and nothing but an earlier result at all."""

import pytest

from llmtune.errors import LlmtuneError
from llmtune.io.unfinished import refuse_to_replace


def check(out, *, force: bool) -> None:
    refuse_to_replace(
        out, product="a letter", is_own=lambda path: path.suffix == ".letter", force=force
    )


def test_a_free_place_may_be_written(tmp_path):
    check(tmp_path / "a.letter", force=False)


def test_an_earlier_result_is_replaced_only_when_asked(tmp_path):
    (tmp_path / "a.letter").write_text("dear")
    with pytest.raises(LlmtuneError, match="exists already"):
        check(tmp_path / "a.letter", force=False)
    check(tmp_path / "a.letter", force=True)


def test_anything_else_is_never_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("kept")
    with pytest.raises(LlmtuneError, match="is not a letter, so it is not replaced"):
        check(tmp_path / "thesis.txt", force=True)
