"""Demonstrations come from the training data only, balanced, repeatable, and as many as fit."""

import json
from collections import Counter

import pytest

from llmtune.data.config import DataConfig
from llmtune.data.conversation import chat
from llmtune.data.overlap import conversation_key, is_held_out
from llmtune.evaluation import few_shot
from llmtune.evaluation.few_shot import (
    ROW_WORDING,
    SUITE_WORDING,
    draw_demonstrations,
    read_training_rows,
)
from llmtune.evaluation.requests import encode_prompts
from llmtune.evaluation.suite import load_suite
from tests.conftest import write_jsonl
from tests.project import chat_row, sentences
from tests.tiny import make_tokenizer

SUITE = {
    "task": "choice",
    "items": "items.jsonl",
    "prompt": "{{ text }} positive or negative?",
    "choices": ["positive", "negative"],
}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def make_suite(folder, items=(("The sea is wide.", "positive"),), **keys):
    write_jsonl(folder / "items.jsonl", [{"text": t, "answer": a} for t, a in items])
    (folder / "suite.yaml").write_text(json.dumps(SUITE | keys))
    return load_suite(folder / "suite.yaml")


def make_data(folder, rows, **keys):
    path = write_jsonl(folder / "train.jsonl", rows)
    return DataConfig(train=[{"path": str(path), **keys.pop("source", {})}], **keys)


def draw(rows, suite, tokenizer, *, shots=8, seed="0:1", max_tokens=None):
    return draw_demonstrations(
        rows, suite, tokenizer, shots=shots, seed=seed, max_tokens=max_tokens
    )


@pytest.fixture
def rows(tmp_path):
    data = make_data(tmp_path, [chat_row(*pair) for pair in sentences()])
    return read_training_rows(data, [make_suite(tmp_path)], seed=0)


def test_a_draw_is_balanced_and_depends_on_its_seed_alone(rows, tmp_path, tokenizer):
    suite = make_suite(tmp_path)
    first = draw(rows, suite, tokenizer)
    assert Counter(d.answer for d in first.demonstrations) == {"positive": 4, "negative": 4}
    assert draw(rows, suite, tokenizer) == first
    assert draw(rows, suite, tokenizer, seed="0:2") != first
    assert len(set(first.demonstrations)) == 8
    known = {(f"{text} positive or negative?", label) for text, label in sentences()}
    assert {(d.prompt, d.answer) for d in first.demonstrations} <= known
    assert first.wording == ROW_WORDING


def test_the_tokens_are_those_that_the_demonstrations_add(rows, tmp_path, tokenizer):
    suite = make_suite(tmp_path)
    found = draw(rows, suite, tokenizer)
    with_them, without = (
        len(encode_prompts(tokenizer, suite, shown)[0]) for shown in (found.demonstrations, ())
    )
    assert found.tokens == with_them - without


def test_no_demonstration_is_an_item_of_any_suite_or_a_held_out_row(tmp_path):
    pairs = sentences()
    data = make_data(tmp_path, [chat_row(*pair) for pair in pairs], evaluation_share=0.3)
    asked = pairs[:20]
    suite = make_suite(tmp_path, [(text.upper(), label) for text, label in asked])
    found = {row.question for row in read_training_rows(data, [suite], seed=0)}
    for text, label in pairs:
        question = f"{text} positive or negative?"
        key = conversation_key(chat(chat_row(text, label)["messages"]))
        is_left_out = (text, label) in asked or is_held_out(key, 0.3)
        assert (question in found) != is_left_out


def test_rows_of_evaluation_sources_and_of_replay_are_no_demonstrations(tmp_path):
    rows = [chat_row(*pair) for pair in sentences()]
    train = write_jsonl(tmp_path / "train.jsonl", rows[:10])
    replay = write_jsonl(tmp_path / "replay.jsonl", rows[10:20])
    evaluation = write_jsonl(tmp_path / "evaluation.jsonl", rows[:3])
    data = DataConfig(
        train=[{"path": str(train)}, {"path": str(replay), "replay": True}],
        evaluation=[{"path": str(evaluation)}],
    )
    found = read_training_rows(data, [], seed=0)
    assert [row.question for row in found] == [r["messages"][0]["content"] for r in rows[3:10]]


