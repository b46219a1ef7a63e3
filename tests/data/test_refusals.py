"""Odd files and odd rows: read exactly, or refused in one line that says where and what."""

import json
import os

import pyarrow
import pyarrow.parquet
import pytest

from llmtune.data.config import SourceConfig
from llmtune.data.rows import LoadedRow, open_source
from llmtune.data.tools import MAX_DEPTH
from llmtune.errors import LlmtuneError

ROW = '{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a"}]}'
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def load(path, **source) -> list:
    return list(open_source(SourceConfig(path=str(path), **source)).rows)


def refusal(path, **source) -> str:
    """Return what is said of a file that is refused, or of its one bad row."""
    try:
        bad = [str(row) for row in load(path, **source) if not isinstance(row, LoadedRow)]
    except LlmtuneError as error:
        return str(error)
    assert len(bad) == 1, bad
    return bad[0]


def contents(rows) -> list[list[str]]:
    return [[m["content"] for m in row.conversation.messages] for row in rows]


WHOLE_FILES = {
    "utf16.jsonl": ((ROW + "\n" + ROW + "\n").encode("utf-16"), "utf16.jsonl:1: not UTF-8"),
    "utf16le.jsonl": ((ROW + "\n").encode("utf-16-le"), "utf16le.jsonl:1: not UTF-8"),
    "utf16.json": (f"[{ROW}]".encode("utf-16"), "utf16.json:1: not UTF-8 text but UTF-16"),
    "utf16.csv": ("prompt,completion\na,b\n".encode("utf-16"), "utf16.csv:1: not UTF-8"),
    "latin.csv": (b"prompt,completion\na,b\nc,caf\xe9\n", "latin.csv:1: not UTF-8 text"),
    "double.json": (f"[{ROW[:-1]},\n{ROW[1:]}]".encode(), "double.json:1: not JSON (the key"),
    "nan.json": (f'[{ROW[:-1]},"x":NaN}}]'.encode(), "nan.json:1: not JSON (NaN"),
    "semicolons.csv": (b"prompt;completion\na;b\n", "seems to use ';'"),
    "tabs.csv": (b"prompt\tcompletion\na\tb\n", "seems to use '\\t'"),
}


@pytest.mark.parametrize("name", WHOLE_FILES)
def test_a_file_of_the_wrong_kind_says_which_it_is(tmp_path, name):
    data, words = WHOLE_FILES[name]
    (tmp_path / name).write_bytes(data)
    assert words in refusal(tmp_path / name)


def test_a_column_that_stands_twice_is_refused(tmp_path):
    table = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert "text more than once" in refusal(tmp_path / "a.parquet")
    with pyarrow.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert "text more than once" in refusal(tmp_path / "a.arrow")


def call(arguments) -> list:
    return [{"function": {"name": "f", "arguments": arguments}}]


DEEP = '{"a":' * (MAX_DEPTH + 1) + "1" + "}" * (MAX_DEPTH + 1)
LINES = {
    "key twice": (ROW.replace('"q"', '"q","content":"z"'), "the key 'content' is there twice"),
    "NaN": (ROW[:-1] + ',"id":NaN}', "NaN is not a JSON value"),
    "infinite argument": (
        {"messages": [USER, ANSWER | {"tool_calls": call('{"x": Infinity}')}]},
        "Infinity is not a JSON value",
    ),
    "deep schema": (
        ROW[:-1] + f',"tools":[{{"name":"f","parameters":{DEEP}}}]}}',
        "nested more than",
    ),
    "deep arguments": (
        {"messages": [USER, ANSWER | {"tool_calls": call(json.loads(DEEP))}]},
        "nested more than",
    ),
    "images": ({"messages": [USER | {"images": ["x.png"]}, ANSWER]}, "images"),
    "old call": (
        {"messages": [USER, ANSWER | {"function_call": {"name": "f", "arguments": "{}"}}]},
        "function_call",
    ),
    "weight of a question": ({"messages": [USER | {"weight": 3}, ANSWER]}, "weight is 3.0"),
    "two system texts": (
        {"messages": [{"role": "system", "content": "x"}, USER, ANSWER], "system": "y"},
        "two system messages",
    ),
}


