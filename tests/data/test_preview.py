"""What `data show` prints is exactly what is trained on."""

import io
import json
from html.parser import HTMLParser

import pytest
from rich.console import Console

from llmtune.data.check import check_data
from llmtune.data.check_page import render_check_page
from llmtune.data.config import DataConfig
from llmtune.data.example import IGNORE_INDEX
from llmtune.data.prepare import prepare_examples
from llmtune.data.preview import preview_rows, render_page, render_terminal, split_tokens
from llmtune.errors import LlmtuneError
from tests.data.shapes import make_shape, turns, write_jsonl


@pytest.fixture
def config(tmp_path):
    rows = [
        {"messages": turns("What <b>now</b>?", "A 🙂 fox & 確か")},
        {"messages": []},
        {"messages": turns("c", "d", "e", "f")},
    ]
    return DataConfig(train=[{"path": write_jsonl(tmp_path / "rows.jsonl", rows)}])


class PlainText(HTMLParser):
    """Collects the text of trained and untrained tokens, and every outside address."""

    def __init__(self):
        super().__init__()
        self.trained, self.ids, self.addresses, self._stack = "", [], [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self._stack.append((tag, attrs.get("class")))
        if tag == "span" and "title" in attrs:
            self.ids += attrs["title"].split(" (")[0].split()
        self.addresses += [value for key, value in attrs.items() if key in ("src", "href")]

    def handle_endtag(self, tag):
        while self._stack and self._stack.pop()[0] != tag:
            pass

    def handle_data(self, data):
        inside = [name for tag, name in self._stack]
        if "t" in inside and "pre" in [tag for tag, _ in self._stack] and "br" not in inside:
            self.trained += data


def test_preview_has_the_ids_and_labels_of_training(config):
    tokenizer = make_shape("chatml")
    shown = preview_rows(config, tokenizer)
    assert [(preview.source[-10:], preview.line) for preview in shown] == [
        ("rows.jsonl", 1),
        ("rows.jsonl", 3),
    ]
    dropping = config.model_copy(update={"on_bad_row": "drop"})
    examples = prepare_examples(dropping, tokenizer, split="train", seed=0).examples
    prepared = {example.line: example for example in examples}
    for preview in shown:
        assert preview.input_ids == prepared[preview.line].input_ids
        assert preview.labels == prepared[preview.line].labels
        assert preview.text == tokenizer.decode(preview.input_ids)
        assert [i for token in preview.tokens for i in token.ids] == preview.input_ids
    line = json.loads(json.dumps(shown[0].to_json()))
    assert set(line) == {"input_ids", "labels", "text", "source", "line"}


def test_trained_tokens_are_marked_in_the_terminal(config):
    (preview,) = preview_rows(config, make_shape("chatml"), row=1)
    console = Console(
        record=True, width=200, force_terminal=True, color_system="truecolor", file=io.StringIO()
    )
    console.print(render_terminal([preview]))
    segments = console.export_text(styles=False)
    assert "A 🙂 fox & 確か<|im_end|>" in segments
    trained = "".join(token.text for token in preview.tokens if token.is_trained)
    assert trained == "A 🙂 fox & 確か<|im_end|>"
    assert sum(label != IGNORE_INDEX for label in preview.labels) == preview.num_trained


def test_page_is_self_contained_and_escaped(config):
    previews = preview_rows(config, make_shape("chatml"))
    page = render_page(previews)
    parsed = PlainText()
    parsed.feed(page)
    assert parsed.trained == "A 🙂 fox & 確か<|im_end|>d<|im_end|>f<|im_end|>"
    assert list(map(int, parsed.ids)) == [i for preview in previews for i in preview.input_ids]
    assert parsed.addresses == [] and "http" not in page and "<b>now" not in page


def test_bad_or_missing_row_says_why(config):
    with pytest.raises(
        LlmtuneError, match=r"row 2 cannot be used: .*rows.jsonl:2: messages is empty"
    ):
        preview_rows(config, make_shape("chatml"), row=2)
    with pytest.raises(LlmtuneError, match="it has 3 rows"):
        preview_rows(config, make_shape("chatml"), row=9)


def test_where_no_row_can_be_shown_the_first_says_why(tmp_path):
    rows = [{"messages": turns("a", "b<|im_end|>")}, {"messages": []}]
    config = DataConfig(train=[{"path": write_jsonl(tmp_path / "rows.jsonl", rows)}])
    with pytest.raises(LlmtuneError, match=r"no row of train .*rows.jsonl:1: .*control token"):
        preview_rows(config, make_shape("chatml"))


def test_row_longer_than_the_limit_is_said(config):
    short = config.model_copy(update={"max_length": 4})
    (preview,) = preview_rows(short, make_shape("chatml"), row=1)
    assert "longer than max_length 4" in preview.title


def test_check_page_names_the_findings(config):
    page = render_check_page(check_data(config, make_shape("chatml")))
    assert "not ready: empty (1)" in page and "rows.jsonl:2" in page
    parsed = PlainText()
    parsed.feed(page)
    assert parsed.addresses == [] and "http" not in page


def test_check_counts_the_labels_and_its_page_shows_them_with_the_first_rows(tmp_path):
    rows = [
        {"messages": turns(f"Ticket <{i}>: where is it?", "card" if i % 3 else "a <fee>")}
        for i in range(60)
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    report = check_data(
        DataConfig(train=[{"path": path}], evaluation_share=0.3), make_shape("chatml")
    )
    counts = report.labels
    assert sum(counts["train"].values()) + sum(counts["evaluation"].values()) == 60
    assert counts["train"]["a <fee>"] + counts["evaluation"]["a <fee>"] == 20
    said = f'train labels: "card" {counts["train"]["card"]}'
    assert any(line.startswith(said) for line in report.lines())
    page = render_check_page(report)
    assert "Labels (2)" in page and "evaluation: the first" in page
    assert "Ticket &lt;3&gt;: where is it?" in page and "<fee>" not in page
    free = [{"messages": turns(f"What is {i}?", f"It is {i}.")} for i in range(20)]
    path = write_jsonl(tmp_path / "free.jsonl", free)
    report = check_data(DataConfig(train=[{"path": path}]), make_shape("chatml"))
    assert report.labels == {}, "answers that hardly repeat are no labels"


def test_a_finding_without_places_lists_none(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": []}])
    report = check_data(DataConfig(train=[{"path": path}]), make_shape("chatml"))
    lines = report.lines()
    at = next(i for i, line in enumerate(lines) if "no row is left to use" in line)
    assert "more" not in lines[at + 1]


@pytest.mark.parametrize("split", ["train", "evaluation"])
def test_rows_of_the_other_split_are_not_shown(tmp_path, split):
    rows = [{"prompt": f"q {i}", "completion": "a"} for i in range(60)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = DataConfig(train=[{"path": path}], evaluation_share=0.3)
    tokenizer = make_shape("chatml")
    shown = preview_rows(config, tokenizer, split=split, limit=60)
    used = prepare_examples(config, tokenizer, split=split, seed=0).examples
    assert [preview.line for preview in shown] == sorted(example.line for example in used)
    (other, *_) = set(range(1, 61)) - {preview.line for preview in shown}
    with pytest.raises(LlmtuneError, match=f"row {other} .*is not in {split}"):
        preview_rows(config, tokenizer, split=split, row=other)


def test_a_row_cannot_steer_the_terminal_it_is_shown_in(tmp_path):
    hidden = "red \x1b[31m, bell \x07, nothing \u200b, backwards \u202e"
    rows = [{"messages": turns(hidden, hidden)}]
    config = DataConfig(train=[{"path": write_jsonl(tmp_path / "rows.jsonl", rows)}])
    (preview,) = preview_rows(config, make_shape("chatml"))
    console = Console(file=(written := io.StringIO()), width=200)
    console.print(render_terminal([preview]))
    for shown in (written.getvalue(), render_page([preview])):
        assert not set("\x1b\x07\u200b\u202e") & set(shown)
        assert "␛" in shown and "U+202E" in shown
    assert hidden in preview.text  # scripts get it as it is


def test_a_sentencepiece_tokenizer_keeps_its_spaces():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<s>"], show_progress=False)
    tokenizer.train_from_iterator(["the lazy dog saw the fox"] * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    ids = fast("<s>the lazy dog saw the fox").input_ids
    tokens = list(split_tokens(fast, ids, ids))
    assert "".join(token.text for token in tokens).endswith("the lazy dog saw the fox")
    assert any(token.text.startswith(" ") for token in tokens)
