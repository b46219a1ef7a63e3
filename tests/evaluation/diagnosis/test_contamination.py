"""Planted leaks are found and named, and clean sets stay clean."""

import json
import random
import subprocess
import sys

import pytest

from llmtune.data.config import DataConfig
from llmtune.evaluation.diagnosis.contamination import measure_contamination
from llmtune.evaluation.diagnosis.rows import find_frame, read_row_texts
from llmtune.evaluation.suite import load_suite
from tests.conftest import write_jsonl

RANDOM = random.Random(0)
VOCABULARY = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrst"]


def sentence(num_words=20):
    return " ".join(RANDOM.choice(VOCABULARY) for _ in range(num_words))


def chat(text):
    return {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"Sentence: {text}\nSentiment:"},
            {"role": "assistant", "content": "positive"},
        ]
    }


@pytest.fixture
def project(tmp_path):
    """Return a function from train sentences and item sentences to the result."""

    def measure(train, items, *, prompt="Is this good? {{ text }} Say yes or no.", **data):
        write_jsonl(tmp_path / "train.jsonl", [chat(text) for text in train])
        rows = [{"id": f"i{n}", "text": text, "answer": "yes"} for n, text in enumerate(items)]
        write_jsonl(tmp_path / "items.jsonl", rows)
        suite = {"task": "choice", "items": "items.jsonl", "prompt": prompt}
        suite |= {"choices": ["yes", "no"]}
        (tmp_path / "asked.yaml").write_text(json.dumps(suite))
        config = DataConfig(train=[{"path": str(tmp_path / "train.jsonl")}], **data)
        return measure_contamination(
            read_row_texts(config, "train"), [load_suite(tmp_path / "asked.yaml")]
        )

    return measure


def test_a_set_that_shares_nothing_is_clean(project):
    result = project([sentence() for _ in range(60)], [sentence() for _ in range(40)])
    found = result.suites["asked"]
    assert (found.exact, found.near, found.ngram, found.n) == (0, 0, 0, 40)
    assert found.item_ids == () and result.n_train_rows == 60


def test_every_kind_of_leak_is_found_once_and_names_its_row(project):
    train = [sentence(24) for _ in range(60)]
    words = train[7].split()
    items = [
        train[3].upper().replace(" ", "   "),  # in another frame, case and spacing
        " ".join([*words[:-1], "zzz"]),  # the last of 24 words changed
        f"{sentence(8)} {' '.join(train[9].split()[4:17])} {sentence(8)}",  # 13 words in a row
        " ".join(train[11].split()[2:11]),  # a short item that is part of a row
        f"{sentence(8)} {' '.join(train[9].split()[4:16])} {sentence(8)}",  # 12 words: nothing
        sentence(),
    ]
    found = project(train, items).suites["asked"]
    assert [(each.item_id, each.kind) for each in found.found] == [
        ("i0", "exact"), ("i1", "near"), ("i2", "ngram"), ("i3", "ngram"),
    ]  # fmt: skip
    assert (found.exact, found.near, found.ngram) == (1, 1, 2)
    assert found.item_ids == ("i0", "i1", "i2", "i3")
    assert [each.train_row.rpartition(":")[2] for each in found.found] == ["4", "8", "10", "12"]
    assert found.found[1].similarity > 0.8
    assert len(found.found[2].shared.split()) == 13 and len(found.found[3].shared.split()) == 8
    assert found.exact_share == pytest.approx(1 / 6)


def test_the_frame_that_all_rows_share_is_no_leak(project):
    frame = " ".join(VOCABULARY[:15])
    train = [f"{frame} {sentence(12)}" for _ in range(40)]
    items = [f"{frame} {sentence(12)}" for _ in range(30)]
    assert project(train, items, prompt="{{ text }}").suites["asked"].item_ids == ()


def test_a_few_words_within_the_frame_are_the_same_only_as_whole_texts(project):
    train = [f"{word} thing" for word in VOCABULARY[:30]]
    assert project(train, train[:5]).suites["asked"].exact == 0
    prompt = "sentence: {{ text }}  sentiment:"
    assert project(train, train[:5], prompt=prompt).suites["asked"].exact == 5


def test_rows_held_out_of_training_are_no_leak(project):
    train = [sentence() for _ in range(60)]
    whole = project(train, train).suites["asked"]
    part = project(train, train, evaluation_share=0.5)
    assert whole.exact == 60
    assert part.suites["asked"].exact == part.n_train_rows < 45


def test_a_frame_is_what_all_texts_begin_and_end_with():
    frame = find_frame(["A: one two. end", "A: three end", "A: four five six end"])
    assert (frame.head, frame.tail) == (1, 1)
    assert frame.own_words("A: one two. end") == "one two."
    assert find_frame(["alone"]).own_words("alone") == "alone"
    assert find_frame(["same", "same"]).own_words("same") == "same"


def test_looking_for_leaks_loads_no_torch():
    code = (
        "import sys; import llmtune.evaluation.diagnosis.contamination; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
