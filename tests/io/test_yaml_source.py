"""YAML values, where they were written, and overrides laid over them."""

from pathlib import Path

import pytest

from llmtune.errors import LlmtuneError
from llmtune.io.yaml_source import apply_overrides, read_yaml


def write(directory: Path, text: str) -> Path:
    path = directory / "config.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("3.0e-4", 3e-4), ("2E5", 2e5), ("-1.5", -1.5), (".5", 0.5), ("7", 7)],
)
def test_a_number_is_a_number_however_it_is_written(tmp_path, text, value):
    assert read_yaml(write(tmp_path, f"x: {text}")).values == {"x": value}


@pytest.mark.parametrize("word", ["on", "off", "yes", "no"])
def test_words_stay_words(tmp_path, word):
    assert read_yaml(write(tmp_path, f"x: {word}")).values == {"x": word}


def test_every_key_knows_its_line(tmp_path):
    path = write(tmp_path, "a: 1\nb:\n  c: 2\n  d:\n    - e: 3\n")
    tree = read_yaml(path)
    assert tree.origin(("b", "c")) == f"{path}:3"
    assert tree.origin(("b", "d", 0, "e")) == f"{path}:5"
    assert tree.origin(("b", "unwritten")) == f"{path}:2"


def test_a_repeated_key_is_an_error_with_its_line(tmp_path):
    path = write(tmp_path, "a: 1\nb: 2\na: 3\n")
    with pytest.raises(LlmtuneError, match=rf"{path}:3: a: the key is given twice"):
        read_yaml(path)


@pytest.mark.parametrize(
    "text", ["a: &x [*x]", "a: &x {b: *x}", "a: &x {b: {<<: *x}}", "a: &x {b: [1, {c: *x}]}"]
)
def test_an_alias_to_what_it_stands_in_is_an_error_with_its_line(tmp_path, text):
    path = write(tmp_path, text)
    with pytest.raises(LlmtuneError, match=rf"{path}:1: .* holds itself"):
        read_yaml(path)


def test_a_key_given_beside_a_merge_wins_wherever_it_stands(tmp_path):
    path = write(
        tmp_path,
        "base: &base {rank: 8, alpha: 16}\n"
        "more: &more\n  <<: *base\n  alpha: 4\n"
        "last:\n  dropout: 0\n  rank: 2\n  <<: *more\n"
        "same: *more\n",
    )
    tree = read_yaml(path)
    assert tree.values["more"] == {"rank": 8, "alpha": 4}
    assert tree.values["last"] == {"rank": 2, "alpha": 4, "dropout": 0}
    assert tree.values["same"] == tree.values["more"]
    assert tree.origin(("more", "alpha")) == f"{path}:4"
    assert tree.origin(("more", "rank")) == f"{path}:1"


def test_the_earlier_of_two_merged_mappings_wins(tmp_path):
    text = "a: &a {x: 1}\nb: &b {x: 2, y: 2}\nc:\n  <<: [*a, *b]\n"
    assert read_yaml(write(tmp_path, text)).values["c"] == {"x": 1, "y": 2}


def test_a_key_repeated_beside_a_merge_is_still_an_error(tmp_path):
    path = write(tmp_path, "a: &a {x: 1}\nb:\n  <<: *a\n  x: 2\n  x: 3\n")
    with pytest.raises(LlmtuneError, match=rf"{path}:5: x: the key is given twice"):
        read_yaml(path)


@pytest.mark.parametrize("text", ["a: [1,\nb: 2", "a: 'x", "\tb: 1"])
def test_broken_yaml_is_named_with_its_line(tmp_path, text):
    with pytest.raises(LlmtuneError, match=r"config.yaml:\d+: not valid YAML"):
        read_yaml(write(tmp_path, text))


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(LlmtuneError, match="no such file"):
        read_yaml(tmp_path / "none.yaml")


def test_a_list_at_the_top_is_refused(tmp_path):
    with pytest.raises(LlmtuneError, match="expected `key: value` lines, found list"):
        read_yaml(write(tmp_path, "- 1"))


def test_overrides_are_yaml_and_remember_themselves(tmp_path):
    tree = read_yaml(write(tmp_path, "a: {b: 1}\nrows: [{path: x}]\n"))
    changed = apply_overrides(tree, ["a.b=1e-4", "a.c=[1, 2]", "rows.0.path=y", "new.key=true"])
    assert changed.values == {
        "a": {"b": 1e-4, "c": [1, 2]},
        "rows": [{"path": "y"}],
        "new": {"key": True},
    }
    assert changed.origin(("a", "b")) == "override a.b=1e-4"
    assert tree.values["a"] == {"b": 1}


@pytest.mark.parametrize(
    "override", ["a", "=1", "a.b.c=1", "rows.7.path=x", "a.b=[1,", "a=&x [*x]", "a={b: 1, b: 2}"]
)
def test_an_override_that_cannot_be_laid_is_refused(tmp_path, override):
    tree = read_yaml(write(tmp_path, "a: {b: 1}\nrows: [{path: x}]\n"))
    with pytest.raises(LlmtuneError, match="override"):
        apply_overrides(tree, [override])


def test_aliases_of_aliases_and_deep_lists_end_at_once(tmp_path):
    path = tmp_path / "a.yaml"
    for first, form in (("[x]", "[{}]"), ("{x: 1}", "{{<<: [{}]}}")):
        lines = [f"a0: &a0 {first}"]
        for depth in range(8):
            lines.append(f"a{depth + 1}: &a{depth + 1} " + form.format(f"*a{depth}, " * 9))
        expected = {"": "holds more than 100,000 values", "? *a8\n: 1": "a key is one word"}
        for last, message in expected.items():
            path.write_text("\n".join([*lines, last]))
            with pytest.raises(LlmtuneError, match=message):
                read_yaml(path)
    path.write_text("a: " + "[" * 10**5)
    with pytest.raises(LlmtuneError, match="nested too deeply"):
        read_yaml(path)
