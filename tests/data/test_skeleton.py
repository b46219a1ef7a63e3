"""The quick way of finding turns is taken only where proven, and gives what the slow one does."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers

from llmtune.data.answers import TextSpan
from llmtune.data.conversation import chat
from llmtune.data.marks import ControlMarks
from llmtune.data.masks import LabelledRow, Labeller
from llmtune.data.problems import RowError
from llmtune.data.spans import TextSample
from llmtune.data.template_proof import prints_contents_only
from tests.data.shapes import CHATML, SHAPES, make_shape, make_shape_tokenizer
from tests.data.shapes import turns as make_turns
from tests.data.test_masks import chats

LOOP = "{%% for m in messages %%}%s{%% endfor %%}"


@pytest.mark.parametrize("name", sorted(set(SHAPES) - {"qwen3"}))
def test_templates_that_only_print_are_proven(name):
    assert prints_contents_only(SHAPES[name].template)


@pytest.mark.parametrize(
    "template",
    [
        SHAPES["qwen3"].template,
        LOOP % "{% if 'x' in m['content'] %}a{% endif %}",
        LOOP % "{% if m.content | length > 3 %}a{% endif %}",
        LOOP % "{{ 'a' if m.content else 'b' }}",
        LOOP % "{{ m.content.split('x')[0] }}",
        LOOP % "{{ m.content[:3] }}",
        LOOP % "{{ m.get('content') }}",
        LOOP % "{{ m['get']('content') }}",
        LOOP % "{{ m }}",
        LOOP % "{{ m | tojson }}",
        LOOP % "{{ m.content | upper }}",
        LOOP % "{{ m.content | replace('a', 'b') }}",
        LOOP % "{{ m.content * 2 }}",
        LOOP % "{% set c = m.content %}{% if c == 'a' %}b{% endif %}",
        LOOP % "{% set c = m.content | trim %}{% set d = c + 'x' %}{{ d | length }}",
        LOOP % "{% for key in m %}{{ m[key] }}{% endfor %}",
        LOOP % "{% for letter in m.content %}{{ letter }}{% endfor %}",
        LOOP % "{% if loop.previtem and loop.previtem.content == 'a' %}b{% endif %}",
        LOOP % "{% if loop.changed(m.content) %}b{% endif %}",
        LOOP % "{% set a, b = m.content, m.role %}{% if a %}b{% endif %}",
        "{% set ns = namespace(c='') %}" + LOOP % "{% set ns.c = m.content %}"
        "{% if ns.c == 'a' %}b{% endif %}",
        "{% set ns = namespace(c='') %}" + LOOP % "{% set ns.c = m.content %}"
        "{% if ns['c'] == 'a' %}b{% endif %}",
        "{% set ns = namespace(c='') %}" + LOOP % "{% set ns.c = m.content %}{{ ns | tojson }}",
        "{% macro show(m) %}{{ m.content }}{% endmacro %}" + LOOP % "{{ show(m) }}",
        "{{ messages | map(attribute='content') | join }}",
        "{{ messages | tojson }}",
        "{% set all = dict(a=messages) %}{{ all.a[0].content[0] }}",
        "{% for m in messages if m.content != 'a' %}{{ m.content }}{% endfor %}",
        "{% set c %}{% for m in messages %}{{ m.content }}{% endfor %}{% endset %}{{ c[0] }}",
        "{{ messages[messages[0].content] }}",
        "{% if messages == [] %}a{% endif %}",
        "{% broken",
    ],
)  # fmt: skip
def test_templates_that_look_at_contents_are_not(template):
    assert not prints_contents_only(template)


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        LOOP % "{% if m.content is string %}{{ m.content }}{% endif %}",
        LOOP % "{% if 'tool_calls' in m %}x{% else %}{{ m.content }}{% endif %}",
        LOOP % "{% if m.role == 'user' and not loop.last %}{{ m['content'] | trim }}{% endif %}",
        "{% set system = messages[0]['content'] %}{% set loop_messages = messages[1:] %}"
        "{% for m in loop_messages %}{{ system + m.content }}{% endfor %}",
        "{% set c = (messages | last).content %}{{ c if messages | length > 1 else '' }}",
    ],
)
def test_ordinary_templates_are_proven(template):
    assert prints_contents_only(template)


def test_quick_way_is_taken_for_plain_chats():
    labeller = Labeller(make_shape("chatml"), "assistant")
    labeller.label([chat(make_turns("a", "b"))])
    assert labeller.skeletons is not None
    row = chat(make_turns("c", "d"))
    assert labeller.skeletons.find(row, [(1, 1.0)]) is not None
    assert labeller.skeletons.find(chat(make_turns("c", " d")), [(1, 1.0)]) is None
    assert Labeller(make_shape("qwen3"), "assistant").skeletons is None


def test_control_tokens_alone_tell_where_plain_spans_are():
    tokenizer = make_shape("chatml")
    text = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb c<|im_end|>\n"
    start, terminator = text.index("b c"), text.rindex("<|im_end|>")
    span = TextSpan(start, terminator, terminator + len("<|im_end|>"))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    marks = ControlMarks(tokenizer)
    (places,) = marks.places([ids])
    found = marks.anchors(TextSample(text, (span,)), ids, places)
    assert found is not None
    (anchor,) = found
    assert anchor.tail == "<|im_start|>assistant\n"
    assert tokenizer.decode(ids[anchor.token :]) == text[text.rindex("<|im_start|>") :]
    assert tokenizer.decode(ids[anchor.terminator]) == "<|im_end|>"


def test_control_tokens_that_the_text_does_not_show_are_left_to_offsets():
    tokenizer = make_shape("chatml")
    text = "<|im_start|>assistant\nb<|im_end|>\n"
    span = TextSpan(len(text) - 12, len(text) - 11, len(text) - 1)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    marks = ControlMarks(tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for other in (ids[1:], [*ids, end], [end, *ids[1:]]):
        (places,) = marks.places([other])
        assert marks.anchors(TextSample(text, (span,)), other, places) is None
    (places,) = marks.places([ids])
    across = TextSpan(5, len(text) - 11, len(text) - 1)
    assert marks.anchors(TextSample(text, (across,)), ids, places) is None


@pytest.mark.parametrize(
    "token",
    [
        AddedToken("<|x|>", single_word=True),
        AddedToken("<|x|>", lstrip=True, normalized=False),
        AddedToken("d|><x", normalized=True),  # it could begin inside <|im_end|>
    ],
)
def test_control_tokens_that_cannot_be_told_from_the_text_need_offsets(token):
    tokenizer = make_shape_tokenizer(SHAPES["chatml"])
    assert ControlMarks(tokenizer).is_exact
    tokenizer.add_tokens([token])
    assert not ControlMarks(tokenizer).is_exact


def test_normalized_control_tokens_need_offsets():
    tokenizer = make_shape_tokenizer(SHAPES["chatml"])
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken("<|x|>", normalized=True)])
    assert not ControlMarks(tokenizer).is_exact


# Pieces that join with each other, and with what a template writes beside them, to control tokens.
PIECES = st.lists(
    st.sampled_from(
        ["<|im_", "end|>", "<|", "|>", "</", "s>", "[", "INST]", "<eos", ">", "a", "\n"]
    ),
    min_size=1,
    max_size=4,
).map("".join)


@pytest.mark.parametrize("name", sorted(SHAPES))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(contents=st.lists(PIECES.filter(str.strip), min_size=2, max_size=2))
def test_contents_that_are_parts_of_control_tokens_change_nothing(name, contents):
    tokenizer = make_shape(name)
    labellers = (Labeller(tokenizer, "assistant", use_shortcuts=use) for use in (True, False))
    one, other = (labeller.label([chat(make_turns(*contents))])[0] for labeller in labellers)
    assert str(one) == str(other)


@pytest.mark.parametrize("name", sorted(SHAPES))
@pytest.mark.parametrize("loss_on", ["assistant", "last-assistant"])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(messages=chats())
def test_quick_and_careful_way_agree(name, loss_on, messages):
    tokenizer = make_shape(name)
    quick = Labeller(tokenizer, loss_on)
    careful = Labeller(tokenizer, loss_on, use_shortcuts=False)
    one, other = (labeller.label([chat(messages)])[0] for labeller in (quick, careful))
    if isinstance(other, RowError):
        assert isinstance(one, RowError) and str(one) == str(other)
    else:
        assert isinstance(one, LabelledRow)
        assert one.sequences == other.sequences
