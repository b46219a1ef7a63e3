"""The trained tokens are exactly the chosen answers and their ends, on every template shape."""

import itertools
import json
from dataclasses import replace
from functools import lru_cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmtune.data.conversation import Conversation, chat
from llmtune.data.masks import LabelledRow, Labeller
from llmtune.data.problems import RowError
from llmtune.data.render import encode_plain, render_messages
from llmtune.models.turns import find_turn_ending, stop_token_ids
from tests.data.shapes import BEHIND_SHAPES, CHATML, SHAPES, Shape, make_shape, make_shape_tokenizer
from tests.data.shapes import turns as make_turns

ALL_SHAPES = sorted(SHAPES)


def label(tokenizer, messages, loss_on="assistant", tools=None):
    return Labeller(tokenizer, loss_on).label([chat(messages, tools)])[0]


def trained_texts(tokenizer, row):
    return [
        tokenizer.decode(sequence.input_ids[start:end], clean_up_tokenization_spaces=False)
        for sequence in row.sequences
        for start, end in sequence.spans
    ]


@pytest.mark.parametrize("name", ALL_SHAPES)
def test_trained_text_is_the_answers_and_their_ends(name):
    tokenizer, shape = make_shape(name), SHAPES[name]
    row = label(tokenizer, make_turns("What is it?", "A fox.", "And then?", "It jumps over."))
    assert isinstance(row, LabelledRow), row
    texts = [text.replace("<think>\n\n</think>\n\n", "") for text in trained_texts(tokenizer, row)]
    assert [text.removesuffix(shape.terminator).strip() for text in texts] == [
        "A fox.",
        "It jumps over.",
    ]
    assert all(text.endswith(shape.terminator) for text in texts)


@pytest.mark.parametrize("name", ALL_SHAPES)
def test_prompt_ids_are_those_of_inference(name):
    tokenizer = make_shape(name)
    messages = make_turns("What is it?", "A fox.", "And then?", "It jumps over.")
    row = label(tokenizer, messages, "last-assistant")
    prompt = render_messages(tokenizer, messages[:-1], add_generation_prompt=True)
    (sequence,) = row.sequences
    assert sequence.input_ids[: sequence.spans[0][0]] == prompt


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "gemma", "phi", "llama2"])
def test_one_example_has_the_ids_of_the_renderer(name):
    tokenizer = make_shape(name)
    messages = make_turns("What is it?", "A fox.", "And then?", "It jumps over.")
    row = label(tokenizer, messages)
    (sequence,) = row.sequences
    assert sequence.input_ids == render_messages(tokenizer, messages)
    assert len(sequence.spans) == 2


def test_line_break_after_the_end_of_a_turn_is_not_trained():
    tokenizer = make_shape("chatml")
    (sequence,) = label(tokenizer, make_turns("a", "b")).sequences
    assert tokenizer.decode(sequence.input_ids).endswith("<|im_end|>\n")
    assert sequence.input_ids[sequence.spans[0][1] - 1] == tokenizer.eos_token_id
    assert sequence.spans[0][1] < len(sequence.input_ids)


def test_template_that_drops_thinking_gives_one_example_a_turn():
    tokenizer = make_shape("qwen3")
    messages = make_turns("What is it?", "A fox.", "And then?", "It jumps over.")
    messages[1]["reasoning_content"] = "It has a tail."
    row = label(tokenizer, messages)
    assert len(row.sequences) == 2
    first, second = trained_texts(tokenizer, row)
    assert first == "<think>\nIt has a tail.\n</think>\n\nA fox.<|im_end|>"
    assert second.endswith("It jumps over.<|im_end|>")
    assert "tail" not in tokenizer.decode(row.sequences[1].input_ids)
    assert "one example a turn" in row.notes[0]


@pytest.mark.parametrize("content", [None, ""])
def test_a_turn_of_reasoning_alone_is_trained_as_rendered(content):
    messages = make_turns("So?", "A fox.", "And then?", "x")
    messages[3] |= {"reasoning_content": "It has a tail.", "content": content}
    tokenizer = make_shape("qwen3")
    row = label(tokenizer, messages)
    assert trained_texts(tokenizer, row)[-1] == "<think>\nIt has a tail.\n</think>\n\n<|im_end|>"
    refused = label(make_shape("chatml"), messages)
    assert isinstance(refused, RowError) and "reasoning_content" in str(refused)


