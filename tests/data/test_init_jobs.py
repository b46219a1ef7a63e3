"""`init` understands the job of the usual files, and what it writes is checked and asked."""

import json
from itertools import count
from typing import Any

import datasets
import pytest
import yaml

from llmtune.cli import run_command
from llmtune.evaluation.suite import load_suite
from tests.conftest import write_jsonl
from tests.tiny import make_model

THINGS = ("card", "transfer", "account", "payment", "refund", "pin")


def texts(number: int) -> list[str]:
    """Return so many different texts, which neither begin nor end alike."""
    return [
        f"{THINGS[i % 6]} {i} of {THINGS[i // 6 % 6]}: where is it, {i % 7}" for i in range(number)
    ]


def order(i: int) -> dict:
    return {"customer": f"cust {i}", "items": [{"sku": f"A{i % 13}", "qty": i % 4 + 1}]}


def table(rows, header="text,category", mark=",") -> str:
    return "".join(mark.join(map(str, row)) + "\n" for row in [header.split(","), *rows])


def labeled(number: int, labels: int, name="label_{}") -> list[tuple[str, str]]:
    return [(f'"{text}"', name.format(i % labels)) for i, text in enumerate(texts(number))]


LONG = ["The fox jumps over the dog and runs on. " * 120, "A short one."]
FILES = {
    "banking": ("a.csv", table(labeled(500, 77)), "classify", "choice"),
    "clinc": (
        "a.json",
        json.dumps(
            {
                split: [[f"{split} {t}", f"intent {i % 40}"] for i, t in enumerate(texts(number))]
                for split, number in (("train", 400), ("val", 80), ("test", 120), ("oos_test", 9))
            }
        ),
        "classify",
        "choice",
    ),
    "names beside numbers": (
        "a.jsonl",
        [
            {"text": text, "label": i % 3, "label_text": ("sad", "joy", "love")[i % 3]}
            for i, text in enumerate(texts(150))
        ],
        "classify",
        "choice",
    ),
    "tabs": ("a.tsv", table(labeled(150, 2), "sentence,label", "\t"), "classify", "choice"),
    "excel": (
        "a.csv",
        table(labeled(150, 3, "R\u00fcckgabe {}"), "Frage,Kategorie", ";").encode("cp1252"),
        "classify",
        "choice",
    ),
    "orders": (
        "a.jsonl",
        [{"order": text, "json": order(i)} for i, text in enumerate(texts(120))],
        "extract",
        "exact",
    ),
    "alpaca of json": (
        "a.json",
        json.dumps([{"instruction": t, "output": order(i)} for i, t in enumerate(texts(120))]),
        "extract",
        "exact",
    ),
    "sharegpt": (
        "a.json",
        json.dumps(
            [
                {
                    "conversations": [
                        {"from": who, "value": f"{who} {i} {part}"}
                        for part in ("one", "two")
                        for who in ("human", "gpt")
                    ]
                }
                for i in range(60)
            ]
        ),
        "chat",
        "reply",
    ),
    "openorca": (
        "a.jsonl",
        [
            {"id": i, "system_prompt": "Be kind.", "question": text, "response": f"{text}! " * 30}
            for i, text in enumerate(texts(200))
        ],
        "instruct",
        "reply",
    ),
    "documents": ("a", [LONG[i % 2] + str(i) for i in range(40)], "text", "perplexity"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "base"
    make_model("llama", directory, max_position_embeddings=2048)
    return directory


def write(folder, name, content) -> None:
    if name == "a":
        (folder / name).mkdir()
        for i, text in enumerate(content):
            (folder / name / f"{i}{('.md', '.txt')[i % 2]}").write_text(text)
    elif isinstance(content, list):
        write_jsonl(folder / name, content)
    else:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("case", FILES)
def test_the_job_is_understood_and_its_files_pass_their_check(
    tmp_path,
    monkeypatch,
    capsys,
    base,
    case,
):
    name, content, task, suite_task = FILES[case]
    monkeypatch.chdir(tmp_path)
    write(tmp_path, name, content)
    assert run_command(["init", name, "--base", str(base), "--json"]) == 0, capsys.readouterr().err
    found = json.loads(capsys.readouterr().out)
    assert found["task"] == task and found["bad_rows"] == 0
    assert run_command(["data", "check", "llmtune.yaml", "--quiet"]) == 0, capsys.readouterr()
    suite = load_suite(found["suite"])
    knobs: Any = suite.config
    assert suite.task == suite_task and suite.role == "target"
    tree = yaml.safe_load((tmp_path / "llmtune.yaml").read_text())
    assert tree["model"]["quantization"] is None and tree["merge"]["base"] == "auto"
    assert tree["train"]["learning_rate"] == 4.9e-4, "the published rate of a narrow Llama"
    source = tree["data"]["train"][0]
    if case == "banking":
        assert len(knobs.choices) == 77 and "instruction" in source
    if case == "clinc":
        assert tree["data"]["evaluation"][0]["split"] == "val" and len(suite.items) == 120
        assert tree["data"]["train"][0]["path"] == "a.json"
    if case == "names beside numbers":
        assert knobs.choices == ("joy", "love", "sad")
        assert "joy, love, sad" in source["instruction"]
        assert suite.items[0].prompt.startswith(source["instruction"])
    if case == "excel":
        assert source["encoding"] == "cp1252" and source["delimiter"] == ";"
    if task == "extract":
        assert knobs.metric == "json_fields"
    if suite_task in ("reply", "perplexity") and task != "instruct":
        assert len({item.cluster for item in suite.items}) < len(suite.items)


def test_objects_beside_a_text_are_not_left_unread(tmp_path, monkeypatch, capsys, base):
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"{i} teas to Rome, please", "object": {"count": i}} for i in range(60)]
    write_jsonl(tmp_path / "orders.jsonl", rows)
    ask = ["init", "orders.jsonl", "--base", str(base), "--out", "orders.yaml"]
    assert run_command(ask) == 2
    assert "object beside text could be objects to extract; say so with --columns" in " ".join(
        capsys.readouterr().err.split()
    )
    assert run_command([*ask, "--columns", "text=text,label=object"]) == 0
    assert "text as prompt, object as completion" in capsys.readouterr().out


