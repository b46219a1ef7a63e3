"""`init` drafts a suite over rows that are not trained on, so that a run ends with a verdict."""

import errno
import json
import os
from typing import Any

import pytest
import yaml

from llmtune.cli import run_command
from llmtune.data import rows as rows_module
from llmtune.data.config import DataConfig
from llmtune.data.conversation import Conversation
from llmtune.data.init import describe_data
from llmtune.data.init_config import render_config
from llmtune.data.init_guess import GUESSED_FROM_ROWS
from llmtune.data.init_suite import NoSuite, share_to_hold_out
from llmtune.data.overlap import conversation_key, is_held_out
from llmtune.data.prepare import prepare_examples
from llmtune.evaluation.suite import load_suite
from tests.data.shapes import make_shape, turns, write_jsonl
from tests.tiny import make_model

LABELS = ("billing", "delivery", "login")


def tickets(count: int) -> list[dict]:
    return [{"messages": turns(f"ticket number {i}", LABELS[i % 3])} for i in range(count)]


def test_labels_become_the_choices_and_no_item_is_trained_on(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", tickets(200))
    found = describe_data(path)
    assert found.suite.asks and found.suite.choices == LABELS
    config = DataConfig.model_validate(yaml.safe_load(render_config(found))["data"])
    tokenizer = make_shape("chatml")
    trained, held_out = (
        prepare_examples(config, tokenizer, split=split, seed=0)
        for split in ("train", "evaluation")
    )
    assert len(held_out.examples) == len(found.suite.items) >= 20
    texts = " ".join(
        tokenizer.decode(trained.examples[i].input_ids) for i in range(len(trained.examples))
    )
    assert not any(f"{item['prompt']}<" in texts for item in found.suite.items)
    assert len(trained.examples) + len(held_out.examples) == 200


def test_what_init_writes_is_a_suite_that_can_be_read(tmp_path, capsys):
    rows = tickets(200)
    rows[3]["messages"][1]["content"] = rows[6]["messages"][1]["content"] = "bill"
    for i in range(10, 40, 3):
        rows[i]["messages"][1]["content"] = "bill"
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "mine.yaml"
    assert run_command(["init", path, "--out", str(out), "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    suite = load_suite(written["suite"])
    assert suite.name == "mine" and suite.role == "target"
    config: Any = suite.config
    assert config.end_of_answer, "bill begins billing"
    assert written["suite"] in yaml.safe_load(out.read_text())["evaluate"]["suites"]


def test_a_suite_alone_asks_all_rows_and_names_what_ships_beside_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "test.jsonl", tickets(60))
    assert run_command(["init", "test.jsonl", "--eval"]) == 0
    said = capsys.readouterr().out
    suite = load_suite("test_suite.yaml")
    assert suite.name == "test_suite" and len(suite.items) == 60
    assert "llmtune judge" in said and "test_suite.yaml general chat" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "test.jsonl",
        "test_items.jsonl",
        "test_suite.yaml",
    ]
    write_jsonl(tmp_path / "few.jsonl", tickets(3))
    assert run_command(["init", "few.jsonl", "--eval"]) == 2
    assert "too few" in capsys.readouterr().err and not (tmp_path / "few_suite.yaml").exists()


@pytest.mark.parametrize(
    ("rows", "task"),
    [
        ([{"prompt": f"q {i}", "completion": f"answer {i}"} for i in range(150)], "exact"),
        ([{"text": f"document number {i}"} for i in range(150)], "perplexity"),
        (
            [{"instruction": f"say {i}", "output": "word " * 40 + str(i)} for i in range(150)],
            "exact",
        ),
    ],
)
def test_other_rows_are_asked_for_their_answers_or_their_text(tmp_path, rows, task, capsys):
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert run_command(["init", path, "--out", str(tmp_path / "a.yaml"), "--json"]) == 0
    suite = load_suite(json.loads(capsys.readouterr().out)["suite"])
    assert suite.config.task == task
    if task == "exact":
        assert (suite.config.metric == "token_f1") == ("instruction" in rows[0])


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (tickets(30), "too few rows"),
        ([{"messages": turns("a", "b", "c", f"d {i}")} for i in range(20)], "too few chats"),
    ],
)
def test_where_no_suite_can_be_drafted_the_reason_is_told(tmp_path, capsys, rows, reason):
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    found = describe_data(path)
    assert isinstance(found.suite, NoSuite) and reason in found.suite.reason
    assert run_command(["init", path, "--out", str(tmp_path / "a.yaml")]) == 0
    assert reason in capsys.readouterr().out
    assert reason in (tmp_path / "a.yaml").read_text()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.yaml", "rows.jsonl"]