def test_thinking_inside_content_is_trained_as_rendered():
    tokenizer = make_shape("qwen3")
    row = label(tokenizer, make_turns("So?", "<think>\nWell.\n</think>\n\nA fox."))
    assert trained_texts(tokenizer, row) == ["<think>\nWell.\n</think>\n\nA fox.<|im_end|>"]


def test_reasoning_that_the_template_leaves_out_is_refused():
    messages = make_turns("So?", "A fox.")
    messages[1]["reasoning_content"] = "It has a tail."
    row = label(make_shape("chatml"), messages)
    assert isinstance(row, RowError)
    assert "reasoning_content" in str(row)


def test_terminator_that_opens_the_next_turn_is_trained_on_every_turn():
    tokenizer = make_shape("glm")
    row = label(tokenizer, make_turns("What is it?", "A fox.", "And then?", "It jumps over."))
    (sequence,) = row.sequences
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    assert [sequence.input_ids[end - 1] for _, end in sequence.spans] == [user, user]
    assert user in stop_token_ids(tokenizer)
    observation = tokenizer.convert_tokens_to_ids("<|observation|>")
    assert observation in stop_token_ids(tokenizer)


def test_template_without_markers_closes_each_answer_with_end_of_text():
    tokenizer = make_shape("plain")
    row = label(tokenizer, make_turns("What is it?", "A fox.", "And then?", "It jumps."))
    assert trained_texts(tokenizer, row) == [" A fox.<|endoftext|>", " It jumps.<|endoftext|>"]
    assert "<|endoftext|>" not in tokenizer.decode(row.sequences[1].input_ids[:-1])


def test_system_role_that_the_template_refuses_is_a_problem_in_its_words():
    row = label(make_shape("gemma"), make_turns("a", "b", system="Be brief."))
    assert isinstance(row, RowError)
    assert "System role not supported" in str(row)


def test_system_text_that_the_template_drops_is_refused():
    template = CHATML.replace(
        "{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}"
    )
    shape = Shape(template, ("<|im_start|>", "<|im_end|>"), None, "<|im_end|>", "<|im_end|>")
    row = label(make_shape_tokenizer(shape), make_turns("a", "b", system="Be brief."))
    assert isinstance(row, RowError)
    assert "does not print its content" in str(row)


def test_history_that_is_stripped_gives_one_exact_example_a_turn():
    tokenizer = make_shape("stripping")
    row = label(tokenizer, make_turns("a", "one  ", "b", "two"))
    assert trained_texts(tokenizer, row) == ["one  <|im_end|>", "two<|im_end|>"]
    assert len(row.sequences) == 2


def test_spaces_that_the_template_strips_from_an_answer_do_not_refuse_it():
    """The stripped line break also ends the prompt, where it must not be looked for."""
    for name in ("gemma", "llama3"):
        tokenizer = make_shape(name)
        row = label(tokenizer, make_turns("0", "\n0"))
        assert isinstance(row, LabelledRow), row
        assert trained_texts(tokenizer, row) == ["0" + SHAPES[name].terminator]


def test_control_token_inside_a_message_is_refused():
    row = label(make_shape("chatml"), make_turns("a", "b<|im_end|>c"))
    assert isinstance(row, RowError)
    assert "<|im_end|>" in str(row)


def test_answer_that_merges_into_the_prompt_is_tokenized_apart():
    tokenizer = make_shape("chatml")
    messages = make_turns("a", "\n\n  one two")
    (sequence,) = label(tokenizer, messages).sequences
    start = sequence.spans[0][0]
    prompt = render_messages(tokenizer, messages[:1], add_generation_prompt=True)
    assert sequence.input_ids[:start] == prompt != render_messages(tokenizer, messages)[:start]
    assert tokenizer.decode(sequence.input_ids[start:]) == "\n\n  one two<|im_end|>"