def save_split(name: str):
    """Return how `datasets` writes one split of labeled texts, in a folder layout of hub sets."""
    names = ["sadness", "joy", "love"]

    def save(folder) -> None:
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
        )
        sets = datasets.DatasetDict(
            {
                split: datasets.Dataset.from_dict(
                    {
                        "text": [f"{split} {text}" for text in texts(number)],
                        "label": [i % 3 for i in range(number)],
                    },
                    features=features,
                )
                for split, number in (("train", 150), ("validation", 40), ("test", 60))
            }
        )
        if name == "arrow":
            sets.save_to_disk(str(folder / "emotions"))
            return
        (folder / "emotions" / "data").mkdir(parents=True)
        for split, rows in sets.items():
            rows.to_parquet(folder / "emotions" / "data" / f"{split}-00000-of-00001.parquet")

    return save


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_class_labels_of_a_saved_set_keep_their_names(tmp_path, monkeypatch, capsys, base, kind):
    monkeypatch.chdir(tmp_path)
    save_split(kind)(tmp_path)
    assert run_command(["init", "emotions", "--base", str(base), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["task"] == "classify" and found["labels"] == ["joy", "love", "sadness"]
    assert run_command(["data", "check", "llmtune.yaml", "--quiet"]) == 0, capsys.readouterr()
    tree = yaml.safe_load((tmp_path / "llmtune.yaml").read_text())["data"]
    (train,), (watched,) = tree["train"], tree["evaluation"]
    assert train["labels"] == watched["labels"] == ["sadness", "joy", "love"]
    assert "train" in train["path"] and "validation" in watched["path"]
    items = load_suite(found["suite"]).items
    assert len(items) == 60 and all("test " in item.prompt for item in items)
    assert {item.choices[item.answer] for item in items} == {"joy", "love", "sadness"}


def test_rows_of_a_second_file_that_are_trained_on_are_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    rows = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(texts(200))]
    for name, some in {"train": rows[:120], "dev": rows[100:140], "test": rows[90:]}.items():
        write_jsonl(tmp_path / "set" / f"{name}.jsonl", some)
    assert run_command(["init", "set", "--out", "a.yaml"]) == 0
    said = capsys.readouterr().out
    assert "20 rows of set/dev.jsonl are in the training rows" in said and "30 rows of" in said
    assert len(load_suite("a_suite.yaml").items) == 80
    assert yaml.safe_load((tmp_path / "a.yaml").read_text())["data"]["evaluation_share"] == 0.2


def test_what_was_found_is_said_with_what_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, *FILES["clinc"][:2])
    write(tmp_path, *FILES["documents"][:2])
    for name in ("cover.png", "scan.PDF", "b/old.docx", ".hidden.png"):
        (tmp_path / "a" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "a" / name).write_bytes(b"\0")
    assert run_command(["init", "a.json", "--out", "intents.yaml"]) == 0
    said = capsys.readouterr().out
    assert "asks your task on a.json, test" in said and "left out: a.json: oos_test" in said
    assert yaml.safe_load((tmp_path / "intents.yaml").read_text())["run_dir"] == "runs/intents"
    assert run_command(["init", "a"]) == 0
    said = capsys.readouterr().out
    assert "40 documents, text (found in the rows)" in said and "each document is seen" in said
    assert "a: 3 files are of a kind that is not read (.docx, .pdf, .png)" in said
    assert yaml.safe_load((tmp_path / "llmtune.yaml").read_text())["run_dir"] == "runs/a"