@pytest.mark.parametrize("count", [40, 2_000, 20_000])
def test_the_rows_are_read_once_and_the_items_are_those_that_the_run_holds_out(
    tmp_path, monkeypatch, count
):
    path = write_jsonl(tmp_path / "rows.jsonl", tickets(count))
    num_read, read_all = 0, rows_module._iter_all

    def count_rows(source):
        nonlocal num_read
        for entry in read_all(source):
            num_read += 1
            yield entry

    monkeypatch.setattr(rows_module, "_iter_all", count_rows)
    found = describe_data(path)
    assert num_read <= count + GUESSED_FROM_ROWS
    keys = {conversation_key(Conversation("chat", row["messages"])): row for row in tickets(count)}
    held_out = sorted(key for key in keys if is_held_out(key, share_to_hold_out(count)))[:300]
    if count == 40:
        assert isinstance(found.suite, NoSuite)
    else:
        asked = {keys[key]["messages"][0]["content"] for key in held_out}
        assert {item["prompt"] for item in found.suite.items} == asked


def test_a_file_of_labels_in_order_gives_items_of_every_label(tmp_path):
    rows = sorted(tickets(3000), key=lambda row: row["messages"][1]["content"])
    write_jsonl(tmp_path / "train.jsonl", [{"messages": turns("other", label)} for label in LABELS])
    write_jsonl(tmp_path / "validation.jsonl", rows)
    suite = describe_data(str(tmp_path)).suite
    answers = [item["answer"] for item in suite.items]
    assert len(answers) == 300 and min(map(answers.count, LABELS)) > 60


def test_the_share_held_out_is_about_three_hundred_rows():
    assert share_to_hold_out(100) == 0.2
    assert share_to_hold_out(3000) == 0.1
    assert share_to_hold_out(10**6) == 0.01


def test_nothing_is_written_where_one_of_the_files_exists(tmp_path, capsys):
    path = write_jsonl(tmp_path / "rows.jsonl", tickets(200))
    (tmp_path / "mine_suite.yaml").write_text("mine")
    assert run_command(["init", path, "--out", str(tmp_path / "mine.yaml")]) == 2
    assert "mine_suite.yaml: exists already" in capsys.readouterr().err
    assert not (tmp_path / "mine.yaml").exists() and not (tmp_path / "mine_items.jsonl").exists()


def test_a_disk_that_runs_full_at_the_last_file_leaves_none(tmp_path, capsys, monkeypatch):
    path = write_jsonl(tmp_path / "rows.jsonl", tickets(200))
    flushes = iter(range(3))

    def fill_up(descriptor: int) -> None:
        if next(flushes) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fill_up)
    before = sorted(tmp_path.iterdir())
    assert run_command(["init", path, "--out", str(tmp_path / "mine.yaml")]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'mine.yaml'}: No space left" in " ".join(said.split())
    assert "give the same command again" in " ".join(said.split())
    assert sorted(tmp_path.iterdir()) == before


def test_from_one_file_of_rows_a_run_ends_with_a_verdict(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_model("llama", tmp_path / "base")
    write_jsonl(tmp_path / "rows.jsonl", tickets(120))
    assert run_command(["init", "rows.jsonl", "--base", "base", "--out", "mine.yaml"]) == 0
    capsys.readouterr()
    given = [
        "train.num_epochs=null",
        "train.max_steps=2",
        "evaluate.extent=none",
        "evaluate.limit=9",
    ]
    assert run_command(["run", "mine.yaml", *given, "--json", "--quiet"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"] != "NOT-MEASURED"
    assert report["suites"]["mine"]["interval"]


@pytest.mark.parametrize("mark", [{"train": False}, {"weight": 0}])
def test_answers_that_are_not_trained_are_not_asked(tmp_path, mark):
    rows = [{"messages": turns("a", "hello", f"b {i}", f"d {i}", "e", "bye")} for i in range(200)]
    for row in rows:
        row["messages"][1] |= mark
    suite = describe_data(write_jsonl(tmp_path / "rows.jsonl", rows)).suite
    assert suite.has_turns
    assert {"hello", "bye"} & {item["answer"] for item in suite.items} == {"bye"}
