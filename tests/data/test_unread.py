"""Nothing in a row that could change what is trained is dropped in silence."""

import json

import pytest

from llmtune.data.config import SourceConfig
from llmtune.data.masks import LabelledRow, Labeller
from llmtune.data.problems import RowProblem
from llmtune.data.rows import LoadedRow, open_source
from llmtune.errors import LlmtuneError
from tests.data.shapes import make_shape

QUESTION = {"role": "user", "content": "Q"}


def write(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(tmp_path, *rows, **source):
    return list(open_source(SourceConfig(path=str(write(tmp_path, *rows)), **source)).rows)


def refusal(tmp_path, *rows, **source):
    """Return why the rows are refused, all of them together or the last one."""
    try:
        found = read(tmp_path, *rows, **source)
    except LlmtuneError as error:
        return str(error)
    assert isinstance(found[-1], RowProblem), found
    return str(found[-1])


def chat(**answer):
    return {"messages": [QUESTION, {"role": "assistant", "content": "wrong", **answer}]}


def trained_text(row):
    tokenizer = make_shape("chatml")
    (labelled,) = Labeller(tokenizer, "assistant").label([row.conversation])
    if not isinstance(labelled, LabelledRow):
        return ""
    trained = [
        token
        for each in labelled.sequences
        for start, end in each.spans
        for token in each.input_ids[start:end]
    ]
    return tokenizer.decode(trained)


@pytest.mark.parametrize(
    "mark",
    [
        {"train": False},
        {"loss": False},
        {"loss": 0},
        {"training": False},
        {"trainable": False},
        {"masked": True},
    ],
    ids=str,
)
def test_a_turn_marked_as_not_trained_is_not_trained(tmp_path, mark):
    row = chat(**mark)
    row["messages"] += [QUESTION, {"role": "assistant", "content": "right"}]
    (loaded,) = read(tmp_path, row)
    text = trained_text(loaded)
    assert "right" in text and "wrong" not in text


@pytest.mark.parametrize("mark", [{"loss_weight": 0.0}, {"weight": 0}], ids=str)
def test_a_turn_of_weight_zero_has_no_weight(tmp_path, mark):
    row = chat(**mark)
    row["messages"] += [QUESTION, {"role": "assistant", "content": "right", "loss_weight": 1.0}]
    (loaded,) = read(tmp_path, row)
    weights = [message.get("weight") for message in loaded.conversation.messages]
    assert weights == [None, 0.0, None, 1.0]


@pytest.mark.parametrize(
    ("mark", "words"),
    [
        ({"loss_mask": 1}, "'loss_mask', which may say whether it is trained"),
        ({"ignore": True}, "'ignore'"),
        ({"train": True, "loss": False}, "train and loss disagree"),
        ({"loss": "no"}, "expected true or false"),
        ({"weight": 1, "loss_weight": 2}, "different numbers"),
        ({"reasoning_details": [{"text": "so"}]}, "reasoning_content"),
    ],
    ids=str,
)
def test_a_mark_that_is_not_understood_is_refused_by_name(tmp_path, mark, words):
    assert words in refusal(tmp_path, chat(**mark))


def test_empty_marks_and_metadata_are_not_marks(tmp_path):
    path = write(tmp_path, chat(loss=None, model="x-1"))
    opened = open_source(SourceConfig(path=str(path)))
    assert opened.format.reason.endswith("not read: model of messages")
    assert all(isinstance(row, LoadedRow) for row in opened.rows)


COLUMNS = [
    ({**chat(), "images": ["1.jpg"]}, "'images'", "ignore: [images]"),
    ({**chat(), "functions": [{"name": "f"}]}, "'functions'", "columns: {tools: functions}"),
    ({**chat(), "label": False}, "'label'", "columns: {weight: label}"),
    ({**chat(), "rejected": "bad"}, "'rejected'", "preference pairs"),
    ({"text": "fine", "label": "good"}, "'label'", "columns: {prompt: text, completion: label}"),
    ({"text": "hi", "role": "user"}, "'role'", "one message of a chat"),
    (
        {"instruction": "i", "output": "o", "system_prompt": "s"},
        "'system_prompt'",
        "columns: {system: system_prompt}",
    ),
    ({"instruction": "i", "output": "o", "context": "c"}, "'context'", "{input: context}"),
    ({"prompt": "p", "completion": "c", "sample_weight": 2}, "'sample_weight'", "{weight: "),
]


@pytest.mark.parametrize(("row", "name", "setting"), COLUMNS, ids=lambda value: str(value)[:40])
def test_a_column_that_could_matter_is_refused_with_the_setting_that_decides(
    tmp_path, row, name, setting
):
    said = refusal(tmp_path, row)
    assert name in said and setting in said


@pytest.mark.parametrize(("row", "name", "setting"), COLUMNS, ids=lambda value: str(value)[:40])
def test_ignore_leaves_a_column_out_on_purpose(tmp_path, row, name, setting):
    (loaded,) = read(tmp_path, row, ignore=[name.strip("'")])
    assert isinstance(loaded, LoadedRow)


def test_a_column_that_appears_late_is_refused_in_its_row(tmp_path):
    rows = [chat()] * 150 + [{**chat(), "images": ["1.jpg"]}]
    found = read(tmp_path, *rows)
    assert [type(row) for row in found] == [LoadedRow] * 150 + [RowProblem]
    assert "rows.jsonl:151: the column 'images' is not read" in str(found[-1])


def test_an_empty_column_says_nothing(tmp_path):
    row = {**chat(), "images": [], "functions": None, "system_prompt": ""}
    assert isinstance(read(tmp_path, row)[0], LoadedRow)


def test_a_mark_of_right_and_wrong_answers_can_be_the_weight(tmp_path):
    rows = [{**chat(), "label": False}, {**chat(), "label": True}]
    found = read(tmp_path, *rows, columns={"weight": "label"})
    assert [row.conversation.weight for row in found] == [0.0, 1.0]


def test_parts_of_text_are_read_under_value_too_and_others_are_refused(tmp_path):
    part = {"type": "text", "value": "hi"}
    (loaded,) = read(
        tmp_path, {"messages": [{"role": "user", "content": [part]}, *chat()["messages"][1:]]}
    )
    assert loaded.conversation.messages[0]["content"] == "hi"
    image = {"type": "image", "text": "a cat"}
    row = {"messages": [{"role": "user", "content": [image]}, *chat()["messages"][1:]]}
    assert 'holds a "image" part' in refusal(tmp_path, row)


def test_preference_rows_are_named_as_what_they_are(tmp_path):
    said = refusal(tmp_path, {"chosen": "Human: Q\n\nAssistant: good", "rejected": "bad"})
    assert "preference pairs" in said and "chosen" in said


def test_choices_are_read_wherever_the_question_writes_them(tmp_path):
    row = {"instruction": "Pick.", "input": "red or blue", "output": "red"}
    assert isinstance(read(tmp_path, row | {"choices": ["red", "blue"]})[0], LoadedRow)
    assert "choices of the question" in refusal(tmp_path, row | {"choices": ["red", "green"]})