def test_what_the_user_says_wins(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"utterance": text, "intent": i % 2, "id": i} for i, text in enumerate(texts(120))]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "test.jsonl", [row | {"utterance": f"new {row['id']}"} for row in rows])
    given = ("--columns", "text=utterance,label=intent", "--labels", "no,yes", "--quantize")
    command = ["init", "train.jsonl", *given, "--test", "test.jsonl"]
    assert run_command(command) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "2 labels (no, yes)" in said and "4 bits: as asked" in said and "test.jsonl" in said
    suite = load_suite("llmtune_suite.yaml")
    assert len(suite.items) == 120 and all("new " in item.prompt for item in suite.items)
    assert run_command(command) == 2
    assert "--force" in capsys.readouterr().err
    assert run_command([*command, "--force", "--task", "instruct"]) == 0
    assert load_suite("llmtune_suite.yaml").task == "exact"
    assert run_command([*command, "--force", "--labels", "no"]) == 2
    assert "names 1 labels" in capsys.readouterr().err
    assert load_suite("llmtune_suite.yaml").task == "exact", "nothing was written"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", table(labeled(60, 3), "what is it? 1,label_1"), "first line seems to be a row"),
        ("a.csv", table([(i % 2, f'"{t}"', f'"{t} b"') for i, t in zip(count(), texts(60))],
                        "label,title,body_of_it"), "--columns text=body_of_it,label=label"),
        ("a.csv", table([(f'"{t}"', "abc"[i % 3], "lh"[i % 2]) for i, t in zip(count(), texts(60))],
                        "text,topic,urgency"), "--columns text=text,label=topic"),
        ("a.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}], "no DPO"),
        ("a.json", '{"first": [["a", "b"]], "second": [["a", "b"]]}', "none is called train"),
    ],
)  # fmt: skip
def test_what_is_not_clear_is_asked_in_one_message(
    tmp_path, monkeypatch, capsys, name, content, words
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, name, content)
    assert run_command(["init", name]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "llmtune.yaml").exists()
    if "topic" in words:
        assert run_command(["init", name, "--task", "text"]) == 0
        assert "60 documents" in capsys.readouterr().out
        unread = ["--ignore", "topic", "--ignore", "urgency", "--force"]
        assert run_command(["init", name, *unread]) == 0, capsys.readouterr().err
