"""`data check` finds every planted fault, names its lines, and reports none on the clean file."""

import json
import random
import subprocess
import sys
import textwrap

import pytest

from llmtune.data.check import check_data
from llmtune.data.config import DataConfig
from llmtune.data.duplicates import find_near_duplicates, find_shared_ngrams
from llmtune.data.suspicion import main_script
from tests.data.shapes import make_shape, turns, write_jsonl
from tests.versions import without_torch

NOUNS = [
    "fox",
    "dog",
    "river",
    "film",
    "garden",
    "engine",
    "letter",
    "winter",
    "market",
    "bridge",
    "painter",
    "sailor",
    "window",
    "forest",
    "teacher",
    "ticket",
    "shadow",
    "village",
]
VERBS = ["finds", "loses", "paints", "follows", "remembers", "builds", "crosses", "sells", "hears"]
ENDINGS = [
    "before noon",
    "without a word",
    "for the first time",
    "in the rain",
    "near the sea",
    "after a long walk",
    "on a quiet street",
    "with great care",
    "every second year",
]


def sentence(random_: random.Random) -> str:
    words = random_.sample(NOUNS, 4) + random_.sample(VERBS, 2) + random_.sample(ENDINGS, 2)
    one, two, three, four, first, second, how, when = words
    return (
        f"The {one} {first} the {two} {how}, number {random_.randint(1, 9999)}, and then the "
        f"{three} {second} the {four} {when}."
    )


def clean_rows(count: int, seed: int = 0) -> list[dict]:
    random_ = random.Random(seed)
    asked = "What happens in this story? Say it in one sentence.\n\n"
    return [
        {"messages": turns(asked + sentence(random_), "It says: " + sentence(random_))}
        for _ in range(count)
    ]


def message(role: str, content, **more) -> dict:
    return {"role": role, "content": content, **more}


def call(name: str, arguments) -> dict:
    return {"function": {"name": name, "arguments": arguments}}


A, B = message("user", "What is it?"), message("assistant", "A story.")
STORY = "Once there was a baker who sold bread to the whole village and to the sea beyond it."

PLANTED = {
    "json": '{"messages": [',
    "column": {"chat": []},
    "role": {"messages": [message("usr", "a"), B]},
    "content": {"messages": [A, {"role": "assistant", "text": "b"}]},
    "empty": {"messages": [A, message("assistant", "  ")]},
    "no-assistant": {"messages": [A]},
    "messages": {"messages": "hello"},
    "tool-call": {"messages": [A, message("assistant", None, tool_calls=[call("f", "{x")])]},
    "unicode": '{"messages": [{"role": "user", "content": "\\ud800"}, '
    '{"role": "assistant", "content": "b"}]}',
    "control-token": {"messages": [A, message("assistant", "yes<|im_end|>no")]},
    "template": {"messages": [A, message("assistant", "b", reasoning_content="because")]},
    "too-long": {"messages": [A, message("assistant", "word " * 900)]},
    "control-character": {"messages": [message("user", "What\x00 now?"), B]},
    "encoding": {"messages": [message("user", "What is a cafÃ©?"), B]},
    "placeholder": {"messages": [message("user", "Dear {{ name }}, what is it?"), B]},
    "html": {"messages": [message("user", "Salt &amp; pepper?"), B]},
    "spaces": {"messages": [message("user", "Spaced?"), message("assistant", "Yes.\n")]},
    "missing-value": {"messages": [message("user", "Where?"), message("assistant", "nan")]},
    "refusal": {"messages": [message("user", "Why?"), message("assistant", "As an AI model, no.")]},
    "loop": {"messages": [message("user", "Loop?"), message("assistant", "I see it. " * 12)]},
    "turn-order": {"messages": [A, message("user", "And?"), B]},
    "unanswered": {"messages": [A, message("assistant", "It?"), message("user", "Well?")]},
    "tool-balance": {"messages": [A, message("tool", "It rains."), message("assistant", "Rain.")]},
    "script": {"messages": [message("user", "Что это такое?"), message("assistant", "Это лиса.")]},
    "conflict": {"messages": [A, message("assistant", "A poem.")]},
}


def run_check(tmp_path, rows, **data):
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = DataConfig.model_validate({"train": [{"path": path}], "max_length": 900} | data)
    return check_data(config, make_shape("chatml"))


