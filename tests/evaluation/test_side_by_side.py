"""What base and tuned model are shown answering: never nothing."""

from typing import Any

import pytest

from llmtune.data.config import DataConfig
from llmtune.data.example import IGNORE_INDEX, Example, split_answer
from llmtune.data.prepare import prepare_examples
from llmtune.evaluation.diagnosis.subject import Subject, target_prompts
from llmtune.evaluation.side_by_side import find_prompts
from tests.conftest import write_jsonl
from tests.tiny import make_tokenizer

DOCUMENTS = [f"The {word} film was seen by many people in the town." for word in ("old", "new")]


@pytest.mark.parametrize("has_template", [True, False])
def test_a_document_is_continued_from_its_middle(tmp_path, has_template):
    tokenizer = make_tokenizer()
    if not has_template:
        tokenizer.chat_template = None
    train = write_jsonl(tmp_path / "train.jsonl", [{"text": "Something else."}])
    held_out = write_jsonl(tmp_path / "held.jsonl", [{"text": text} for text in DOCUMENTS])
    data = DataConfig.model_validate(
        {"train": [{"path": str(train)}], "evaluation": [{"path": str(held_out)}], "cache": False}
    )
    shown = find_prompts(tokenizer, [], data, seed=0)[:2]
    assert [each.text + each.reference for each in shown] == DOCUMENTS
    assert all(each.ids and each.reference for each in shown)
    split = prepare_examples(data, tokenizer, split="evaluation", seed=0)
    model: Any = None  # no suite asks, so none is looked at
    subject = Subject(model, (), split.examples, (), split.examples)
    halves = target_prompts(subject, limit=4, seed=0, with_documents=True)
    assert halves == [tuple(each.ids) for each in shown]
    assert target_prompts(subject, limit=4, seed=0) == []


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        ([2, 3], ([10, 11], [12, 13])),
        ([2, 4], ([10, 11], [12])),
        ([0, 1, 2, 3, 4], ([10, 11], [12, 13, 14])),
        ([], None),
    ],
)
def test_the_first_answer_is_what_follows_the_prompt(trained, expected):
    ids = [10, 11, 12, 13, 14]
    labels = [token if place in trained else IGNORE_INDEX for place, token in enumerate(ids)]
    assert split_answer(Example(ids, labels, "f", 1)) == expected
