"""An answer is trained behind the generation prompt if the template writes another before it."""

import json
from typing import Any

import pytest

from llmtune.cli import run_command
from llmtune.data.conversation import chat
from llmtune.data.masks import LabelledRow, Labeller
from llmtune.data.problems import RowError
from llmtune.data.render import render_messages
from llmtune.data.spans import NOTE_BEHIND
from llmtune.models.turns import find_turn_ending
from tests.data.command_lines import write_project
from tests.data.shapes import BEHIND_SHAPES, make_shape, turns

TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
CALL = {"function": {"name": "look_up", "arguments": {"city": "Rome"}}}


def label(name, messages, tools=None):
    return Labeller(make_shape(name), "assistant").label([chat(messages, tools)])[0]


def trained(name, row):
    """Return the trained texts, after checking that each follows the prompt of inference."""
    assert isinstance(row, LabelledRow), row
    return [
        make_shape(name).decode(s.input_ids[start:end], clean_up_tokenization_spaces=False)
        for s in row.sequences
        for start, end in s.spans
    ]


def assert_behind_prompts(name, row, messages, tools=None):
    """Each trained span follows the very ids that generation would be given."""
    prompts = [
        render_messages(
            make_shape(name), chat(messages).messages[:i], tools=tools, add_generation_prompt=True
        )
        for i, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    assert [s.input_ids[: s.spans[0][0]] for s in row.sequences] == prompts


PLAIN = {
    "closed-channel": "A fox.<turn|>",
    "dropped-think": "\n</think>\n\nA fox.<｜end▁of▁sentence｜>",
    "closed-think": "A fox.<｜end▁of▁sentence｜>",
    "opened-think": "\n</think>\n\nA fox.<|im_end|>",
    "shut-think": "</think>A fox.<|user|>",
    "empty-think": "</think>A fox.<|im_end|>",
    "response": "<|START_RESPONSE|>A fox.<|END_OF_TURN_TOKEN|>",
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_answer_follows_the_prompt_of_inference_and_a_note_says_so(name):
    messages = turns("What is it?", "A fox.", "And then?", "A fox.")
    row = label(name, messages)
    assert trained(name, row) == [PLAIN[name]] * 2
    assert_behind_prompts(name, row, messages)
    assert row.notes[0] == NOTE_BEHIND


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_trained_before_an_answer_is_what_a_choice_is_scored_behind(name):
    ending = find_turn_ending(make_shape(name))
    assert PLAIN[name].startswith(f"{ending.lead}A fox.")


THOUGHT = {
    "dropped-think": "A tail.\n</think>\n\nA fox.<｜end▁of▁sentence｜>",
    "opened-think": "A tail.\n</think>\n\nA fox.<|im_end|>",
    "shut-think": "A tail.</think>A fox.<|user|>",
    "empty-think": "A tail.\n</think>\nA fox.<|im_end|>",
    "open-channel": "<|channel>thought\nA tail.<channel|>A fox.<turn|>",
}


@pytest.mark.parametrize("name", THOUGHT)
def test_reasoning_goes_into_the_block_that_the_prompt_opens(name):
    messages = turns("What is it?", "A fox.")
    messages[1]["reasoning_content"] = "A tail."
    row = label(name, messages)
    assert trained(name, row) == [THOUGHT[name]]
    assert_behind_prompts(name, row, messages)


@pytest.mark.parametrize("name", ["dropped-think", "opened-think"])
def test_thinking_written_inside_the_answer_goes_there_too(name):
    messages = turns("What is it?", "<think>\nA tail.\n</think>\n\nA fox.")
    row = label(name, messages)
    assert trained(name, row) == [THOUGHT[name]]
    assert_behind_prompts(name, row, messages)


@pytest.mark.parametrize("name", ["closed-channel", "closed-think", "response"])
def test_reasoning_behind_a_prompt_that_closes_thinking_is_refused_with_the_reason(name):
    messages = turns("What is it?", "A fox.")
    messages[1]["reasoning_content"] = "A tail."
    row = label(name, messages)
    assert isinstance(row, RowError) and "reasoning_content" in str(row)


@pytest.mark.parametrize("name", ["open-channel", "closed-channel"])
@pytest.mark.parametrize("reasoning", ["A tail.", ""])
def test_after_a_tools_answer_the_opening_of_a_turn_is_not_trained(name, reasoning):
    more = {"reasoning_content": reasoning} if reasoning else {}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Weather in Rome?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [CALL], "train": False},
        {"role": "tool", "content": "It is sunny there."},
        {"role": "assistant", "content": "Sunny.", **more},
    ]
    row = label(name, messages, TOOLS)
    block = f"<|channel>thought\n{reasoning}<channel|>" if reasoning else ""
    assert trained(name, row) == [f"{block}Sunny.<turn|>"]
    (sequence,) = row.sequences
    prompt = render_messages(
        make_shape(name), messages[:3], tools=TOOLS, add_generation_prompt=True
    )
    assert sequence.input_ids[: sequence.spans[0][0]] == prompt


def test_two_answers_in_a_row_are_trained_behind_their_own_prompts():
    messages = turns("Hi", "One.")
    messages.append({"role": "assistant", "content": "Two."})
    row = label("qwen3", messages)
    block = "<think>\n\n</think>\n\n"
    assert trained("qwen3", row) == [f"{block}One.<|im_end|>", f"{block}Two.<|im_end|>"]
    assert_behind_prompts("qwen3", row, messages)


@pytest.mark.parametrize("system", ["Be brief.", "Answer in one short sentence, please."])
def test_a_system_message_in_the_last_user_turn_is_in_every_prompt(system):
    messages = turns("What is it?", "A fox.", "And then?", "It jumps.", system=system)
    row = label("late-system", messages)
    assert trained("late-system", row) == ["A fox.</s>", "It jumps.</s>"]
    assert_behind_prompts("late-system", row, messages)
    tokenizer = make_shape("late-system")
    assert all(system in tokenizer.decode(s.input_ids) for s in row.sequences)


@pytest.mark.parametrize("name", sorted(BEHIND_SHAPES))
def test_data_check_and_show_take_a_plain_chat(name, tmp_path, capsys):
    config = write_project(tmp_path, name, [{"messages": turns("2+3?", "It is 5")}])
    assert run_command(["data", "check", config]) == 0
    assert run_command(["data", "show", config, "--row", "1", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert shown["text"].rstrip().endswith(f"It is 5{BEHIND_SHAPES[name].terminator}")
