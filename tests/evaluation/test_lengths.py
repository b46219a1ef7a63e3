"""Items that a model has too few positions for are named before anything is trained."""

import json

import pytest

from llmtune.cli import run_command
from llmtune.config import load_config
from llmtune.errors import LlmtuneError
from llmtune.evaluation.lengths import refuse_unfit_items
from llmtune.evaluation.suite import load_suite
from llmtune.runs.pipeline import run, train
from tests.conftest import write_jsonl
from tests.project import chat_row, make_project
from tests.tiny import make_tokenizer

SHORT, LONG = "a dog", "a dog " * 700


@pytest.fixture
def make_suite(tmp_path):
    def make(**declared):
        write_jsonl(tmp_path / "i.jsonl", [{"q": text, "answer": "yes"} for text in (SHORT, LONG)])
        values = {"items": "i.jsonl", **declared}
        (tmp_path / "s.yaml").write_text(json.dumps(values))
        return load_suite(tmp_path / "s.yaml")

    return make


ASKED = {"prompt": "{{ q }}"}
KINDS = [
    {"task": "choice", "choices": ["yes", "no"], **ASKED},
    {"task": "choice", "choices": ["yes", "no"], "chat": False, **ASKED},
    {"task": "exact", **ASKED},
    {"task": "perplexity", "text": "q", "max_length": 2000},
]


@pytest.mark.parametrize("declared", KINDS)
def test_an_item_too_long_is_named_by_file_and_line(make_suite, declared):
    suite = make_suite(**declared)
    with pytest.raises(LlmtuneError, match=r"i\.jsonl:2: takes [\d,]+ tokens, and the model has 5"):
        refuse_unfit_items(make_tokenizer(), [suite], 512)
    refuse_unfit_items(make_tokenizer(), [suite], 8192)
    refuse_unfit_items(make_tokenizer(), [suite], None)


def test_a_passage_is_cut_into_windows_that_fit(make_suite):
    suite = make_suite(task="perplexity", text="q", max_length=500)
    refuse_unfit_items(make_tokenizer(), [suite], 512)


def test_a_run_refuses_long_items_before_it_trains(tmp_path):
    config = load_config(make_project(tmp_path / "project"))
    items = tmp_path / "project" / "items.jsonl"
    lines = items.read_text().splitlines()
    lines[2] = json.dumps({"id": "long", "text": LONG, "answer": "positive"})
    items.write_text("\n".join(lines) + "\n")
    for command in (train, run):
        with pytest.raises(LlmtuneError, match=r"items\.jsonl:3: takes"):
            command(config)
    assert not config.run.adapter_dir.exists()


@pytest.mark.parametrize(
    ("family", "key"), [("llama", "max_position_embeddings"), ("gpt2", "n_positions")]
)
def test_rows_and_items_beyond_the_positions_are_named_before_the_first_step(
    tmp_path, capsys, family, key
):
    config = make_project(tmp_path, family)
    tree = json.loads(config.read_text())
    train = tmp_path / "train.jsonl"
    tree["data"] = {"train": [{"path": str(train)}], "packing": "off"}
    config.write_text(json.dumps(tree))
    long = chat_row("word " * 300, "positive")
    with train.open("a") as file:
        file.write(json.dumps(long) + "\n")
    with (tmp_path / "items.jsonl").open("a") as file:
        file.write(json.dumps({"id": "long", "text": LONG, "answer": "positive"}) + "\n")
    assert json.loads((tmp_path / "base" / "config.json").read_text())[key] == 512
    assert run_command(["data", "check", str(config), "--quiet"]) == 1
    shown = capsys.readouterr().out
    assert "train.jsonl:49: " in shown
    assert "items.jsonl:13: takes" in shown
    items = tmp_path / "items.jsonl"
    items.write_text("".join(items.read_text().splitlines(keepends=True)[:-1]))
    assert run_command(["train", str(config), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert "train: 1 rows are longer than the model's 512 positions" in error
    assert f"{train}:49 (" in error
    assert not (tmp_path / "run").exists()
