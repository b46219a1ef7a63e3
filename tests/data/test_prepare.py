"""Sources to examples: bad rows, lengths, mixtures, splits and what is reported."""

import json
import subprocess
import sys
import textwrap
import tracemalloc

import numpy as np
import pytest
from pydantic import ValidationError

from llmtune.data import collect
from llmtune.data.collect import iter_chunks
from llmtune.data.config import DataConfig, SourceConfig
from llmtune.data.example import IGNORE_INDEX, ExampleTableBuilder
from llmtune.data.masks import Labeller
from llmtune.data.prepare import prepare_examples
from llmtune.data.rows import open_source
from llmtune.errors import LlmtuneError
from tests.data.shapes import make_shape, turns, write_jsonl
from tests.versions import without_torch


def row(question: str, answer: str) -> dict:
    return {"messages": turns(question, answer)}


def rows(count: int, prefix: str = "q") -> list[dict]:
    return [row(f"{prefix} {index}?", f"answer {index}") for index in range(count)]


def prepare(tokenizer=None, split="train", seed=0, **data):
    config = DataConfig.model_validate(data)
    return prepare_examples(config, tokenizer or make_shape("chatml"), split=split, seed=seed)


def refusal(tmp_path, bad: list, **data) -> str:
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows(17), *bad])
    with pytest.raises(LlmtuneError) as error:
        prepare(train=[{"path": path, **data.pop("source", {})}], **data)
    return str(error.value)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (
            {"messages": [{"role": "usr", "content": "a"}, {"role": "assistant", "content": "b"}]},
            ['role "usr"', 'did you mean "user"'],
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "asistant", "content": "b"}]},
            ['role "asistant"', 'did you mean "assistant"'],
        ),
        (
            {"messages": [{"role": "user", "text": "a"}, {"role": "assistant", "text": "b"}]},
            ['no "content"', "text"],
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": None},
                ]
            },
            ["content is null"],
        ),
        ({"messages": [{"role": "user", "content": "a"}]}, ["no assistant turn"]),
        ({"messages": []}, ["messages is empty"]),
        ({"messages": turns("a", "  ")}, ["content is empty"]),
        ({"text": "hello"}, ["no column 'messages'", "found text"]),
        ('{"messages": [', ["not JSON"]),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": [{"type": "image", "url": "x"}]},
                ]
            },
            ["image", "text parts"],
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {
                        "role": "assistant",
                        "tool_calls": [{"function": {"name": "f", "arguments": "{not json"}}],
                    },
                ]
            },
            ["not JSON"],
        ),
        (
            '{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", '
            '"content": "b"}]}',
            ["half of a character pair"],
        ),
    ],
)
def test_bad_row_is_refused_with_file_and_line(tmp_path, bad, words):
    message = refusal(tmp_path, [bad])
    assert "rows.jsonl:18: " in message
    assert all(word in message for word in words), message
    assert "1 of 18 rows" in message


def test_empty_completion_is_refused(tmp_path):
    path = write_jsonl(
        tmp_path / "rows.jsonl",
        [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}],
    )
    with pytest.raises(LlmtuneError, match=r"rows.jsonl:2: completion is empty"):
        prepare(train=[{"path": path}])


def test_all_bad_rows_are_reported_at_once(tmp_path):
    message = refusal(tmp_path, [{"messages": []}] * 14)
    assert "14 of 31 rows" in message
    assert message.count("rows.jsonl:") == 10
    assert "... and 4 more" in message


def test_dropped_rows_are_counted_and_listed(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows(5), {"messages": []}, *rows(2, "z")])
    data = prepare(train=[{"path": path}], on_bad_row="drop")
    assert (data.report.rows_read, data.report.rows_kept, data.report.num_bad_rows) == (8, 7, 1)
    assert data.report.bad_rows[0].line == 6
    assert any("rows.jsonl:6" in line for line in data.report.lines())
    json.dumps(data.report.to_json())