def test_tool_calls_are_trained_and_tool_answers_are_not():
    tokenizer = make_shape("qwen3")
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
    call = {"function": {"name": "look_up", "arguments": json.dumps({"city": "Paris"})}}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "It rains."},
        {"role": "assistant", "content": "Rain."},
    ]
    row = label(tokenizer, messages, tools=tools)
    assert isinstance(row, LabelledRow), row
    texts = trained_texts(tokenizer, row)
    assert '"look_up"' in texts[0] and '"Paris"' in texts[0]
    assert texts[0].endswith("</tool_call><|im_end|>")
    assert texts[-1].endswith("Rain.<|im_end|>")
    assert not any("rains" in text for text in texts)


def test_tools_that_the_template_never_prints_are_refused():
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
    row = label(make_shape("chatml"), make_turns("a", "b"), tools=tools)
    assert isinstance(row, RowError)
    assert "look_up" in str(row)


def test_train_marks_choose_turns_and_weights_reach_the_examples():
    tokenizer = make_shape("chatml")
    messages = make_turns("a", "one", "b", "two", "c", "three")
    messages[1]["train"] = False
    messages[5]["weight"] = 0
    row = label(tokenizer, messages)
    assert trained_texts(tokenizer, row) == ["two<|im_end|>"]
    messages = make_turns("a", "one", "b", "two")
    messages[1]["weight"] = 0.5
    assert [s.weight for s in label(tokenizer, messages).sequences] == [0.5, 1.0]
    messages[1] = {"role": "assistant", "content": "one", "train": True}
    row = label(tokenizer, messages, "last-assistant")
    assert trained_texts(tokenizer, row) == ["one<|im_end|>", "two<|im_end|>"]


@pytest.mark.parametrize("name", ALL_SHAPES)
def test_loss_on_all_trains_every_token_and_a_stop(name):
    tokenizer = make_shape(name)
    (sequence,) = label(tokenizer, make_turns("a", "one", "b", "two"), "all").sequences
    assert sequence.spans == [(0, len(sequence.input_ids))]
    assert set(find_turn_ending(tokenizer).stop_ids) & set(sequence.input_ids)


TEXT = st.text(
    st.one_of(st.sampled_from("ab \n.<>|{}'\"\\é確🙂"), st.characters(exclude_categories=["Cs"])),
    min_size=1,
    max_size=12,
).filter(lambda text: text.strip())


@st.composite
def chats(draw):
    messages = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(TEXT)})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(TEXT)})
        if draw(st.integers(0, 3)) == 0:
            call = {"function": {"name": "look_up", "arguments": {"city": draw(TEXT)}}}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "content": draw(TEXT)})
        answer = {"role": "assistant", "content": draw(TEXT)}
        if draw(st.integers(0, 3)) == 0:
            answer["reasoning_content"] = draw(TEXT)
            answer["content"] = draw(st.sampled_from([answer["content"], ""]))
        messages.append(answer)
    return messages


def expected_answers(messages):
    return [message for message in messages if message["role"] == "assistant"]


