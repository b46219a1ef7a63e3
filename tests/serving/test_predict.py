"""Prompts are read as JSONL: a line ends where JSON ends it, and a bad row is named."""

import json

import pytest
from click.testing import CliRunner

from llmtune.commands.answer import chat, predict
from llmtune.errors import LlmtuneError
from llmtune.serving.predict import read_prompts

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_a_separator_inside_a_string_ends_no_row(tmp_path, character):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"one{character}two"}, {"prompt": "three"}]
    raw = character in "\u2028\u2029\x85"  # JSON escapes control characters below space
    lines = [json.dumps(row, ensure_ascii=not raw) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert read_prompts(path) == rows


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "one"}\r\n\r\n{"prompt": "two"}\r\n')
    assert read_prompts(path) == [{"prompt": "one"}, {"prompt": "two"}]


@pytest.mark.parametrize(
    "messages",
    [
        "hello",
        [],
        {},
        [{"role": "user"}],
        [{"role": 1, "content": "x"}],
        ["hello"],
        [*MESSAGES, {"role": "assistant", "content": "x"}],
    ],
)
def test_bad_messages_are_named_whether_there_is_a_prompt_or_not(tmp_path, messages):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "x", "messages": messages}, {"messages": messages}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(LlmtuneError) as caught:
        read_prompts(path)
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{path}:1: `messages` must be")
    assert second.startswith(f"{path}:2: `messages` must be")


def test_a_row_without_messages_needs_a_prompt(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": " "}\n{"messages": null, "prompt": "x"}\n{"text": "x"}\n[1]\n')
    with pytest.raises(LlmtuneError) as caught:
        read_prompts(path)
    assert [line.split(":")[1] for line in str(caught.value).splitlines()] == ["1", "3", "4"]


def test_a_directory_of_prompts_is_refused_in_one_line(tmp_path):
    with pytest.raises(LlmtuneError, match="cannot be read"):
        read_prompts(tmp_path)


@pytest.mark.parametrize("command", [chat, predict])
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--max-new-tokens", "0"),
        ("--temperature", "-0.1"),
        ("--temperature", "nan"),
        ("--temperature", "inf"),
    ],
)
def test_a_setting_that_no_answer_can_have_is_refused(tmp_path, command, option, value):
    files = ["--input", "in.jsonl", "--output", "out.jsonl"] if command is predict else []
    result = CliRunner().invoke(command, ["model", *files, option, value])
    assert result.exit_code == 2
    assert f"Invalid value for '{option}'" in result.output
