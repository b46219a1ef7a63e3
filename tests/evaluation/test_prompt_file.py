"""A user's own prompt stands around the items, with a system message where it sets one."""

import json

import pytest

from llmtune.errors import LlmtuneError
from llmtune.evaluation.prompt_file import read_prompt_file
from llmtune.evaluation.suite import load_suite
from tests.conftest import write_jsonl


def make_suite(folder, **keys):
    write_jsonl(
        folder / "items.jsonl", [{"q": "How?", "answer": "a"}, {"q": "Why?", "answer": "b"}]
    )
    values = {"task": "choice", "items": "items.jsonl", "prompt": "{{ q }}", "choices": ["a", "b"]}
    (folder / "suite.yaml").write_text(json.dumps(values | keys))
    return load_suite(folder / "suite.yaml")


def write_prompt(folder, text):
    (folder / "mine.txt").write_text(text)
    return read_prompt_file("mine", folder / "mine.txt")


def test_text_stands_around_every_question(tmp_path):
    prompt = write_prompt(tmp_path, "Answer {{ choices | join(' or ') }}.\n{{ prompt }}\n")
    asked = prompt.ask(make_suite(tmp_path))
    assert [i.prompt for i in asked.items] == ["Answer a or b.\nHow?", "Answer a or b.\nWhy?"]
    assert asked.config.system is None
    assert asked.items_fingerprint == make_suite(tmp_path).items_fingerprint


def test_a_system_message_takes_the_place_of_the_suites(tmp_path):
    text = "{% set system %}\nBe {{ 'brief' }}.\n{% endset %}\n{{ prompt }}"
    prompt = write_prompt(tmp_path, text)
    asked = prompt.ask(make_suite(tmp_path, system="Be long."))
    assert (asked.config.system, asked.items[0].prompt) == ("Be brief.", "How?")
    raw = prompt.ask(make_suite(tmp_path, chat=False))
    assert (raw.config.system, raw.items[0].prompt) == (None, "Be brief.\n\nHow?")


def test_another_text_is_another_fingerprint(tmp_path):
    first = write_prompt(tmp_path, "A {{ prompt }}")
    assert first.fingerprint != write_prompt(tmp_path, "B {{ prompt }}").fingerprint


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Just text.", "no place for the question"),
        ("{{ prompt }} {{ answer }}", "asks for 'answer'"),
        ("{{ prompt ", "line 1"),
    ],
)
def test_a_prompt_that_cannot_serve_is_refused_by_name(tmp_path, text, reason):
    with pytest.raises(LlmtuneError, match=f"(?s)evaluate.prompts.mine.*{reason}"):
        write_prompt(tmp_path, text)


def test_a_missing_file_and_a_failing_template_are_refused(tmp_path):
    with pytest.raises(LlmtuneError, match="no such file"):
        read_prompt_file("mine", tmp_path / "none.txt")
    with pytest.raises(LlmtuneError, match="cannot be rendered"):
        write_prompt(tmp_path, "{{ prompt + 1 }}").ask(make_suite(tmp_path))
    with pytest.raises(LlmtuneError, match="empty prompt"):
        write_prompt(tmp_path, "{{ prompt[99:] }}").ask(make_suite(tmp_path))
