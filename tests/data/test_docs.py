"""Every example in docs/data.md works as it stands."""

import json
import re
from pathlib import Path

import pytest
import yaml

from llmtune.data.config import DataConfig
from llmtune.data.example import IGNORE_INDEX
from llmtune.data.formats import FORMATS
from llmtune.data.prepare import prepare_examples
from llmtune.models.config import ModelConfig
from tests.data.shapes import make_shape

TEXT = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^###? ([^\n]+)\n(.*?)(?=^##)", TEXT + "\n##", re.M | re.S))
BLOCKS = [
    (heading, language, block)
    for heading, body in SECTIONS.items()
    for language, block in re.findall(r"^```(json|yaml)\n(.*?)^```", body, re.M | re.S)
]
ROWS = [(heading, block) for heading, language, block in BLOCKS if language == "json"]
CONFIGS = [block for _, language, block in BLOCKS if language == "yaml"]


def read_rows(block: str) -> list[dict]:
    """Return the JSON objects of a block; one may go over several lines."""
    decoder, rows, place = json.JSONDecoder(), [], 0
    while block[place:].strip():
        place += len(block[place:]) - len(block[place:].lstrip())
        row, place = decoder.raw_decode(block, place)
        rows.append(row)
    return rows


def test_every_format_has_an_example_under_its_name():
    assert {heading for heading, _ in ROWS} == set(FORMATS)
    words = ("tool_calls", '"tools"', "reasoning_content", '"history"', '"train"', '"weight"')
    examples = "".join(block for _, block in ROWS)
    assert all(word in examples for word in words)
    knobs = (
        "columns",
        "ignore",
        "replay",
        "weight",
        "rows",
        "limit",
        "render",
        "revision",
        "split",
        "subset",
    )
    assert all(f"{knob}:" in "".join(CONFIGS) for knob in knobs)


@pytest.mark.parametrize(("heading", "block"), ROWS)
def test_rows_of_the_docs_are_recognized_and_trained(tmp_path, heading, block):
    rows = read_rows(block)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = DataConfig(train=[{"path": str(path)}])
    data = prepare_examples(config, make_shape("qwen3"), split="train", seed=0)
    assert data.report.sources[0].format.startswith(f"{heading} ")
    assert data.report.rows_kept == len(rows)
    assert all(any(label != IGNORE_INDEX for label in e.labels) for e in data.examples)


@pytest.mark.parametrize("block", CONFIGS)
def test_configs_of_the_docs_are_valid(block):
    config = yaml.safe_load(block)
    if "model" in config:
        ModelConfig.model_validate(config["model"])
    DataConfig.model_validate({"train": [{"path": "x"}], **config.get("data", {})})