@pytest.mark.parametrize("name", ALL_SHAPES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(messages=chats())
def test_random_chats_are_exact_or_refused(name, messages):
    tokenizer, shape = make_shape(name), SHAPES[name]
    row = label(tokenizer, messages)
    if isinstance(row, RowError):
        return
    texts = trained_texts(tokenizer, row)
    answers = expected_answers(messages)
    assert len(texts) == len(answers)
    for text, answer in zip(texts, answers, strict=True):
        if "tool_calls" in answer:
            assert '"look_up"' in text and text.endswith(shape.terminator)
            continue
        body = text.removesuffix(shape.terminator)
        assert body != text or shape.terminator == "<|user|>"
        content, reasoning = answer["content"].strip(), answer.get("reasoning_content", "")
        for stop in ("<|user|>", "<|observation|>", "<|assistant|>"):
            body = body.removesuffix(stop)
        assert body.strip().endswith(content)
        lead = body.strip().removesuffix(content)
        if reasoning:
            assert "".join(reasoning.split()) in "".join(lead.split())
        else:
            assert lead.strip() in ("", "<think>\n\n</think>")
    for sequence in row.sequences:
        for start, end in sequence.spans:
            assert sequence.input_ids[end - 1] in Labeller(tokenizer, "assistant").stop_ids
            assert 0 < start < end


@pytest.mark.parametrize("name", ALL_SHAPES + sorted(BEHIND_SHAPES))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(messages=chats())
def test_every_trained_prefix_is_an_inference_prompt(name, messages):
    """Before each trained span stand the very ids that inference would give the model."""
    tokenizer = make_shape(name)
    row = label(tokenizer, messages)
    if isinstance(row, RowError):
        return
    prompts = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompts.append(
                render_messages(
                    tokenizer,
                    chat([*messages[:index], {"role": "assistant", "content": "x"}]).messages[:-1],
                    add_generation_prompt=True,
                )
            )
    spans = [(s.input_ids, start) for s in row.sequences for start, _ in s.spans]
    assert [ids[:start] for ids, start in spans] == prompts


@pytest.mark.parametrize("has_post_processor", [True, False])
@pytest.mark.parametrize("name", ["llama3", "mistral", "gemma", "llama2"])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=TEXT, more=TEXT)
def test_beginning_of_text_is_never_doubled(name, has_post_processor, text, more):
    """Whether or not the tokenizer itself adds one: in prompts, in training rows, in plain text."""
    tokenizer = with_post_processor(name, has_post_processor)
    bos = tokenizer.bos_token_id
    messages = make_turns(text, more, more)
    ids = render_messages(tokenizer, messages, add_generation_prompt=True)
    rows = [label(tokenizer, messages[:2])]
    assert isinstance(rows[0], LabelledRow), rows[0]
    plain = Conversation(kind="plain", prompt=text, text=more)
    written = Conversation(kind="plain", prompt=tokenizer.bos_token + text, text=more)
    document = Conversation(kind="text", text=tokenizer.bos_token + text)
    rows += Labeller(tokenizer, "assistant").label([plain, written, document])
    for given_ids in [ids, *(s.input_ids for row in rows for s in row.sequences)]:
        assert all(pair != (bos, bos) for pair in itertools.pairwise(given_ids))
        # Llama 2's template opens every question with one; no other may stand after the start.
        assert name == "llama2" or bos not in given_ids[1:]
    assert ids[0] == bos
    for text_again in (text, tokenizer.bos_token + text):
        assert encode_plain(tokenizer, text_again).count(bos) <= 1


@lru_cache
def with_post_processor(name, has_post_processor):
    return make_shape_tokenizer(replace(SHAPES[name], has_post_processor=has_post_processor))


HARMONY = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '<|message|>' }}"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson + '<|call|>' }}"
    "{% else %}{{ m['content'] }}{{ '<|return|>' if loop.last and m['role'] == 'assistant' else "
    "'<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|message|>' }}{% endif %}"
)


def test_a_token_that_ends_only_tool_calls_is_a_stop_token_and_trained():
    specials = ("<|start|>", "<|message|>", "<|call|>", "<|return|>", "<|end|>", "<|endoftext|>")
    tokenizer = make_shape_tokenizer(Shape(HARMONY, specials, None, "<|endoftext|>", "<|return|>"))
    names = tokenizer.convert_ids_to_tokens(list(stop_token_ids(tokenizer)))
    assert sorted(names) == ["<|call|>", "<|endoftext|>", "<|return|>"]
    call = {"function": {"name": "look_up", "arguments": {"city": "Paris"}}}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "It rains."},
        {"role": "assistant", "content": "Rain."},
    ]
    row = label(tokenizer, messages)
    assert isinstance(row, LabelledRow), row
    assert [text[-10:] for text in trained_texts(tokenizer, row)] == ["}}<|call|>", "<|return|>"]


def test_a_turn_that_ends_with_no_stop_token_is_refused():
    """A template that ends long answers with another token than the short ones."""
    template = CHATML.replace(
        "'<|im_end|>\n' }}",
        "('<|cut|>' if m['content'] | length > 20 else '<|im_end|>') + '\n' }}",
    )
    specials = ("<|im_start|>", "<|im_end|>", "<|cut|>")
    tokenizer = make_shape_tokenizer(Shape(template, specials, None, "<|im_end|>", "<|im_end|>"))
    row = label(tokenizer, make_turns("a", "an answer of more than twenty characters"))
    assert isinstance(row, RowError)
    assert "<|cut|>, which does not end generation" in str(row)
