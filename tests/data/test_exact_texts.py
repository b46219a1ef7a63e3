"""Trained texts against strings that a few lines of this file derive without our code."""

import random

import pytest

from llmtune.data.conversation import chat
from llmtune.data.masks import Labeller
from llmtune.data.render import render_messages
from tests.data.shapes import CHATML, LLAMA2, make_shape, make_spaced

WORDS = [
    "fox",
    "Paris",
    "12",
    "+",
    "30",
    "=",
    "42.",
    "yes",
    "no?",
    "é",
    "確か",
    "🙂",
    "\n",
    "line",
    "{x}",
    '"q"',
    "<b>",
    "'it'",
    "\t",
    "end",
]


def random_chat(draw: random.Random, words: list[str], *, has_system: bool) -> list[dict]:
    def text() -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, 9))).strip() or "x"

    messages = [{"role": "system", "content": text()}] if has_system else []
    for _ in range(draw.randint(1, 4)):
        messages.append({"role": "user", "content": text()})
        messages.append({"role": "assistant", "content": text()})
    return messages


EXPECTED = {
    "chatml": lambda answer: f"{answer}<|im_end|>",
    "llama3": lambda answer: f"{answer}<|eot_id|>",
    "mistral": lambda answer: f" {answer}</s>",
    "gemma": lambda answer: f"{answer}<end_of_turn>",
    "phi": lambda answer: f"{answer}<|end|>",
    "glm": lambda answer: f"{answer}<|user|>",
    "plain": lambda answer: f" {answer}<|endoftext|>",
    "qwen3": lambda answer: f"<think>\n\n</think>\n\n{answer}<|im_end|>",
}
WITHOUT_SYSTEM = ("mistral", "gemma")


def trained_texts(tokenizer, messages) -> list[str]:
    (row,) = Labeller(tokenizer, "assistant").label([chat(messages)])
    return [
        tokenizer.decode(sequence.input_ids[start:end], clean_up_tokenization_spaces=False)
        for sequence in row.sequences
        for start, end in sequence.spans
    ]


@pytest.mark.parametrize("name", EXPECTED)
def test_every_trained_text_is_the_one_expected_character_by_character(name):
    draw = random.Random(name)
    for number in range(40):
        has_system = number % 3 == 0 and name not in WITHOUT_SYSTEM
        messages = random_chat(draw, WORDS, has_system=has_system)
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        assert trained_texts(make_shape(name), messages) == list(map(EXPECTED[name], answers))


@pytest.mark.parametrize(("template", "end"), [(CHATML, "<|im_end|>"), (LLAMA2, "</s>")])
@pytest.mark.parametrize("way", ["always", "first", "never", "normalizer"])
def test_tokenizers_that_put_a_space_before_text_keep_masks_and_prompts(way, template, end):
    tokenizer = make_spaced(way)
    tokenizer.chat_template = template
    draw = random.Random(way)
    for _ in range(20):
        messages = random_chat(draw, ["fox", "dog.", "yes", "12", "the"], has_system=False)
        (row,) = Labeller(tokenizer, "assistant").label([chat(messages)])
        prompts = [
            render_messages(tokenizer, messages[:turn], add_generation_prompt=True)
            for turn in range(1, len(messages), 2)
        ]
        starts = [(s.input_ids, start) for s in row.sequences for start, _ in s.spans]
        assert [ids[:start] for ids, start in starts] == prompts
        texts = [text.removesuffix(end).strip() for text in trained_texts(tokenizer, messages)]
        assert texts == [m["content"] for m in messages if m["role"] == "assistant"]