def test_conversations_of_several_turns_are_left_out(tmp_path):
    talk = chat_row("One.", "positive")["messages"]
    data = make_data(tmp_path, [{"messages": talk * 2}, {"messages": talk}])
    assert len(read_training_rows(data, [], seed=0)) == 1


def test_as_many_are_shown_as_the_context_holds(rows, tmp_path, tokenizer):
    suite = make_suite(tmp_path, [("The sea is wide.", "positive"), ("So " * 40, "negative")])
    longest = max(map(len, encode_prompts(tokenizer, suite)))
    whole = draw(rows, suite, tokenizer)
    some = draw(rows, suite, tokenizer, max_tokens=longest + whole.tokens // 2)
    assert 0 < len(some.demonstrations) < len(whole.demonstrations) == 8
    shown = encode_prompts(tokenizer, suite, some.demonstrations)
    assert max(map(len, shown)) < longest + whole.tokens // 2
    assert draw(rows, suite, tokenizer, max_tokens=longest) is None


def test_the_suites_own_words_are_used_where_the_rows_have_its_fields(tmp_path, tokenizer):
    fields = [{"prompt": "p", "completion": a, "text": t, "answer": a} for t, a in sentences()]
    data = make_data(tmp_path, fields, source={"format": "completion"})
    suite = make_suite(tmp_path, prompt="Judge: {{ text }}")
    rows = read_training_rows(data, [suite], seed=0)
    found = draw(rows, suite, tokenizer)
    assert found.wording == SUITE_WORDING
    assert all(shown.prompt.startswith("Judge: The ") for shown in found.demonstrations)


def test_answers_take_the_spelling_of_the_choices_and_others_are_left_out(tmp_path, tokenizer):
    pairs = [("A.", "Positive"), ("B.", " negative"), ("C.", "neutral"), ("D.", "none")]
    rows = read_training_rows(make_data(tmp_path, [chat_row(*p) for p in pairs]), [], seed=0)
    found = draw(rows, make_suite(tmp_path), tokenizer)
    assert sorted(shown.answer for shown in found.demonstrations) == ["negative", "positive"]
    other = make_suite(tmp_path, [("A.", "x")], choices=["x", "y"])
    assert draw(rows, other, tokenizer) is None


def test_a_large_training_set_is_sampled_over_its_whole_length(tmp_path, monkeypatch):
    monkeypatch.setattr(few_shot, "MAX_POOL", 10)
    data = make_data(tmp_path, [chat_row(f"Number {n}.", "positive") for n in range(200)])
    found = read_training_rows(data, [], seed=0)
    assert len(found) == 10 and found == read_training_rows(data, [], seed=0)
    assert found != read_training_rows(data, [], seed=1)
    numbers = [int(row.question.split()[1].rstrip(".")) for row in found]
    assert numbers == sorted(numbers) and numbers[-1] > 100


def test_a_row_that_is_an_item_in_the_suites_words_is_never_shown(tmp_path, tokenizer):
    """The rows ask otherwise than the suite, so only the rendered prompts tell that they leak."""
    pairs = sentences()
    items = [{"text": text, "answer": answer} for text, answer in pairs]
    data = make_data(
        tmp_path,
        [{**chat_row(f"What of this? {row['text']}", row["answer"]), **row} for row in items],
        source={"format": "messages"},
    )
    suite = make_suite(tmp_path, items=pairs[2:])
    found = draw(read_training_rows(data, [suite], seed=0), suite, tokenizer, shots=64)
    assert found.wording == SUITE_WORDING
    shown = {demonstration.prompt for demonstration in found.demonstrations}
    assert shown == {f"{text} positive or negative?" for text, _ in pairs[:2]}
