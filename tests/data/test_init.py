"""`init` writes a config that reads the user's own file."""

from typing import Any

import pytest
import yaml

from llmtune.data.config import DataConfig
from llmtune.data.init import describe_data
from llmtune.data.init_config import render_config
from llmtune.data.init_splits import find_splits
from llmtune.data.prepare import prepare_examples
from llmtune.errors import LlmtuneError
from tests.data.shapes import make_shape, turns, write_jsonl

ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": turns("a", "b")},
    "chat": {"conversation": turns("a", "b")},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "instruction": {"instruction": "a", "input": "x", "output": "b"},
    "questions": {"question": "a", "answer": "b"},
    "capitals": {"Question": "a", "Answer": "b", "id": 3},
    "completion": {"prompt": "a", "completion": "b"},
    "preferences": {"prompt": "a", "response": "b"},
    "text": {"text": "a document"},
    "articles": {"article": "a document", "yes": 1},
}


@pytest.mark.parametrize("name", ROWS)
def test_written_config_prepares_the_data(tmp_path, name):
    path = write_jsonl(tmp_path / "my rows #1.jsonl", [{**ROWS[name], "n": i} for i in range(3)])
    tokenizer = make_shape("chatml")
    text = render_config(describe_data(path, tokenizer=tokenizer), base="org/model")
    tree = yaml.safe_load(text)
    assert tree["model"]["base"] == "org/model"
    config = DataConfig.model_validate(tree["data"] | {"evaluation_share": 0})
    data = prepare_examples(config, tokenizer, split="train", seed=0)
    assert len(data.examples) == 3
    assert config.train[0].format != "auto"
    assert data.report.length_max <= config.max_length
    assert "# " in text and "tokenizer" in text


def test_directory_with_splits_is_told_apart(tmp_path):
    for name in ("train", "validation", "test"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": name}])
    found = describe_data(str(tmp_path))
    assert found.train_path.endswith("train.jsonl")
    assert found.evaluation_path.endswith("validation.jsonl")
    text = render_config(found)
    assert found.test.path.endswith("test.jsonl") and "evaluation_share" not in text
    assert not found.is_measured and "guessed" in text


def test_base_without_template_gets_plain_completions(tmp_path):
    shape = make_shape("chatml")
    bare = shape.__class__(tokenizer_object=shape.backend_tokenizer, eos_token="<|im_end|>")
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": " b"}])
    assert "render: plain" in render_config(describe_data(path, tokenizer=bare))


def test_documents_that_are_called_as_splits_are(tmp_path):
    """Two of five pages are no splits; three of four files are."""
    pages, sets = tmp_path / "pages", tmp_path / "sets"
    for folder in (pages, sets):
        folder.mkdir()
    for name in ("training", "evaluation", "merge", "export", "plan"):
        (pages / f"{name}.md").write_text(f"# About {name}\n\nA page of its own.\n")
    for name in ("train", "valid", "test", "README"):
        (sets / f"{name}.txt").write_text(f"The {name} text.\n")

    found = find_splits(str(pages))
    assert (found.train.path, found.evaluation, found.left_out) == (str(pages), None, ())
    assert "5 documents; evaluation.md is one of them, not a split" in found.notes[-1]
    found = find_splits(str(sets))
    assert found.train.path.endswith("train.txt") and found.test.path.endswith("test.txt")
    assert found.left_out == (str(sets / "README.txt"),)


def test_unknown_columns_and_bad_rows_are_clear_errors(tmp_path):
    with pytest.raises(LlmtuneError, match="no format fits"):
        describe_data(write_jsonl(tmp_path / "a.jsonl", [{"x": 1}]))
    with pytest.raises(LlmtuneError, match="no row can be used"):
        describe_data(write_jsonl(tmp_path / "b.jsonl", [{"messages": []}]))
    with pytest.raises(LlmtuneError, match="no such file"):
        describe_data(str(tmp_path / "c.jsonl"))