def test_nothing_left_after_dropping_is_an_error(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": []}] * 3)
    with pytest.raises(LlmtuneError, match="no row is left"):
        prepare(train=[{"path": path}], on_bad_row="drop")


def test_rows_too_long_stop_the_run_and_are_named(tmp_path):
    long = [row(f"long {i} " + "word " * 60, "answer " * 9) for i in range(4)]
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows(4), *long])
    with pytest.raises(LlmtuneError) as error:
        prepare(train=[{"path": path}], max_length=64)
    message = str(error.value)
    assert "4 of 8 rows" in message and "p95" in message and "max_length" in message
    assert all(f"rows.jsonl:{line} " in message for line in (5, 6, 7, 8))
    data = prepare(train=[{"path": path}], max_length=64, length_policy="drop")
    assert len(data.examples) == 4
    assert data.report.rows_dropped_for_length == 4
    assert data.report.trained_tokens_lost > 0


def test_all_rows_too_long_is_a_sentence_about_length(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", rows(3))
    for policy in ("error", "drop"):
        with pytest.raises(LlmtuneError, match=r"every row is longer than data.max_length=4"):
            prepare(train=[{"path": path}], max_length=4, length_policy=policy)


def test_truncated_prompt_keeps_the_answer_and_the_turns(tmp_path):
    tokenizer = make_shape("chatml")
    path = write_jsonl(tmp_path / "rows.jsonl", [row("first " + "w " * 90 + "last", "the answer")])
    (example,) = prepare(
        train=[{"path": path}], max_length=60, length_policy="truncate-prompt"
    ).examples
    assert len(example.input_ids) == 60
    text = tokenizer.decode(example.input_ids)
    assert text.startswith("<|im_start|>user\nfirst") and "last<|im_end|>" in text
    trained = [token for token in example.labels if token != IGNORE_INDEX]
    assert tokenizer.decode(trained) == "the answer<|im_end|>"
    places = [i for i, label in enumerate(example.labels) if label != IGNORE_INDEX]
    assert [example.input_ids[i] for i in places] == trained


def test_split_text_loses_no_token(tmp_path):
    tokenizer = make_shape("chatml")
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "the lazy dog " * 40}])
    whole = prepare(train=[{"path": path}]).examples[0]
    data = prepare(train=[{"path": path}], max_length=16, length_policy="split")
    pieces = sorted(data.examples, key=len_of_ids, reverse=True)
    assert sum(len(piece.input_ids) for piece in pieces) == len(whole.input_ids)
    assert whole.input_ids[-1] == tokenizer.eos_token_id == pieces[-1].input_ids[-1]
    assert data.report.stop_row_ratio == 1.0
    length = len(whole.input_ids)
    one_left = next(n for n in range(3, length) if length % n == 1)
    data = prepare(train=[{"path": path}], max_length=one_left, length_policy="split")
    lengths = [len(piece.input_ids) for piece in data.examples]
    assert sum(lengths) == length and min(lengths) == 2, "one token alone cannot be trained"


def len_of_ids(example) -> int:
    return len(example.input_ids)