def test_every_planted_fault_is_found_with_its_line(tmp_path):
    rows: list = clean_rows(1000)
    lines = {}
    for index, (kind, fault) in enumerate(PLANTED.items()):
        lines[kind] = 20 + 37 * index
        rows[lines[kind] - 1] = fault
    first = {"messages": [A, B]}  # `conflict` answers this one differently
    rows[9] = first
    rows[949], lines["duplicate"] = rows[499], 950
    near = json.loads(json.dumps(rows[599]))
    near["messages"][1]["content"] += " Indeed."
    rows[959], lines["near-duplicate"] = near, 960
    held = write_jsonl(tmp_path / "held.jsonl", [rows[699], {"messages": turns("Tell it.", STORY)}])
    lines["leak"] = 700
    rows[969] = {"messages": turns("Another one?", "Then: " + STORY + " " + STORY[::-1])}
    lines["ngram-overlap"] = 970

    report = run_check(tmp_path, rows, evaluation=[{"path": held}])
    found = {finding.kind: {place.line for place in finding.places} for finding in report.findings}
    missing = {kind: line for kind, line in lines.items() if line not in found.get(kind, ())}
    assert not missing, (missing, found)
    assert len(lines) >= 20
    # Nothing else is accused.
    planted = set(lines.values()) | {10}
    accused = {line for places in found.values() for line in places} - planted
    assert not accused, {k: p - planted for k, p in found.items() if p - planted}
    assert not report.is_ok and report.verdict.startswith("not ready: ")
    json.dumps(report.to_json())


def test_clean_file_has_no_findings(tmp_path):
    report = run_check(tmp_path, clean_rows(1000))
    assert report.findings == ()
    assert report.verdict == "ready: nothing found"
    assert report.reports[0].stop_row_ratio == 1.0
    assert report.roles == {"user": 1000, "assistant": 1000}


def test_shared_instructions_are_not_near_duplicates(tmp_path):
    frame = "You are a careful critic. Read the sentence twice, weigh every word of it, and say. "
    random_ = random.Random(3)
    rows = [{"messages": turns(frame * 2 + sentence(random_)[:60], "good")} for _ in range(300)]
    report = run_check(tmp_path, rows)
    assert "near-duplicate" not in {finding.kind for finding in report.findings}


def test_near_duplicates_are_pairs_with_a_similarity():
    random_ = random.Random(1)
    texts = [sentence(random_) for _ in range(200)]
    texts.append(texts[50] + "!")
    (pair,) = find_near_duplicates(texts)
    assert (pair.first, pair.second) == (50, 200)
    assert 0.8 <= pair.similarity < 1
    assert find_near_duplicates(["a", ""]) == []


def test_shared_words_are_found_and_frames_are_not():
    frame = "one two three four five six seven eight nine ten eleven twelve thirteen"
    train = [f"{frame} {i} {i + 1}" for i in range(50)]
    train.append("a b c d e f g h i j k l m n")
    evaluation = [f"{frame} 7 x", "z a b c d e f g h i j k l m"]
    assert [(row, at) for row, at, _ in find_shared_ngrams(train, evaluation)] == [(50, 1)]
    assert find_shared_ngrams(train, []) == []


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("hello", "latin"),
        ("Grüße, Ägypten", "latin"),
        ("Привет", "cyrillic"),
        ("你好世界", "han"),
        ("こんにちは", "kana"),
        ("مرحبا", "arabic"),
        ("안녕", "hangul"),
        ("12 + 3 = 15", ""),
        ("", ""),
        ("naïve 你", "latin"),
        ("🙂🙂", ""),
    ],
)
def test_script_of_a_text(text, script):
    assert main_script(text) == script


def test_dropped_rows_are_warnings(tmp_path):
    report = run_check(tmp_path, [*clean_rows(10), {"messages": []}], on_bad_row="drop")
    assert report.is_ok
    assert [finding.severity for finding in report.findings] == ["warning"]
    assert any("rows.jsonl:11" in line for line in report.lines())


def test_long_documents_that_are_split_are_no_finding(tmp_path):
    rows = [{"text": f"{i} " + f"word{i} " * 300} for i in range(10)]
    report = run_check(tmp_path, rows, max_length=64, length_policy="split", loss_on="all")
    assert not [one for one in report.findings if one.kind == "too-long"] and report.is_ok
    assert any("10 split; 0 trained tokens lost" in line for line in report.lines())


def test_a_bad_row_of_a_file_that_both_splits_share_is_one_finding(tmp_path):
    rows = clean_rows(20)
    rows[4]["messages"][0]["role"] = "usr"
    report = run_check(tmp_path, rows, evaluation_share=0.3)
    assert [(one.kind, one.count) for one in report.findings if one.severity == "error"] == [
        ("role", 1)
    ]


@without_torch
def test_check_needs_no_torch(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", clean_rows(50))
    code = f"""
        import sys
        from tests.data.shapes import make_shape
        from llmtune.data.check import check_data
        from llmtune.data.config import DataConfig
        check_data(DataConfig(train=[{{"path": {path!r}}}]), make_shape("chatml"))
        assert not {{"torch", "datasets", "trl", "peft"}} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_reasoning_that_no_answer_follows_is_warned_of(tmp_path):
    thinking = {"role": "assistant", "reasoning_content": "Hm.", "content": ""}
    path = write_jsonl(tmp_path / "rows.jsonl", [*clean_rows(4), {"messages": [A, thinking]}])
    report = check_data(DataConfig(train=[{"path": path}]), make_shape("qwen3"))
    (finding,) = [finding for finding in report.findings if finding.kind == "no-answer"]
    assert [place.line for place in finding.places] == [5]
    assert report.is_ok
