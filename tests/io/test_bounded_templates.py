"""A hostile template ends at once, in one line; any other prints what it always printed."""

import json
import resource
import time

import jinja2
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmtune import cli
from llmtune.errors import LlmtuneError
from llmtune.evaluation.templates import compile_template
from llmtune.io import template_guards
from llmtune.io.bounded_templates import bound_template
from llmtune.io.template_guards import TemplateTooLarge, bounded_work
from llmtune.models.chat_template import apply_chat_template
from tests.data.shapes import SHAPES, make_shape
from tests.project import make_project
from tests.tiny import CHATML, make_tokenizer

CHAT = [
    {"role": "user", "content": "What is 2 + 3? 100% sure, {braces} and 123456 too"},
    {"role": "assistant", "content": "It is 5."},
    {"role": "user", "content": "Why?"},
]
GROW = "{% set n = namespace(x='ab') %}{% for i in range(99) %}"
TWICE = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
HOSTILE = {
    "product": "{{ 'a' * 10**10 }}",
    "product of a list": "{{ ([0] * 10**10)|length }}",
    "width": "{{ '%1000000000d' % 1 }}",
    "width from outside": "{{ '%*d' % (10**9, 1) }}",
    "format": "{{ '{:1000000000d}'.format(1) }}",
    "format from outside": "{{ '{:{w}d}'.format(1, w=10**9) }}",
    "format filter": "{{ '%1000000000d'|format(1) }}",
    "center": "{{ 'a'|center(10**9) }}",
    "indent": "{{ 'a\nb'|indent(10**9) }}",
    "tojson": "{{ [1]|tojson(indent=10**9) }}",
    "method": "{{ 'a'.ljust(10**9) }}",
    "replace": "{{ ('a' * 10**6).replace('a', 'b' * 10**6) }}",
    "join": "{{ ('a' * 10**6)|join('b' * 10**6) }}",
    "sum": "{{ ([[1] * 9999] * 9999)|sum(start=[]) }}",
    "power": "{{ (10**(10**10))|string|length }}",
    "filling": "{{ lipsum(n=10**6) }}",
    "nested ranges": TWICE,
    "filtered loop": TWICE.replace(") %}{% endfor", ") if 0 %}{% endfor"),
    "macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for a in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "text in a loop": "{% for i in range(99999) %}" + "a" * 9999 + "{% endfor %}",
    "doubling": GROW + "{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling by ~": GROW + "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by a block": "{% set n = namespace(x='ab') %}{% for i in range(99) %}"
    "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}",
    "lists in lists": GROW + "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "objects in objects": GROW + "{% set n.x = dict(a=n.x, b=n.x) %}{% endfor %}{{ n.x }}",
    "namespaces": GROW + "{% set n.x = namespace(a=n.x, b=n.x) %}{% endfor %}{{ n.x }}",
    "copies": "{% set n = namespace(x=[]) %}{% set a = 'a' * 10**6 %}{% for i in range(9999) %}"
    "{% set n.x = n.x + [a[1:]] %}{% endfor %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_refused_at_once(name, monkeypatch):
    monkeypatch.setattr(template_guards, "MOST_STEPS", 100_000)
    tokenizer = make_tokenizer(chat_template="{# " + name + " #}" + HOSTILE[name])
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    with pytest.raises((LlmtuneError, RecursionError, jinja2.TemplateError)):
        apply_chat_template(tokenizer, CHAT)
    assert time.thread_time() - began < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_a_template_that_was_refused_is_not_tried_again():
    tokenizer = make_tokenizer(chat_template=TWICE)
    with pytest.raises(TemplateTooLarge, match="the chat template is refused: it loops"):
        apply_chat_template(tokenizer, CHAT)
    began = time.thread_time()
    with pytest.raises(TemplateTooLarge, match="the chat template is refused: it loops"):
        apply_chat_template(tokenizer, CHAT)
    assert time.thread_time() - began < 0.1


def test_time_is_bounded_too(monkeypatch):
    monkeypatch.setattr(template_guards, "MOST_SECONDS", 0.05)
    environment = ImmutableSandboxedEnvironment()
    template = environment.from_string(bound_template(environment, TWICE))
    with pytest.raises(TemplateTooLarge, match="takes longer than"), bounded_work([]):
        template.render()


@pytest.mark.parametrize("shape", SHAPES)
def test_real_templates_print_what_transformers_prints(shape):
    tokenizer = make_shape(shape)
    for chat, options in (
        (CHAT, {}),
        (CHAT, {"add_generation_prompt": True}),
        (CHAT[:2], {"tools": None}),
        ([{"role": "system", "content": "Be brief."}, *CHAT], {}),
    ):
        texts = []
        for render in (
            lambda **more: tokenizer.apply_chat_template(chat, tokenize=False, **more),  # noqa: B023
            lambda **more: apply_chat_template(tokenizer, chat, **more),  # noqa: B023
        ):
            try:
                texts.append(render(**options))
            except Exception as error:  # noqa: BLE001 (the same refusal)
                texts.append(f"{type(error).__name__}: {error}")
        assert texts[0] == texts[1]
    ids = apply_chat_template(tokenizer, CHAT, tokenize=True)
    assert ids == tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)