def test_order_depends_on_the_seed_alone(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", rows(50))
    first = prepare(train=[{"path": path}], seed=1)
    again = prepare(train=[{"path": path}], seed=1)
    other = prepare(train=[{"path": path}], seed=2)
    assert first.order_hash == again.order_hash != other.order_hash
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert sorted(e.line for e in first.examples) == list(range(1, 51))


def test_order_hash_is_pinned(tmp_path):
    """Another value here would change the order of every run: a resumed run would differ."""
    path = write_jsonl(tmp_path / "rows.jsonl", rows(8))
    lines = [example.line for example in prepare(train=[{"path": path}], seed=0).examples]
    assert lines == PINNED_ORDER


PINNED_ORDER = [2, 4, 3, 5, 6, 1, 7, 8]


def test_weights_repeats_and_replay_share_the_epoch(tmp_path):
    big = write_jsonl(tmp_path / "big.jsonl", rows(90))
    small = write_jsonl(tmp_path / "small.jsonl", rows(10, "s"))

    def counts(*sources, **mixture):
        data = prepare(train=list(sources), mixture=mixture)
        return np.bincount(data.examples.source_indices, minlength=len(sources)).tolist()

    assert counts({"path": big}, {"path": small}) == [90, 10]
    assert counts({"path": big, "weight": 0.5}, {"path": small, "weight": 2}) == [45, 20]
    assert counts({"path": big}, {"path": small, "weight": 9}) == [90, 40]
    assert counts({"path": big}, {"path": small, "weight": 9}, max_repeats=9) == [90, 90]
    assert counts({"path": big, "rows": 30}, {"path": small}) == [30, 10]
    assert counts({"path": big}, {"path": small}, temperature=2) == [75, 25]
    assert counts({"path": big}, {"path": small, "replay": True}, replay_share=0.1) == [90, 10]
    assert counts({"path": small}, {"path": big, "replay": True}, replay_share=0.5) == [10, 10]


def test_repeats_cut_off_are_reported(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", rows(10))
    data = prepare(train=[{"path": path, "weight": 9}])
    assert any("max_repeats" in line for line in data.report.lines())


def test_row_shared_with_evaluation_is_refused_and_counted(tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", rows(9))
    held = write_jsonl(tmp_path / "held.jsonl", [row("Q  3?", "Answer 3"), row("new", "one")])
    with pytest.raises(LlmtuneError, match=r"1 train rows are also") as error:
        prepare(train=[{"path": train}], evaluation=[{"path": held}])
    assert "train.jsonl:4" in str(error.value) and "held.jsonl:1" in str(error.value)


def test_evaluation_share_is_stable_when_rows_are_added(tmp_path):
    few = write_jsonl(tmp_path / "few.jsonl", rows(100))
    many = write_jsonl(tmp_path / "many.jsonl", [*rows(40, "z"), *rows(100)])

    def texts(path, split):
        tokenizer = make_shape("chatml")
        data = prepare(train=[{"path": path}], evaluation_share=0.2, split=split)
        return {tokenizer.decode(example.input_ids) for example in data.examples}

    held = texts(few, "evaluation")
    assert 8 <= len(held) <= 35
    assert held <= texts(many, "evaluation")
    assert not held & texts(many, "train")
    assert len(held | texts(few, "train")) == 100


def test_a_replay_row_that_says_what_a_held_out_row_says_is_not_trained_on(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", rows(100))
    again = write_jsonl(tmp_path / "again.jsonl", rows(100))
    sources = [{"path": path}, {"path": again, "replay": True}]
    knobs = {"train": sources, "evaluation_share": 0.2, "mixture": {"replay_share": 0.5}}
    train, held = (prepare(split=split, **knobs) for split in ("train", "evaluation"))
    texts = [{tuple(e.input_ids) for e in data.examples} for data in (train, held)]
    assert held.examples and not texts[0] & texts[1]
    assert {e.source for e in train.examples} == {path, again}


def test_chunks_of_long_documents_have_fewer_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("llmtune.data.collect.CHUNK_CHARACTERS", 100)
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "x" * size} for size in (60, 60, 300, 5)])
    rows = open_source(SourceConfig(path=path)).rows
    sizes = [[row.conversation.num_characters for row in chunk] for chunk in iter_chunks(rows)]
    assert sizes == [[60, 60], [300], [5]]


def test_three_rows_never_put_a_copied_row_into_both_splits(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [row("same", "row")] * 3)
    train = prepare(train=[{"path": path}], evaluation_share=0.01)
    assert len(train.examples) == 3
    with pytest.raises(LlmtuneError, match="no row is left"):
        prepare(train=[{"path": path}], evaluation_share=0.01, split="evaluation")


def test_without_evaluation_the_split_is_empty(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", rows(3))
    data = prepare(train=[{"path": path}], split="evaluation")
    assert len(data.examples) == 0 and data.report.lines() == []


def test_base_model_without_a_template_gets_a_choice_and_plain_rows_work(tmp_path):
    tokenizer = make_shape("chatml").__class__(
        tokenizer_object=make_shape("chatml").backend_tokenizer, eos_token="<|im_end|>"
    )
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Q: a\nA:", "completion": " b"}])
    with pytest.raises(LlmtuneError, match="chat_template"):
        prepare(tokenizer, train=[{"path": path}])
    (example,) = prepare(tokenizer, train=[{"path": path, "render": "plain"}]).examples
    assert tokenizer.decode([t for t in example.labels if t != IGNORE_INDEX]) == " b<|im_end|>"


def test_table_is_a_sequence_of_examples():
    builder = ExampleTableBuilder()
    builder.add([5, 6], [(1, 2)], origin=("a.jsonl", 1))
    builder.add([7, 8], [(1, 2)], origin=("a.jsonl", 2), weight=0.5)
    builder.add([9, 9], [(0, 1)], origin=("a.jsonl", 3))
    table = builder.build()
    assert table.find_untrained().tolist() == [2]  # the first token is never predicted
    table = table[:2]
    assert [e.labels for e in table] == [[-100, 6], [-100, 8]]
    assert table[-1].weight == 0.5 and table[1:].num_tokens == 2
    assert [e.line for e in table.take(np.array([1, 1, 0]))] == [2, 2, 1]
    with pytest.raises(IndexError):
        table[2]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"train": []}, "at least 1"),
        ({"train": [{"path": "a", "replay": True}]}, "every train source"),
        ({"train": [{"path": "a"}], "length_policy": "drop"}, "needs max_length"),
        ({"train": [{"path": "a", "rows": 3, "weight": 2}]}, "not both"),
        ({"train": [{"path": "a"}], "evaluation": [{"path": "b", "weight": 2}]}, "read once"),
        ({"train": [{"path": "a", "format": "text", "render": "plain"}]}, "completion"),
        ({"train": [{"path": "a"}], "loss": "all"}, "loss"),
    ],
)
def test_impossible_config_is_refused(data, words):
    with pytest.raises(ValidationError, match=words):
        DataConfig.model_validate(data)


