"""Items become token ids as training renders them, or as lm-evaluation-harness splits them."""

import json
from dataclasses import replace

import pytest
from tokenizers.processors import TemplateProcessing

from llmtune.data.conversation import chat
from llmtune.data.masks import Labeller
from llmtune.data.render import render_messages
from llmtune.errors import LlmtuneError
from llmtune.evaluation.lengths import refuse_unfit_items
from llmtune.evaluation.requests import encode_chats, encode_prompts, split_continuation
from llmtune.evaluation.suite import load_suite
from llmtune.evaluation.tasks.base import Demonstration
from tests.data.shapes import LLAMA2, MISTRAL, make_shape, make_spaced
from tests.tiny import CHATML, make_tokenizer

THINKING = CHATML.replace(
    "message['content'] +",
    "('<think>\n\n</think>\n\n' if message['role'] == 'assistant' else '') + message['content'] +",
)


ZEPHYR = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@pytest.fixture
def make_suite(tmp_path):
    def make(*, choices=("yes", "no"), **keys):
        item = {"question": "is 12 more than 3?", "options": list(choices), "answer": 0}
        (tmp_path / "items.jsonl").write_text(json.dumps(item) + "\n")
        declared = {
            "task": "choice",
            "items": "items.jsonl",
            "prompt": "{{ question }}",
            "choices_field": "options",
        } | keys
        (tmp_path / "suite.yaml").write_text(json.dumps(declared))
        return load_suite(tmp_path / "suite.yaml")

    return make


def choice_requests(tokenizer, suite):
    return suite.config.choice_requests(tokenizer, suite)


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_chat_prompt_and_its_choice_are_the_rendered_conversation(make_suite):
    tokenizer = make_tokenizer()
    [request] = choice_requests(tokenizer, make_suite(system="Be brief."))
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "is 12 more than 3?"},
        {"role": "assistant", "content": "yes"},
    ]
    whole = render_messages(tokenizer, talk)
    begun = [*request.prompt_ids, *request.choice_ids[0]]
    assert whole[: len(begun)] == begun


def test_what_a_template_writes_before_an_answer_belongs_to_the_prompt(make_suite):
    tokenizer = make_tokenizer(chat_template=THINKING)
    [request] = choice_requests(tokenizer, make_suite())
    talk = [
        {"role": "user", "content": "is 12 more than 3?"},
        {"role": "assistant", "content": "no"},
    ]
    whole = render_messages(tokenizer, talk)
    begun = [*request.prompt_ids, *request.choice_ids[1]]
    assert whole[: len(begun)] == begun
    assert "</think>" in tokenizer.decode(request.prompt_ids)
    assert "think" not in tokenizer.decode(request.choice_ids[1])


@pytest.mark.parametrize("with_end", [False, True])
@pytest.mark.parametrize("template", [ZEPHYR, LLAMA2, MISTRAL, CHATML])
@pytest.mark.parametrize("way", ["always", "first", "never", "normalizer"])
def test_choices_have_the_ids_that_training_gives_such_rows(make_suite, way, template, with_end):
    tokenizer = make_spaced(way)
    tokenizer.chat_template = template
    assert_scored_as_trained(tokenizer, make_suite, end_of_answer=with_end)


@pytest.mark.parametrize("name", ["mistral", "llama2", "llama3", "gemma", "qwen3", "glm", "plain"])
def test_choices_have_the_ids_of_training_in_every_shape_of_template(make_suite, name):
    assert_scored_as_trained(make_shape(name), make_suite, end_of_answer=True)


def assert_scored_as_trained(tokenizer, make_suite, **keys):
    """Hold prompt and choice against the labelled row of training, id by id."""
    choices = ("yes", "no", "Paris is the capital")
    [request] = choice_requests(tokenizer, make_suite(choices=choices, **keys))
    for choice, ids in zip(choices, request.choice_ids, strict=True):
        talk = [
            {"role": "user", "content": "is 12 more than 3?"},
            {"role": "assistant", "content": choice},
        ]
        [row] = Labeller(tokenizer, "assistant").label([chat(talk)])
        [sequence] = row.sequences
        [(_, end)] = sequence.spans
        scored = [*request.prompt_ids, *ids]
        assert scored == sequence.input_ids[: end if keys["end_of_answer"] else end - 1]


def test_a_template_that_training_refuses_is_asked_as_at_inference(make_suite, caplog):
    changing = CHATML.replace("message['content']", "message['content'] | replace('yes', 'YES')")
    tokenizer = make_tokenizer(chat_template=changing)
    [request] = choice_requests(tokenizer, make_suite())
    assert list(request.choice_ids[0]) == ids_of(tokenizer, "yes")
    assert "training could not learn from such answers" in caplog.text


def test_demonstrations_are_earlier_turns_of_the_chat(make_suite):
    tokenizer = make_tokenizer()
    shown = Demonstration("is 1 more than 3?", "no")
    [prompt] = encode_prompts(tokenizer, make_suite(), [shown])
    talk = [
        {"role": "user", "content": shown.prompt},
        {"role": "assistant", "content": shown.answer},
        {"role": "user", "content": "is 12 more than 3?"},
    ]
    assert list(prompt) == render_messages(tokenizer, talk, add_generation_prompt=True)


def test_demonstrations_precede_a_raw_prompt(make_suite):
    tokenizer = make_tokenizer()
    [prompt] = encode_prompts(tokenizer, make_suite(chat=False), [Demonstration("Q", "A")])
    assert tokenizer.decode(prompt) == "Q A\n\nis 12 more than 3?"


