"""Work and memory grow with the data and not with its square: counted, never timed."""

import io

import pytest

from llmtune.data.conversation import chat
from llmtune.data.files import READERS, Reading, iter_file
from llmtune.data.json_list import READ_BYTES
from llmtune.data.masks import Labeller
from llmtune.data.problems import RowProblem
from llmtune.data.suspicion import find_repeats, has_loop
from llmtune.errors import LlmtuneError
from tests.data.shapes import make_shape, turns


class Counted:
    """A word that counts how often words are compared."""

    compared = 0

    def __init__(self, text: str) -> None:
        self.text = text

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return isinstance(other, Counted) and self.text == other.text


@pytest.mark.parametrize("words", [["a"], ["a", "b"], ["", "a", ""]])
def test_looking_for_a_loop_compares_each_word_a_fixed_number_of_times(words):
    counts = []
    for size in (1000, 2000):
        Counted.compared = 0
        list(find_repeats([Counted(w) for w in words * (size // len(words))], 20, 8))
        counts.append(Counted.compared)
    assert counts[0] <= 20 * 1000 and counts[1] <= 20 * 2000


@pytest.mark.parametrize(
    "text", ["ha, " * 8, "I am sorry. " * 8, "x" * 61, "so it is,so it is," * 4, "no\n\n" * 9]
)
def test_loops_are_found(text):
    assert has_loop(f"Well: {text} and so on")


@pytest.mark.parametrize(
    "text",
    ["ha, " * 7, "0 | " * 20, " " * 500, "\n \n" * 200, "a" + " " * 1000 + "b", "- - - " * 9],
)
def test_spaces_tables_and_short_repeats_are_no_loops(text):
    assert not has_loop(f"Well: {text} and so on")


def count_rendered(labeller, messages):
    """Label one chat; return the result and how many messages were rendered for it."""
    rendered = []
    tokenizer = labeller.tokenizer
    render = type(tokenizer).apply_chat_template.__get__(tokenizer)

    def counting(conversation, *args, **kwargs):
        several = conversation and isinstance(conversation[0], list)
        rendered.append(sum(map(len, conversation)) if several else len(conversation))
        return render(conversation, *args, **kwargs)

    tokenizer.apply_chat_template = counting
    try:
        return labeller.label([chat(messages)])[0], sum(rendered)
    finally:
        del tokenizer.apply_chat_template


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "phi"])
def test_a_chat_of_twice_the_turns_is_twice_the_work(name):
    tokenizer = make_shape(name)
    counts = []
    for num_turns in (200, 400):
        messages = turns(*["What is it?", "A fox."] * num_turns)
        row, count = count_rendered(Labeller(tokenizer, "assistant"), messages)
        assert sum(len(sequence.spans) for sequence in row.sequences) == num_turns
        counts.append(count)
    assert counts[1] < 2.2 * counts[0]


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "phi", "gemma", "llama2"])
def test_a_long_chat_is_labelled_as_if_every_turn_had_been_rendered(name):
    tokenizer = make_shape(name)
    messages = turns(*(f"word {number}" for number in range(180)))
    quick = Labeller(tokenizer, "assistant").label([chat(messages)])
    assert quick == Labeller(tokenizer, "assistant", use_shortcuts=False).label([chat(messages)])


class Recorded(io.BytesIO):
    """A file that remembers how much was asked of it at once."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.sizes: list[int] = []

    def read(self, size=-1):
        self.sizes.append(-1 if size is None else size)
        return super().read(size)


def test_a_list_inside_an_object_is_read_piece_by_piece():
    row = '{"text": "' + "x" * 1000 + '"}'
    text = '{"version": 1, "data": [' + ", ".join([row] * 8000) + '], "by": {"data": [1]}}'
    file = Recorded(text.encode())
    rows = list(READERS[".json"](file, "rows.json", Reading()))
    assert len(rows) == 8000 and rows[7999] == (8000, {"text": "x" * 1000})
    assert len(text) > 6 * READ_BYTES
    assert min(file.sizes) > 0 and max(file.sizes) <= 2 * READ_BYTES


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"data": [{"text": "a"}', "rows.json:1: not JSON (Expecting ',' delimiter"),
        ('{"data": [], \n"data": []}', "is there twice"),
        ('{"data": [{"text": "a"}]} x', "Extra data"),
        ("{x: 1}", "Expecting property name"),
    ],
)
def test_a_broken_object_is_named_with_its_line(tmp_path, text, words):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(LlmtuneError) as caught:
        list(iter_file(path, "rows.json"))
    assert words in str(caught.value)


def test_lines_named_json_are_read_as_lines_after_a_broken_first_one(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('{"text": "a"\n{"text": "b"}\n{"text": "c"}\n')
    found = list(iter_file(path, "rows.json"))
    assert isinstance(found[0], RowProblem)
    assert found[1:] == [(2, {"text": "b"}), (3, {"text": "c"})]
