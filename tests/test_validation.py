"""Config errors: all at once, each with place, key, expectation and the nearest valid key."""

from typing import Annotated, Literal

import pytest
from pydantic import Field, model_validator

from llmtune.errors import LlmtuneError
from llmtune.schema import Section
from llmtune.validation import known_keys, validate_section
from llmtune.yaml_source import SourcedTree, read_yaml


class Circle(Section):
    kind: Literal["circle"] = "circle"
    radius: float = 1.0


class Square(Section):
    kind: Literal["square"] = "square"
    side: float = 1.0


class Drawing(Section):
    shape: Annotated[Circle | Square, Field(discriminator="kind")] = Circle()
    more: list[Circle] = []
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
    assert "title: required, and not given" in lines
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


def test_known_keys_covers_every_member_of_a_union():
    keys = known_keys(Drawing)
    assert keys[("shape",)] == {"kind", "radius", "side"}
    assert keys[("more", "*")] == {"kind", "radius"}


def test_a_valid_tree_becomes_its_section():
    drawing = validate_section(Drawing, SourcedTree({"title": "x", "shape": {"kind": "square"}}))
    assert drawing.shape == Square()
    with pytest.raises(ValueError, match="frozen"):
        drawing.title = "y"
