"""What a template leaves out of a chat refuses the row, however short it is."""

import json

import pytest

from llmtune.data.conversation import chat
from llmtune.data.masks import LabelledRow, Labeller
from llmtune.data.problems import RowError
from llmtune.errors import LlmtuneError
from tests.data.shapes import CHATML, Shape, make_shape, make_shape_tokenizer, turns

TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]


def tokenizer_of(template, *, bos=None):
    specials = ("<|im_start|>", "<|im_end|>") + ((bos,) if bos else ())
    return make_shape_tokenizer(Shape(template, specials, bos, "<|im_end|>", "<|im_end|>"))


def label(tokenizer, messages, tools=None, loss_on="assistant"):
    return Labeller(tokenizer, loss_on).label([chat(messages, tools)])[0]


def call(arguments, name="look_up"):
    return {"function": {"name": name, "arguments": arguments}}


WITHOUT = "{% for m in messages if m['role'] != 'ROLE' %}"


@pytest.mark.parametrize("role", ["system", "tool"])
def test_a_short_text_that_also_stands_elsewhere_is_not_taken_for_printed(role):
    template = CHATML.replace("{% for m in messages %}", WITHOUT.replace("ROLE", role))
    messages = turns("a cat", "b")
    if role == "system":
        messages.insert(0, {"role": "system", "content": "cat"})
    else:
        messages += [{"role": "tool", "content": "cat"}, {"role": "assistant", "content": "c"}]
    row = label(tokenizer_of(template), messages)
    assert isinstance(row, RowError) and f"({role}): the template does not print" in str(row)
    assert isinstance(label(tokenizer_of(CHATML), messages), LabelledRow)


def test_a_tool_whose_name_stands_in_a_message_is_not_taken_for_printed():
    row = label(make_shape("chatml"), turns("please look_up", "b"), TOOLS)
    assert isinstance(row, RowError) and "does not print the tool 'look_up'" in str(row)
    assert isinstance(label(make_shape("qwen3"), turns("please look_up", "b"), TOOLS), LabelledRow)


@pytest.mark.parametrize(
    ("answer", "tools", "words"),
    [
        ({"content": "b", "reasoning_content": "r"}, None, "leaves out this turn's reasoning"),
        ({"content": "b"}, TOOLS, "does not print the tool"),
        ({"content": "", "tool_calls": [call({"x": "1"})]}, None, "does not print the tool call"),
    ],
)
def test_training_on_all_refuses_what_the_template_leaves_out_too(answer, tools, words):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", **answer}]
    row = label(make_shape("chatml"), messages, tools, "all")
    assert isinstance(row, RowError) and words in str(row)


END = "<|im_end|>"


@pytest.mark.parametrize(
    ("calls", "tools"),
    [
        ([call({"x": f"a{END}b"})], TOOLS),
        ([call({f"x{END}": "a"})], TOOLS),
        ([call({"x": "a"}, f"look{END}")], TOOLS),
        ([call({"x": "a"})], [{"name": "look_up", "description": f"x{END}"}]),
    ],
)
def test_control_tokens_in_calls_and_schemas_are_refused(calls, tools):
    messages = [*turns("a"), {"role": "assistant", "content": None, "tool_calls": calls}]
    row = label(make_shape("qwen3"), messages, tools)
    assert isinstance(row, RowError) and row.kind == "control-token"


def test_a_control_token_in_a_name_is_refused():
    messages = turns("a", "b")
    messages[0]["name"] = f"bob{END}"
    assert "name holds the control token" in str(label(make_shape("chatml"), messages))


def test_a_template_that_fails_in_any_way_refuses_the_row():
    """A division by zero is a fault of the template, told with the row's place."""
    template = "{% if messages|length > 3 %}{{ 1 / 0 }}{% endif %}" + CHATML
    tokenizer = tokenizer_of(template)
    assert isinstance(label(tokenizer, turns("a", "b")), LabelledRow)
    row = label(tokenizer, turns("a", "b", "c", "d"))
    assert isinstance(row, RowError) and "division by zero" in str(row)


def test_a_beginning_of_text_that_only_long_chats_double_refuses_them():
    template = "{{ bos_token }}{% if messages|length > 2 %}{{ bos_token }}{% endif %}" + CHATML
    tokenizer = tokenizer_of(template, bos="<s>")
    assert isinstance(label(tokenizer, turns("a", "b")), LabelledRow)
    row = label(tokenizer, turns("a", "b", "c", "d"))
    assert isinstance(row, RowError) and "beginning-of-text token twice" in str(row)
    apart = tokenizer_of("{{ bos_token + '\n' + bos_token }}" + CHATML, bos="<s>")
    with pytest.raises(LlmtuneError, match="twice"):
        label(apart, turns("a", "b"))


def test_an_answer_without_a_prompt_says_so_where_the_template_needs_one():
    template = "{% if messages[0].role != 'system' %}{{ 'Be brief.' }}{% endif %}"
    messages = [{"role": "assistant", "content": "hello"}, *turns("a", "b")]
    row = label(tokenizer_of(template + CHATML), messages)
    assert isinstance(row, RowError) and "has no prompt for it" in str(row)
    messages[0]["train"] = False
    assert isinstance(label(tokenizer_of(template + CHATML), messages), LabelledRow)


def test_a_prompts_own_answer_is_trained_where_its_mark_says_so():
    from llmtune.data.formats.completion import CompletionFormat

    prompt = turns("a", "one", "b")
    prompt[1]["train"] = True
    row = CompletionFormat().to_conversation({"prompt": prompt, "completion": "two"})
    tokenizer = make_shape("chatml")
    (labelled,) = Labeller(tokenizer, "assistant").label([row])
    (sequence,) = labelled.sequences
    assert [tokenizer.decode(sequence.input_ids[a:b]) for a, b in sequence.spans] == [
        "one<|im_end|>",
        "two<|im_end|>",
    ]


def test_documents_that_hold_control_tokens_are_counted():
    from llmtune.data.formats.text import TextFormat

    texts = [f"<|im_start|>user\na{END}", "plain"]
    rows = [TextFormat().to_conversation({"text": text}) for text in texts]
    rendered, plain = Labeller(make_shape("chatml"), "assistant").label(rows)
    assert rendered.notes and not plain.notes
    assert json.dumps(rendered.notes).count("control tokens") == 1
