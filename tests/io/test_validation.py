"""Config errors: all at once, each with place, key, expectation and the nearest valid key."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, model_validator

from llmtune.errors import LlmtuneError
from llmtune.io.validation import known_keys, validate_section
from llmtune.io.yaml_source import SourcedTree, read_yaml
from llmtune.schema import Section


class Circle(Section):
    kind: Literal["circle"] = "circle"
    radius: float = 1.0


class Square(Section):
    kind: Literal["square"] = "square"
    side: float = 1.0


class Drawing(Section):
    shape: Annotated[Circle | Square, Field(discriminator="kind")] = Circle()
    frame: Annotated[Circle | Square, Field(discriminator="kind")] | None = None
    more: list[Circle] = []
    colors: Annotated[list[int], Field(min_length=1)] = [0]
    texture: Path | None = None
    code: Annotated[str, Field(pattern=r"^[a-z]+$")] = "a"
    steps: Literal["auto"] | int = "auto"
    filled: Literal["auto"] | bool = "auto"
    weights: dict[str, float] = {}
    title: str
    width: int | None = None

    @model_validator(mode="after")
    def _check(self):
        if self.width == 13:
            raise ValueError("width 13 brings bad luck; choose another")
        return self


def message(tmp_path, text):
    path = tmp_path / "drawing.yaml"
    path.write_text(text)
    with pytest.raises(LlmtuneError) as caught:
        validate_section(Drawing, read_yaml(path))
    return str(caught.value).replace(str(path), "FILE")


def test_every_problem_is_reported_at_once(tmp_path):
    text = "shape: {kind: circle, radus: 2}\nmore:\n  - radius: wide\nwith: 3\n"
    lines = message(tmp_path, text).splitlines()
    assert lines[0] == "4 problems:"
    assert "FILE:1: shape.radus: unknown key; did you mean shape.radius?" in lines
    assert "FILE:3: more.0.radius: expected a valid number, found 'wide'" in lines
    assert "FILE: title: required, and not given" in lines
    assert "FILE:4: with: unknown key; did you mean width?" in lines


def test_a_key_of_another_section_is_found(tmp_path):
    text = "title: x\nradius: 3\n"
    assert "did you mean more.*.radius?" in message(tmp_path, text) or (
        "did you mean shape.radius?" in message(tmp_path, text)
    )


def test_an_unknown_member_names_the_members(tmp_path):
    found = message(tmp_path, "title: x\nshape: {kind: blob}\n")
    assert found == "FILE:2: shape: 'kind' is one of 'circle', 'square'; found 'blob'"


def test_a_rule_between_keys_speaks_for_itself(tmp_path):
    assert message(tmp_path, "title: x\nwidth: 13\n").endswith(
        "width 13 brings bad luck; choose another"
    )


@pytest.mark.parametrize("text", [".inf", "-.inf", ".nan"])
def test_a_number_must_be_finite(tmp_path, text):
    found = message(tmp_path, f"title: x\nshape: {{kind: circle, radius: {text}}}\n")
    assert found.startswith("FILE:2: shape.radius: expected a finite number, found ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("colors: []", "colors: expected at least 1 item, found []"),
        ("texture: 3", "texture: expected a path, found 3"),
        ("code: A1", "code: expected text that matches '^[a-z]+$', found 'A1'"),
        ("weights: 3", "weights: expected a mapping, found 3"),
        ("more: {}", "more: expected a list, found {}"),
        ("frame: square", "frame: expected a mapping such as {kind: square}, found 'square'"),
        ("frame: 3", "frame: expected a mapping such as {kind: circle}, found 3"),
        ("shape: square", "shape: expected a mapping such as {kind: square}, found 'square'"),
        ("more: [wide]", "more.0: expected a mapping with keys such as kind, radius, found 'wide'"),
    ],
)
def test_what_was_expected_is_said_in_plain_words(tmp_path, text, expected):
    assert message(tmp_path, f"title: x\n{text}\n") == f"FILE:2: {expected}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("width: true", "width: expected a valid integer, found 'true'"),
        ("steps: false", "steps: expected a valid integer, found 'false'"),
        ("colors: [1, true]", "colors.1: expected a valid integer, found 'true'"),
        ("weights: {a: true}", "weights.a: expected a valid number, found 'true'"),
    ],
)
def test_true_is_not_a_number(tmp_path, text, expected):
    assert f"FILE:2: {expected}" in message(tmp_path, f"title: x\n{text}\n").splitlines()


def test_true_stays_true_where_it_may_stand():
    assert validate_section(Drawing, SourcedTree({"title": "x", "filled": True})).filled is True


def test_known_keys_covers_every_member_of_a_union():
    keys = known_keys(Drawing)
    assert keys[("shape",)] == {"kind", "radius", "side"}
    assert keys[("more", "*")] == {"kind", "radius"}


def test_a_valid_tree_becomes_its_section():
    drawing = validate_section(Drawing, SourcedTree({"title": "x", "shape": {"kind": "square"}}))
    assert drawing.shape == Square()
    with pytest.raises(ValueError, match="frozen"):
        setattr(drawing, "title", "y")  # noqa: B010 (a type checker sees the plain form)
