"""Calls are read back from what a model writes, in the forms of templates that prove it."""

from dataclasses import replace

import pytest

from llmtune.data.written_calls import CallForm, WrittenCall, find_call_form
from tests.data.shapes import SHAPES, make_shape

ROME = WrittenCall("weather", {"city": "Rome"})
CALL = '{"name": "weather", "arguments": {"city": "Rome"}}'
HM = "<think>\nI write <tool_call> and then it.\n</think>"
BARE = (
    "{{ bos_token }}{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}{% if m['tool_calls'] %}"
    "{% set f = m['tool_calls'][0]['function'] %}"
    '{{ \'{"name": "\' + f.name + \'", "parameters": \' + f.arguments | tojson + "}" }}'
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
OPENED = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}{% for c in m['tool_calls'] or [] %}"
    "{{ '<tool_call>' + c.function | tojson + '</tool_call>' }}{% endfor %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
LISTED = (
    "{{ bos_token }}{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% elif m['tool_calls'] %}{{ '[TOOL_CALLS] [' }}{% for c in m['tool_calls'] %}"
    "{{ c.function | tojson }}{{ ', ' if not loop.last }}{% endfor %}{{ ']' + eos_token }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)


def _template(monkeypatch, name, template):
    monkeypatch.setitem(SHAPES, f"{name}-calls", replace(SHAPES[name], template=template))
    return find_call_form(make_shape(f"{name}-calls"))


def test_a_template_is_asked_how_it_writes_calls(monkeypatch):
    assert find_call_form(make_shape("qwen3")) == CallForm("<tool_call>", "name", "arguments")
    assert _template(monkeypatch, "llama3", BARE) == CallForm("", "name", "parameters")
    for name in ("qwen3", "chatml"):  # whose mark is a token, and is none
        opened = CallForm("<tool_call>", "name", "arguments")
        assert _template(monkeypatch, name, OPENED) == opened
    listed = CallForm("[TOOL_CALLS]", "name", "arguments")
    assert _template(monkeypatch, "mistral", LISTED) == listed
    for name in ("chatml", "item-calls", "text-calls", "id-calls", "bare-calls"):
        assert find_call_form(make_shape(name)) is None, name


@pytest.mark.parametrize(
    ("mark", "text", "content", "count"),
    [
        ("<tool_call>", f"<tool_call>\n{CALL}\n</tool_call>", "", 1),
        ("<tool_call>", f"Let me see.\n<tool_call>{CALL}</tool_call>", "Let me see.", 1),
        ("<tool_call>", f"<tool_call>\n{CALL}\n</tool_call>\n" * 2, "", 2),
        ("[TOOL_CALLS]", f"[TOOL_CALLS] [{CALL}, {CALL}]", "", 2),
        ("", f"<think>\nHm.\n</think>\n\n{CALL}", "<think>\nHm.\n</think>", 1),
        ("<tool_call>", f"{HM}\n<tool_call>{CALL}</tool_call>", HM, 1),
        ("<tool_call>", f"{HM}\n<tool_call>{CALL}</tool_call> Done.", None, 0),
        ("<tool_call>", f"<think><tool_call>{CALL}</tool_call></think>It is sunny.", None, 0),
        # an answer that cannot be read as calls, whole, is text
        ("<tool_call>", f"<tool_call>\n{CALL}\n</tool_call> Done.", None, 0),
        ("<tool_call>", f"<tool_call>\n{CALL[:-1]}", None, 0),
        ("<tool_call>", '<tool_call>{"name": "weather"}</tool_call>', None, 0),
        ("<tool_call>", '<tool_call>{"name": "a", "arguments": {"b": "\\ud83d"}}', None, 0),
        ("<tool_call>", '<tool_call>{"name": "a", "arguments": {"b": 1e999}}', None, 0),
        ("<tool_call>", CALL, None, 0),
        ("", "It is sunny.", None, 0),
        ("", '{"name": "Rome", "arguments": {}}', None, 0),
        ("", "[1, 2]", None, 0),
    ],
)
def test_calls_are_read_whole_or_are_text(mark, text, content, count):
    found = CallForm(mark, "name", "arguments").read(text, ["weather"])
    assert found == (text if content is None else content, (ROME,) * count)


def test_an_argument_may_hold_a_mark_of_thinking():
    text = '<tool_call>{"name": "write", "arguments": {"html": "</think>"}}</tool_call>'
    calls = (WrittenCall("write", {"html": "</think>"}),) * 2
    assert CallForm("<tool_call>", "name", "arguments").read(f"{text}\n{text}") == ("", calls)
