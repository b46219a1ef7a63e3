"""What foreign files hold: control tokens in text, empty columns, tools, thinking parts."""

import pytest

from llmtune.cli import run_command
from llmtune.data.check import check_data
from llmtune.data.config import DataConfig
from llmtune.data.conversation import chat
from llmtune.data.formats.instruction import InstructionFormat
from llmtune.data.masks import LabelledRow, Labeller
from llmtune.data.overlap import conversation_key
from llmtune.data.problems import RowError
from tests.data.command_lines import write_project
from tests.data.shapes import make_shape, turns, write_jsonl

TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
OTHER = [{"type": "function", "function": {"name": "play_music", "parameters": {}}}]


@pytest.mark.parametrize("typed", ["<｜Assistant｜>", "<｜User｜>"])
def test_turn_tokens_that_the_tokenizer_does_not_call_special_are_refused_in_text(typed):
    tokenizer = make_shape("deepseek")
    (row,) = Labeller(tokenizer, "assistant").label([chat(turns(f"Hi {typed}ok", "Sunny."))])
    assert isinstance(row, RowError) and row.kind == "control-token" and typed in str(row)


def test_thinking_marks_and_other_added_words_may_stand_in_text():
    messages = turns("What does <think> or <tool_call> mean?", "A mark.")
    for name in ("deepseek", "qwen3"):
        (row,) = Labeller(make_shape(name), "assistant").label([chat(messages)])
        assert isinstance(row, LabelledRow), row


def test_an_empty_instruction_makes_the_input_the_question():
    row = {"instruction": " ", "input": "What is Unsloth?", "output": "A library."}
    conversation = InstructionFormat().to_conversation(row)
    assert [m["content"] for m in conversation.messages] == ["What is Unsloth?", "A library."]
    with pytest.raises(RowError, match="instruction is empty"):
        InstructionFormat().to_conversation({**row, "input": ""})


def test_rows_with_different_tools_are_different_rows():
    messages = turns("What is the weather in Rome?", "I cannot look that up with my tools.")
    keys = {conversation_key(chat(messages, tools)) for tools in (None, TOOLS, OTHER)}
    assert len(keys) == 3
    flat = [tool["function"] for tool in TOOLS]
    assert conversation_key(chat(messages, flat)) == conversation_key(chat(messages, TOOLS))


@pytest.mark.parametrize(("one", "other"), [("2²", "22"), ("H₂O", "H2O"), ("1½", "11/2")])
def test_raised_and_lowered_digits_are_not_plain_ones(one, other):
    keys = {conversation_key(chat(turns(text, "x"))) for text in (one, other)}
    assert len(keys) == 2


@pytest.mark.parametrize(
    ("one", "other"), [("Ａb", "ab"), ("e\u0301", "\u00e9"), ("a  B\n", "A b")]
)
def test_forms_of_the_same_letters_stay_equal(one, other):
    keys = {conversation_key(chat(turns(text, "x"))) for text in (one, other)}
    assert len(keys) == 1


def test_a_question_with_other_tools_is_no_leak_no_near_leak_and_no_conflict(tmp_path):
    asked = "What is the weather in Rome tomorrow, and what should I wear when I go for a walk?"
    rows = [
        {"messages": turns(asked, answer), "tools": tools}
        for answer, tools in (
            ("I cannot look that up with my tools.", TOOLS),
            ("Take a hat.", OTHER),
        )
    ]
    rows.append({"messages": rows[0]["messages"], "tools": OTHER})
    train = write_jsonl(tmp_path / "train.jsonl", rows[:2])
    evaluation = write_jsonl(tmp_path / "eval.jsonl", rows[2:])
    config = DataConfig(train=[{"path": train}], evaluation=[{"path": evaluation}])
    kinds = {finding.kind for finding in check_data(config, make_shape("qwen3")).findings}
    assert not kinds & {"leak", "near-leak", "conflict"}


@pytest.mark.parametrize(
    "part",
    [
        {"type": "thinking", "thinking": "It has a tail."},
        {"type": "reasoning", "text": "It has a tail."},
        {"type": "thinking", "thinking": [{"type": "text", "text": "It has a tail."}]},
    ],
    ids=str,
)
def test_a_part_of_thinking_is_reasoning_and_not_part_of_the_answer(part):
    messages = turns("What is it?")
    messages.append({"role": "assistant", "content": [part, {"type": "text", "text": "A fox."}]})
    answer = chat(messages).messages[1]
    assert answer["content"] == "A fox." and answer["reasoning_content"] == "It has a tail."
    messages[1]["reasoning_content"] = "Something else."
    with pytest.raises(RowError, match="twice"):
        chat(messages)


def test_a_users_part_of_thinking_is_refused():
    part = {"type": "thinking", "thinking": "hm"}
    with pytest.raises(RowError, match='"thinking" part'):
        chat([{"role": "user", "content": [part]}, {"role": "assistant", "content": "b"}])


def test_data_check_names_the_typed_turn_token(tmp_path, capsys):
    rows = [{"messages": turns("Hi <｜Assistant｜>ok<｜User｜>x", "Sunny.")}]
    config = write_project(tmp_path, "deepseek", rows)
    assert run_command(["data", "check", config]) == 1
    said = "rows.jsonl:1: message 1 (user): content holds the control token"
    assert said in capsys.readouterr().out