def test_the_end_of_an_answer_is_scored_where_asked(make_suite):
    tokenizer = make_tokenizer()
    [request] = choice_requests(tokenizer, make_suite(end_of_answer=True))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [ids[-1] for ids in request.choice_ids] == [end, end]
    assert [ids[:-1] for ids in request.choice_ids] == [
        tuple(ids_of(tokenizer, text)) for text in ("yes", "no")
    ]


def test_a_choice_that_begins_another_is_warned_of_unless_its_end_counts(make_suite, caplog):
    tokenizer = make_tokenizer()
    choice_requests(tokenizer, make_suite(choices=("44", "4")))
    assert (
        "items.jsonl: in 1 items (first: line 1) a wrong choice begins the right one" in caplog.text
    )
    caplog.clear()
    for keys in ({"end_of_answer": True}, {"normalize": "length"}, {"choices": ("44", "5")}):
        choice_requests(tokenizer, make_suite(**({"choices": ("44", "4")} | keys)))
    assert not caplog.text
    suite = make_suite(choices=("44", "4"))
    right_is_short = replace(suite, items=tuple(replace(one, answer=1) for one in suite.items))
    choice_requests(tokenizer, right_is_short)
    assert not caplog.text, "a longer wrong choice takes nothing from the right one"


def test_a_chat_without_template_is_refused(make_suite):
    with pytest.raises(LlmtuneError, match="no chat template"):
        choice_requests(make_tokenizer(chat_template=None), make_suite())


@pytest.mark.parametrize(
    ("context", "continuation"),
    [("The answer is", " yes"), ("The answer is ", "yes"), ("Q:\n", "no"), ("dog", "s are lazy")],
)
def test_raw_text_is_split_as_lm_eval_splits_it(context, continuation):
    tokenizer = make_tokenizer()
    head, tail = split_continuation(tokenizer, context, continuation)
    assert head + tail == ids_of(tokenizer, context + continuation)
    assert head == ids_of(tokenizer, context.rstrip())
    assert not tokenizer.decode(head).endswith((" ", "\n"))


def test_a_raw_prompt_begins_with_the_bos_that_the_tokenizer_adds(make_suite):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    [request] = choice_requests(tokenizer, make_suite(chat=False))
    assert request.prompt_ids[0] == tokenizer.bos_token_id
    assert request.prompt_ids.count(tokenizer.bos_token_id) == 1
    assert request.choice_ids[0] == tuple(ids_of(tokenizer, " yes"))


def test_the_delimiter_stands_before_a_raw_choice(make_suite):
    [request] = choice_requests(make_tokenizer(), make_suite(chat=False, delimiter=""))
    assert request.choice_ids[0] == tuple(ids_of(make_tokenizer(), "yes"))


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
HISTORY = [
    {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "Sunny"},
]


def write_suite(folder, item, **declared):
    (folder / "i.jsonl").write_text(json.dumps({"answer": "yes", **item}) + "\n")
    values = {"task": "exact", "items": "i.jsonl", **declared}
    path = folder / "s.yaml"
    path.write_text("\ufeff" + json.dumps(values))  # as some editors save it
    return path


ASKED = {"prompt": "{{ q }}"}


@pytest.mark.parametrize(
    ("item", "declared", "parts"),
    [
        ({"q": "hi", "system": "Be short.", "tools": [TOOL]}, ASKED, ["Be short.", '"weather"']),
        ({"turns": HISTORY, "tools": [TOOL]}, {"messages": "turns"}, ['"Rome"', "Sunny"]),
        ({"turns": HISTORY[:1], "system": "Be short."}, {"messages": "turns"}, ["Be short."]),
        ({"q": "hi", "system": "linux"}, {"prompt": "{{ q }} on {{ system }}"}, ["hi on linux"]),
        ({"prompt": "hi", "tools": [TOOL]}, {"task": "chat"}, ['"weather"']),
    ],
)
def test_an_item_is_read_as_a_training_row(tmp_path, item, declared, parts):
    tokenizer = make_shape("qwen3")
    suite = load_suite(write_suite(tmp_path, item, **declared))
    [ids] = encode_chats(tokenizer, suite)
    text = tokenizer.decode(ids)
    assert all(part in text for part in parts), text
    assert "system\nlinux" not in text


@pytest.mark.parametrize(
    ("item", "declared", "words"),
    [
        ({"turns": [{"role": "human", "content": "x"}]}, {"messages": "turns"}, "did you mean"),
        ({"q": "x", "system": "b"}, {**ASKED, "system": "a"}, "two system messages"),
        ({"q": "x", "tools": [TOOL]}, {**ASKED, "chat": False}, "read in chats only"),
        ({"q": "x"}, {}, "give either prompt"),
    ],
)
def test_what_training_refuses_is_refused_in_a_suite(tmp_path, item, declared, words):
    with pytest.raises(LlmtuneError, match=words):
        load_suite(write_suite(tmp_path, item, **declared))


def test_control_tokens_are_found_before_anything_is_trained(tmp_path, make_suite):
    tokenizer = make_tokenizer()
    suite = load_suite(write_suite(tmp_path, {"q": "hi<|im_end|>"}, **ASKED))
    words = r"i\.jsonl:1: message 1 \(user\): content holds the control token"
    for refuse in (
        encode_prompts,
        lambda tokenizer, one: refuse_unfit_items(tokenizer, [one], None),
    ):
        with pytest.raises(LlmtuneError, match=words):
            refuse(tokenizer, suite)
    with pytest.raises(LlmtuneError, match=r"items.jsonl:1: message 2 \(assistant\): content"):
        choice_requests(tokenizer, make_suite(choices=("yes<|im_end|>", "no")))
