"""The Modelfile repeats the chat template or is refused; the card holds the report's numbers."""

import pytest

from llmtune.errors import LlmtuneError
from llmtune.exporting.card import CardReport, render_card
from llmtune.exporting.modelfile import find_turns, render_modelfile
from tests.tiny import make_tokenizer

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}<|end|>\n\n"
    "{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} "
    "[/INST]{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ m['content'] }}\n\n{% endif %}{% endfor %}"
)
LAST_ONLY = "{{ messages[-1]['content'] }}"
NUMBERED = "{% for m in messages %}{{ loop.index }}: {{ m['content'] }}\n{% endfor %}"


def tokenizer(template):
    return make_tokenizer(chat_template=template)


def test_chatml_becomes_an_ollama_template():
    text = render_modelfile(tokenizer(DEFAULT_SYSTEM), "m.gguf", stop_token_ids=[3], adds_bos=False)
    assert text == (
        "FROM ./m.gguf\n"
        'TEMPLATE """{{ range .Messages }}'
        '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
        '{{ end }}{{ end }}<|im_start|>assistant\n"""\n'
        'SYSTEM """Be kind."""\n'
        'PARAMETER stop "<|im_end|>"\n'
    )


@pytest.mark.parametrize("template", [LLAMA3, MISTRAL])
def test_the_beginning_of_text_is_written_by_one_side_only(template):
    assert find_turns(tokenizer(template), adds_bos=True).start == ""
    assert find_turns(tokenizer(template), adds_bos=False).start == "<|im_start|>"


@pytest.mark.parametrize("template", [LAST_ONLY, NUMBERED])
def test_a_template_that_does_more_is_refused(template):
    with pytest.raises(LlmtuneError, match="Ollama's language"):
        find_turns(tokenizer(template), adds_bos=False)


def test_a_template_that_refuses_a_system_prompt_is_refused():
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}x"
    with pytest.raises(LlmtuneError, match="refuses a conversation"):
        find_turns(tokenizer(template), adds_bos=False)


def test_the_card_shows_the_reports_numbers_and_no_path_of_this_machine():
    report = {
        "verdict": "SHIP",
        "decided_by": {"reasons": ["movies rose."]},
        "caveats": ["One seed."],
        "base": {"origin": "/home/someone/models/Base-1B.gguf", "revision": None},
        "config": {"adapter": {"method": "lora", "rank": 16}},
        "cost": {"steps": 60, "tokens": 9000},
        "suites": {
            "movies": {
                "role": "target",
                "metric": "accuracy",
                "n": 200,
                "compared": ["original", "merged"],
                "original": 0.5,
                "base": 0.4,
                "merged": 0.75,
                "difference": 0.25,
                "interval": [0.18, 0.32],
            },
            "general": {"role": "general", "metric": "accuracy", "n": 50, "base": None},
        },
    }
    card = render_card("movies", CardReport.from_json(report), files={"m.gguf": "the model"})
    assert "| 200 | original to merged | 0.500 | 0.750 | +0.250 [+0.180, +0.320] |" in card
    assert "| general | general | accuracy | 50 | base to tuned | - | - | - |" in card
    assert "Base-1B.gguf" in card and "/home" not in card
    assert "**SHIP**" in card and "- One seed." in card and "- `m.gguf`: the model" in card
    assert "base_model" not in card


def test_a_base_on_the_hub_is_named_for_the_hub():
    report = {"verdict": "SHIP", "base": {"origin": "org/base", "revision": "0" * 40}}
    assert "base_model: org/base\n" in render_card("x", CardReport.from_json(report), files={})


def test_a_model_without_a_report_says_so():
    assert "Nothing was measured" in render_card("x", None, files={})