def test_packing_reads_yaml_words():
    assert DataConfig(train=[{"path": "a"}], packing=True).packing == "on"
    assert DataConfig(train=[{"path": "a"}], packing=False).packing == "off"


@without_torch
def test_preparing_never_imports_torch(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", rows(3))
    code = f"""
        import sys
        from tests.data.shapes import make_shape
        from llmtune.data.config import DataConfig
        from llmtune.data.prepare import prepare_examples
        config = DataConfig(train=[{{"path": {path!r}}}])
        prepare_examples(config, make_shape("chatml"), split="train", seed=0)
        heavy = {{"torch", "datasets", "peft", "trl", "pandas"}} & set(sys.modules)
        assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def peak_while_preparing(path) -> int:
    """Return the most bytes that were held at once; mapped files are not held."""
    tracemalloc.start()
    try:
        data = prepare(train=[{"path": str(path)}], cache=False)
        for index in range(0, len(data.examples), 50):
            assert data.examples[index].input_ids
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_no_more_chunks_are_in_flight_than_said(tmp_path, monkeypatch):
    """What is read, rendered and tokenized and not yet written: the memory that is in use."""
    in_flight, most = [], []

    def start(self, rows):
        in_flight.append(len(rows))
        most.append(len(in_flight))
        return start_rows(self, rows)

    def finish(self, pending):
        in_flight.pop()
        return finish_rows(self, pending)

    start_rows, finish_rows = Labeller.start, Labeller.finish
    monkeypatch.setattr(Labeller, "start", start)
    monkeypatch.setattr(Labeller, "finish", finish)
    monkeypatch.setattr(collect, "CHUNK_ROWS", 4)
    prepare(train=[{"path": write_jsonl(tmp_path / "rows.jsonl", rows(60))}], cache=False)
    assert len(most) == 15 and max(most) == collect.CHUNKS_AHEAD + 1 and not in_flight


def test_memory_of_preparing_does_not_grow_with_the_tokens(tmp_path, monkeypatch):
    """A row takes under 200 bytes; its 300 tokens would take 10,000 as lists of numbers.

    One chunk at a time: how many of those that may be in flight hold their tokens at one moment
    is chance.
    """
    monkeypatch.setattr(collect, "CHUNKS_AHEAD", 0)
    counts = (2000, 8000)
    paths = [tmp_path / f"{count}.jsonl" for count in counts]
    for path, count in zip(paths, counts, strict=True):
        write_jsonl(path, [row(f"question {i}", "word number one " * 25) for i in range(count)])
    peak_while_preparing(paths[0])  # what is made once, is made
    small, large = (peak_while_preparing(path) for path in paths)
    assert large - small < 200 * (counts[1] - counts[0]), (small, large)


def test_tokens_lie_in_a_file_in_any_order(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", rows(20))
    for cache in (True, False):
        table = prepare(train=[{"path": path, "weight": 3}], cache=cache).examples
        assert isinstance(table.stored.tokens.base, np.memmap)
        assert len(table) == 60 and len(table.stored.tokens) < table.num_tokens / 2
        assert not table.stored.tokens.flags.writeable
