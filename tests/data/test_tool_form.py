"""Tools, calls and their ids reach each template in the form that it takes."""

import json

import pytest

from llmtune.cli import run_command
from llmtune.data.conversation import chat
from llmtune.data.masks import LabelledRow, Labeller
from llmtune.data.render import render_messages
from llmtune.data.tool_form import ToolForm, find_tool_form
from tests.data.command_lines import write_project
from tests.data.shapes import make_shape

FUNCTION = {
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {"type": "object"},
}
WRAPPED = [{"type": "function", "function": FUNCTION}]
FORMS = {
    "qwen3": ToolForm(),
    "item-calls": ToolForm(),
    "text-calls": ToolForm(has_text_arguments=True, lacks_content=True),
    "id-calls": ToolForm(needs_ids=True),
    "bare-calls": ToolForm(has_text_arguments=True),
    "flat-tools": ToolForm(wraps_tools=False),
}


def conversation(arguments=None, ids=("call_1", "call_2")):
    arguments = {"city": "Rome", "days": 2} if arguments is None else arguments
    function = {"name": "weather", "arguments": arguments}
    calls = [{"id": name, "function": function} if name else {"function": function} for name in ids]
    answers = [
        {"role": "tool", "content": f"Answer {i}.", **({"tool_call_id": name} if name else {})}
        for i, name in enumerate(ids)
    ]
    return [
        {"role": "user", "content": "Weather in Rome?"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        *answers,
        {"role": "assistant", "content": "It is sunny."},
    ]


@pytest.mark.parametrize("name", FORMS)
def test_a_template_is_asked_for_its_form(name):
    assert find_tool_form(make_shape(name)) == FORMS[name]


CALLS = {
    "qwen3": '{"name": "weather", "arguments": {"city": "Rome", "days": 2}}',
    "item-calls": "<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>",
    "text-calls": 'weather\n{"city": "Rome", "days": 2}',
    "id-calls": '{"name": "weather", "arguments": {"city": "Rome", "days": 2}}',
    "bare-calls": '{"city": "Rome", "days": 2}',
    "flat-tools": '{"name": "weather", "arguments": {"city": "Rome", "days": 2}}',
}


@pytest.mark.parametrize("arguments", [None, '{"city": "Rome", "days": 2}'], ids=["object", "text"])
@pytest.mark.parametrize("tools", [WRAPPED, [FUNCTION]], ids=["wrapped", "flat"])
@pytest.mark.parametrize("ids", [("call_1",), (None,)], ids=["named", "unnamed"])
@pytest.mark.parametrize("name", FORMS)
def test_every_way_to_write_a_row_gives_the_same_calls(name, ids, tools, arguments):
    tokenizer = make_shape(name)
    row = chat(conversation(arguments, ids), tools)
    (labelled,) = Labeller(tokenizer, "assistant").label([row])
    assert isinstance(labelled, LabelledRow), labelled
    trained = "".join(
        tokenizer.decode(s.input_ids[start:end], clean_up_tokenization_spaces=False)
        for s in labelled.sequences
        for start, end in s.spans
    )
    assert CALLS[name] in trained and "It is sunny." in trained
    assert "Answer" not in trained and "Tells" not in trained
    whole = tokenizer.decode(labelled.sequences[0].input_ids, clean_up_tokenization_spaces=False)
    wrapped = render_messages(tokenizer, conversation(None, ids), tools=WRAPPED)
    assert "Tells the weather." in whole
    if len(labelled.sequences) == 1:
        shared = tokenizer.decode(wrapped, clean_up_tokenization_spaces=False)
        assert whole.startswith(shared.rstrip())


def test_a_last_turn_of_calls_ends_with_the_token_that_the_tools_answer_begins_with():
    tokenizer = make_shape("item-calls")
    row = chat(conversation()[:2], WRAPPED)
    (labelled,) = Labeller(tokenizer, "assistant").label([row])
    (sequence,) = labelled.sequences
    text = tokenizer.decode(sequence.input_ids, clean_up_tokenization_spaces=False)
    assert text.endswith("</tool_call><|observation|>")


def test_ids_that_the_template_refuses_are_made_and_each_answer_keeps_its_call():
    shaped = ToolForm(needs_ids=True).shape_messages(chat(conversation()).messages)
    made = [call["id"] for call in shaped[1]["tool_calls"]]
    assert len(set(made)) == 2 and all(len(name) == 9 and name.isalnum() for name in made)
    assert [message["tool_call_id"] for message in shaped[2:4]] == made
    swapped = chat(conversation()).messages
    swapped[2], swapped[3] = swapped[3], swapped[2]
    shaped = ToolForm(needs_ids=True).shape_messages(swapped)
    assert [message["tool_call_id"] for message in shaped[2:4]] == made[::-1]
    kept = ToolForm(needs_ids=True).shape_messages(chat(conversation(ids=("abcdefghi",))).messages)
    assert kept[1]["tool_calls"][0]["id"] == kept[2]["tool_call_id"] == "abcdefghi"


def test_data_check_and_show_take_flat_tools_for_a_template_of_items(tmp_path, capsys):
    row = {
        "conversations": [
            {"from": "human", "value": "Weather?"},
            {
                "from": "function_call",
                "value": json.dumps({"name": "weather", "arguments": {"city": "Rome"}}),
            },
            {"from": "observation", "value": "Sunny."},
            {"from": "gpt", "value": "It is sunny."},
        ],
        "tools": json.dumps([FUNCTION]),
    }
    config = write_project(tmp_path, "item-calls", [row])
    assert run_command(["data", "check", config]) == 0
    assert run_command(["data", "show", config, "--row", "1", "--json"]) == 0
    text = json.loads(capsys.readouterr().out.splitlines()[-1])["text"]
    assert '{"type": "function", "function": {"name": "weather"' in text
    assert "<arg_value>Rome</arg_value>\n</tool_call><|observation|>Sunny." in text
