"""Every command of docs/tutorials.md works in a folder that has the files it speaks of."""

import csv
import json
import re
import shlex
from pathlib import Path

import pytest

from llmtune.cli import run_command
from tests.conftest import write_jsonl
from tests.tiny import make_model

TEXT = (Path(__file__).parent.parent / "docs" / "tutorials.md").read_text(encoding="utf-8")
COMMANDS = {
    title: re.findall(r"^llmtune .*$", body, re.M)
    for title, body in re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S)
}
TRAINED = "tickets.yaml"
"""The one config that is run; the others are planned: a run of each would take a minute."""
SHORT = ("train.num_epochs=null", "train.max_steps=1", "evaluate.extent=none", "evaluate.limit=4")
THINGS = ("card", "transfer", "account", "payment", "refund", "pin")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("tutorials")
    make_model("llama", place / "models" / "base", max_position_embeddings=1024)
    texts = [f"{THINGS[i % 6]} {i}: where is it, {i % 7}" for i in range(140)]
    rows = [f'"{text}",{("ask", "tell")[i % 2]}\n' for i, text in enumerate(texts)]
    for name, some in {
        "tickets": rows[:100],
        "tickets_test": rows[100:],
        "new_tickets": rows[:2],
    }.items():
        (place / f"{name}.csv").write_text("text,label\n" + "".join(some))
    orders = [{"order": text, "json": {"n": i, "what": text[:4]}} for i, text in enumerate(texts)]
    write_jsonl(place / "orders.jsonl", orders)
    turns = [("human", "Hi"), ("gpt", "Arr!"), ("human", "Who are you"), ("gpt", "A pirate")]
    chats = [
        {"conversations": [{"from": who, "value": f"{said} {i}"} for who, said in turns]}
        for i in range(60)
    ]
    (place / "chats.json").write_text(json.dumps(chats))
    (place / "handbook").mkdir()
    for i in range(40):
        (place / "handbook" / f"{i}.md").write_text(
            f"# Chapter {i}\n" + f"{texts[i]} goes on. " * 40
        )
    return place


@pytest.mark.parametrize("title", COMMANDS)
def test_every_command_works(folder, monkeypatch, capsys, title):
    monkeypatch.chdir(folder)
    for command in COMMANDS[title]:
        arguments = shlex.split(command)[1:]
        if arguments[0] in ("judge", "merge"):
            arguments = [
                each.replace("their_adapter", "runs/tickets/adapter") for each in arguments
            ]
        if arguments[0] == "judge":
            arguments += ["evaluate.extent=none", "evaluate.limit=4"]
        if arguments[0] == "run":
            arguments += SHORT if TRAINED in arguments else []
            arguments[0] = "run" if TRAINED in arguments else "plan"
        assert run_command([*arguments, "--quiet"]) == 0, f"{command}\n{capsys.readouterr().err}"
    if title == "Classify texts":
        _assert_the_reports_accuracy_is_that_of_predict(COMMANDS[title][-1])


def _assert_the_reports_accuracy_is_that_of_predict(command):
    """Count by hand, over the test rows that the run was scored on."""
    asked = command.replace("new_tickets.csv", "tickets_test.csv").replace("labels", "tested")
    assert run_command([*shlex.split(asked)[1:], "--quiet"]) == 0
    items = [json.loads(line) for line in Path("tickets_items.jsonl").read_text().splitlines()]
    prompts = {str(number): item["prompt"] for number, item in enumerate(items, 1)}
    with Path("tested.csv").open() as file:
        said = {row["text"]: (row["answer"], row["label"]) for row in csv.DictReader(file)}
    report = json.loads(Path("runs/tickets/report.json").read_text())["suites"]["tickets"]
    scored = json.loads(Path("runs/tickets/evaluations/tickets.merged.json").read_text())["items"]
    pairs = [said[prompts[item["id"]].partition("\n\n")[2]] for item in scored]
    assert [answer for answer, _ in pairs] == [item["prediction"] for item in scored]
    right = sum(answer == label for answer, label in pairs)
    assert report["merged"] == right / len(pairs) and len(pairs) == 4