PLAIN = """
{%- macro tell(x, by=2) -%}<{{ x * by }}|{{ caller() if caller else '-' }}>{%- endmacro -%}
{% for m in messages[::-1] if m.role != 'system' %}{{ loop.index }}/{{ loop.length }}
{{- m['content'] | replace('2', 'two') | upper | trim }}{% else %}none{% endfor %}
{% set s %}a{{ messages | length }}{% endset %}{% set t | upper %}low{% endset %}
{{ s ~ t ~ (1 + 2) }}
{{ messages | map(attribute='role') | join(', ') }} {{ messages | join(' ', attribute='role') }}
{{ [1, 2, 3] | sum }} {{ [{'a': 1}, {'a': 2}] | sum(attribute='a') }} {{ (1, 2) + (3,) }}
{{ '%s-%05.2f' % ('a', 2.5) }} {{ '%s' | format('b') }} {{ '{:>6}|{x}'.format('r', x=1) }}
{{ 'a,b'.split(',') | tojson }} {{ {'k': [1]} | tojson(indent=2) }} {{ ','.join(['x', 'y']) }}
{{ tell('q') }} {% call tell('z', by=1) %}body{% endcall %} {{ 2 ** 10 }} {{ 7 % 3 }} {{ -3 // 2 }}
{{ undefined_name }} {{ 'abc'[1:] }} {{ 'abc'.replace('b', 'x') }} {{ 'ab'.ljust(4) ~ '|' }}
{% filter indent(2) %}one
two{% endfilter %} {{ namespace(a=1).a }} {{ dict(a=1) }}
{% if 1 is odd and 'a' in 'b' %}yes{% endif %}
"""


def test_all_of_the_language_prints_what_it_printed():
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    bounded = environment.from_string(bound_template(environment, PLAIN))
    with bounded_work(CHAT):
        found = bounded.render(messages=CHAT)
    assert found == environment.from_string(PLAIN).render(messages=CHAT)


def test_a_suite_s_prompt_is_bounded_too():
    assert compile_template("{{ text }}?", "a.yaml").render(text="Why") == "Why?"
    with pytest.raises(LlmtuneError, match="computes with numbers"):
        compile_template("{{ 10**(10**10) }}", "a.yaml").render()
    with pytest.raises(LlmtuneError, match="a.yaml: "):
        compile_template("{{ a|", "a.yaml")


def test_train_and_plan_refuse_a_hostile_template_in_one_line(tmp_path, capsys):
    config = make_project(tmp_path)
    path = tmp_path / "base" / "chat_template.jinja"
    path.write_text(CHATML + HOSTILE["doubling"])
    for command in ("train", "plan"):
        assert cli.run_command([command, str(config), "--quiet"]) == 2
        said = capsys.readouterr().err
        assert "the chat template is refused: it makes too much text" in said
        assert "Traceback" not in said
    assert json.loads(config.read_text())["run_dir"]