@pytest.mark.parametrize("name", LINES)
def test_what_would_be_lost_in_a_row_is_refused_with_its_line(tmp_path, name):
    row, words = LINES[name]
    path = tmp_path / "a.jsonl"
    path.write_text(f"{ROW}\n{row if isinstance(row, str) else json.dumps(row)}\n")
    said = refusal(path, format="messages")
    assert f"{path}:2: " in said and words in said


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [USER, ANSWER], "system": "S"}, ["S", "q", "a"]),
        (
            {"messages": [{"role": "system", "content": "S"}, USER, ANSWER], "system": "S"},
            ["S", "q", "a"],
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
             "system": "S"},
            ["S", "q", "a"],
        ),
        ({"instruction": "q", "output": "a", "system": "S"}, ["S", "q", "a"]),
        ({"prompt": "q", "completion": "a", "system": "S"}, ["S", "q", "a"]),
        ({"prompt": [USER], "completion": "a", "system": "S"}, ["S", "q", "a"]),
    ],
)  # fmt: skip
def test_a_system_column_is_read_in_every_chat_format(tmp_path, row, expected):
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert contents(load(tmp_path / "a.jsonl")) == [expected]


def test_tools_are_read_beside_an_instruction_and_calls_in_sharegpt_turns(tmp_path):
    tools = [{"name": "f"}]
    turns = [
        {"from": "human", "value": "q"},
        {"from": "gpt", "value": "a", "tool_calls": call({"x": "1"})},
    ]
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"instruction": "q", "output": "a", "tools": tools})
    )
    (tmp_path / "b.jsonl").write_text(json.dumps({"conversations": turns, "tools": tools}))
    (instruction,), (chat,) = load(tmp_path / "a.jsonl"), load(tmp_path / "b.jsonl")
    assert instruction.conversation.tools == tools
    assert chat.conversation.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": "1"}


def test_messages_in_the_cells_of_a_csv_are_messages(tmp_path):
    prompt, completion = (json.dumps([m]).replace('"', '""') for m in (USER, ANSWER))
    (tmp_path / "a.csv").write_text(f'prompt,completion\n"{prompt}","{completion}"\n')
    assert contents(load(tmp_path / "a.csv")) == [["q", "a"]]


def test_plain_rendering_refuses_what_it_would_leave_out(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "q", "completion": "a", "system": "S"}\n')
    assert "no place for the column system" in refusal(path, render="plain")
    path.write_text(json.dumps({"prompt": [USER], "completion": "a"}))
    assert "found messages" in refusal(path, render="plain")
    path.write_text(ROW)
    assert "the rows are messages" in refusal(path, render="plain")


def test_a_mistyped_optional_column_is_refused_and_unread_ones_are_told(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": "x", "a": "y", "context": "z", "id": 1}\n')
    columns = {"instruction": "q", "output": "a", "input": "contxt"}
    said = refusal(path, format="instruction", columns=columns)
    assert "'contxt'" in said and 'did you mean "context"' in said
    columns["input"] = "context"
    opened = open_source(SourceConfig(path=str(path), format="instruction", columns=columns))
    assert opened.format.reason.endswith("; not read: id")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"instruction": "q", "output": "a", "history": [["b", "c"]]}', ["b", "c", "q", "a"]),
        ('{"prompt": [{"role": "user", "content": "q"}], "completion": "a"}', ["q", "a"]),
    ],
)
def test_one_row_alone_in_a_json_file_is_a_row_whatever_lists_it_holds(tmp_path, text, expected):
    (tmp_path / "a.json").write_text(text)
    assert contents(load(tmp_path / "a.json")) == [expected]


def test_what_is_no_file_is_named_as_what_it_is(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    assert "a pipe or a device" in refusal(tmp_path / "pipe.jsonl")
    assert "a link that leads nowhere" in refusal(tmp_path / "loop.jsonl")
    assert "no such file" in refusal(tmp_path / ("x" * 300 + ".jsonl"))


def test_directories_are_read_through_links_once_and_without_hidden_copies(tmp_path):
    data = tmp_path / "data"
    (tmp_path / "elsewhere").mkdir()
    (data / ".ipynb_checkpoints").mkdir(parents=True)
    for place in (data, data / ".ipynb_checkpoints", tmp_path / "elsewhere"):
        (place / "a.jsonl").write_text(ROW)
    (data / "linked").symlink_to(tmp_path / "elsewhere")
    (data / "back").symlink_to(data)
    assert [row.source for row in load(data)] == [
        str(data / "a.jsonl"),
        str(data / "linked" / "a.jsonl"),
    ]
