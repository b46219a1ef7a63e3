"""Every knob of the data sections does something: each is turned, and something must change."""

import json

import pytest

from llmtune.data.collect import Split
from llmtune.data.config import DataConfig, MixtureConfig, SourceConfig
from llmtune.data.prepare import prepare_examples
from llmtune.errors import LlmtuneError
from llmtune.io.cached import cache_dir
from tests.data.shapes import make_shape, turns, write_jsonl
from tests.data.test_hub import HUB_KNOBS

HELD_ELSEWHERE = {
    "system": "tests/test_cli.py: the template that every stage renders with prints it",
    "packing": "tests/training/test_packing.py and test_sft.py: packed or padded micro-batches",
    "mixture": "its own knobs below",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("rows")
    chats = [{"messages": turns(f"q {i}", "first", f"and {i}", f"answer {i}")} for i in range(12)]
    long = {"messages": turns("word " * 90, "short")}
    contents = {
        "chats": chats,
        "more": [{"messages": turns(f"other {i}", f"one {i}")} for i in range(5)],
        "held": [{"messages": turns("held", "out")}],
        "pairs": [{"prompt": f"p {i}", "completion": f"c {i}"} for i in range(4)],
        "renamed": [{"q": f"p {i}", "prompt": "no", "completion": f"c {i}"} for i in range(4)],
        "both": [{"text": "a document", "prompt": "p", "completion": "c"}],
        "bad": [*chats, {"messages": []}],
        "long": [*chats, *[long] * 2],
        "labeled": [{"text": "a document", "label": "good"}],
        "texts": [{"text": "the lazy dog " * 20}],
        "numbered": [{"prompt": f"p {i}", "completion": i % 2} for i in range(4)],
        "accents": [{"prompt": "caf\u00e9", "completion": "c"}],
    }
    found = {
        name: write_jsonl(directory / f"{name}.jsonl", rows) for name, rows in contents.items()
    }
    table = directory / "table.csv"
    table.write_text("prompt;completion\na;b\n")
    return found | {"table": str(table)}


def outcome(data: dict, split: Split) -> str:
    """Return everything that preparing gives, or the error it ends with."""
    config = DataConfig.model_validate(data)
    try:
        prepared = prepare_examples(config, make_shape("chatml"), split=split, seed=0)
    except LlmtuneError as error:
        return str(error)
    return json.dumps([prepared.fingerprint, prepared.order_hash, prepared.report.to_json()])


def outcomes(data: dict) -> list[str]:
    kept = len(list((cache_dir() / "data").glob("*")))
    both = [outcome(data, "train"), outcome(data, "evaluation")]
    return [*both, str(len(list((cache_dir() / "data").glob("*"))) > kept)]


# knob -> (the file, what else stands beside it, the knob's other value)
SOURCE = {
    "path": ("chats", {}, "more"),
    "format": ("both", {}, "text"),
    "columns": ("renamed", {}, {"prompt": "q"}),
    "render": ("pairs", {}, "plain"),
    "weight": ("chats", {}, 0.5),
    "rows": ("chats", {}, 3),
    "ignore": ("labeled", {}, ["label"]),
    "limit": ("chats", {}, 3),
    "replay": ("chats", {}, True),
    "instruction": ("pairs", {"format": "completion"}, "Say c."),
    "labels": ("numbered", {"format": "completion"}, ["no", "yes"]),
    "encoding": ("accents", {}, "cp1252"),
    "delimiter": ("table", {}, ";"),
}
MIXTURE = {
    "temperature": ([{"path": "chats"}, {"path": "more"}], 3.0),
    "max_repeats": ([{"path": "more", "weight": 9}], 7.0),
    "replay_share": ([{"path": "chats"}, {"path": "more", "replay": True}], 0.5),
}
DATA = {
    "train": ("chats", {}, [{"path": "more"}]),
    "evaluation": ("chats", {}, [{"path": "held"}]),
    "evaluation_share": ("chats", {}, 0.3),
    "max_length": ("long", {}, 64),
    "length_policy": ("texts", {"max_length": 20}, "split"),
    "loss_on": ("chats", {}, "last-assistant"),
    "on_bad_row": ("bad", {}, "drop"),
    "cache": ("chats", {}, False),
}


def with_files(value, files):
    """Put real paths where a case names a file."""
    if isinstance(value, list):
        return [with_files(one, files) for one in value]
    if isinstance(value, dict) and value.get("path") in files:
        return value | {"path": files[value["path"]]}
    return value


@pytest.mark.parametrize("knob", SOURCE)
def test_every_knob_of_a_source_changes_what_is_prepared(files, knob):
    name, beside, other = SOURCE[knob]
    second = {"path": files["held"]}  # a replay source needs one that is none
    before = {"path": files[name], **beside}
    after = before | {knob: files[other] if knob == "path" else other}
    assert outcomes({"train": [before, second]}) != outcomes({"train": [after, second]})


@pytest.mark.parametrize("knob", MIXTURE)
def test_every_knob_of_the_mixture_changes_what_is_prepared(files, knob):
    sources, other = MIXTURE[knob]
    data = {"train": with_files(sources, files)}
    assert outcomes(data) != outcomes(data | {"mixture": {knob: other}})


@pytest.mark.parametrize("knob", DATA)
def test_every_knob_of_the_data_changes_what_is_prepared(files, knob):
    name, beside, other = DATA[knob]
    data = {"train": [{"path": files[name]}], **beside}
    assert outcomes(data) != outcomes(data | {knob: with_files(other, files)})


def test_no_knob_is_left_out():
    assert {*SOURCE, *HUB_KNOBS} == {*SourceConfig.model_fields}
    assert {*MIXTURE} == {*MixtureConfig.model_fields}
    assert {*DATA, *HELD_ELSEWHERE} == {*DataConfig.model_fields}


def test_the_same_values_change_nothing(files):
    """The comparison above is no accident: without a change everything is equal."""
    for name in ("chats", "long", "both"):
        data = {"train": [{"path": files[name]}], "cache": False}
        assert outcomes(data) == outcomes(data)
