"""What `llmtune init` writes passes `llmtune data check`, whatever the file holds."""

import json
import string

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtune.cli import run_command
from llmtune.data.init import Asked, describe_data
from llmtune.data.init_config import render_config
from tests.tiny import make_model

DOLLY = [
    {
        "instruction": f"When, {i}?",
        "context": "On 31 August.",
        "response": f"{i}.",
        "category": "qa",
    }
    for i in range(12)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "base"
    make_model("llama", directory, max_position_embeddings=4096)
    return directory


def init(tmp_path, monkeypatch, capsys, base, name, content, *options):
    """Write a file, run init and check on it, and return the config's data section."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    text = content if isinstance(content, str) else "".join(json.dumps(r) + "\n" for r in content)
    path.write_text(text, encoding="utf-8")
    code = run_command(["init", name, "--base", str(base), "--out", "my.yaml", *options])
    assert code == 0, capsys.readouterr().err
    code = run_command(["data", "check", "my.yaml"])
    assert code == 0, capsys.readouterr()
    return yaml.safe_load((tmp_path / "my.yaml").read_text())["data"]


CHAT = {
    "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "delivery"}]
}

FILES = {
    "one row": ("a.jsonl", [CHAT]),
    "two rows": (
        "a.jsonl",
        [CHAT, {"messages": [{"role": "user", "content": "R"}, CHAT["messages"][1]]}],
    ),
    "a text": ("a.txt", "The quick brown fox saw seven lazy dogs. " * 400),
    "a long row late": (
        "a.jsonl",
        [
            {"instruction": f"Say {i}.", "output": "word " * (150 if i == 1200 else 2)}
            for i in range(1210)
        ],
    ),
    "bad rows": ("a.jsonl", [*DOLLY, {"instruction": "", "response": ""}]),
    "a header with a line break": (
        "a.csv",
        'instruction,output,"Notes\n(internal): x"\nSay hi,hallo,n\n',
    ),
    "yaml words": ("a.csv", "question,answer\nyes,no\nnull,~\n1e3,0x1f\n"),
}


@pytest.mark.parametrize("name", FILES)
def test_what_init_writes_passes_its_own_check(tmp_path, monkeypatch, capsys, base, name):
    init(tmp_path, monkeypatch, capsys, base, *FILES[name])


def test_rows_that_the_base_has_no_positions_for_are_named_and_not_asked(
    tmp_path, monkeypatch, capsys
):
    make_model("llama", tmp_path / "short")
    rows = [
        {"prompt": f"What is {i}? {'word ' * 700 * (i % 4 == 3)}", "completion": f"It is {i}."}
        for i in range(120)
    ]
    few = [*rows[:70], {**rows[70], "prompt": "word " * 700}, *rows[71:]]
    few = [row for row in few if len(row["prompt"]) < 100 or row is few[70]]
    init(tmp_path, monkeypatch, capsys, tmp_path / "short", "a.jsonl", few)
    run_command(["init", "a.jsonl", "--base", "short", "--out", "my.yaml", "--force"])
    said = capsys.readouterr().out
    line = 1 + few.index(max(few, key=lambda row: len(row["prompt"])))
    assert "1 row is longer than the base's 512 positions and is left out: a.jsonl:" in said
    assert f"a.jsonl:{line} (" in said
    long = [row for row in rows if len(row["prompt"]) > 100]
    init_all = ["init", "b.jsonl", "--base", "short", "--out", "b.yaml"]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    assert run_command(init_all) == 2
    assert "30 rows are longer than the base's 512 positions" in capsys.readouterr().err
    assert not (tmp_path / "b.yaml").exists()
    init(tmp_path, monkeypatch, capsys, tmp_path / "short", "c.jsonl", rows, "--force")
    assert "word word" not in (tmp_path / "my_items.jsonl").read_text()


def test_no_drafted_suite_asks_what_the_base_has_no_positions_for(tmp_path, monkeypatch, capsys):
    """Only the longest rows are measured one by one, and a suite may hold others."""
    make_model("llama", tmp_path / "short", max_position_embeddings=128)
    rows = [
        {"text": f"{i} {'it is fine ' * (2 if i % 5 > 2 else 40)}", "label": "ab"[i % 2]}
        for i in range(500)
    ]
    init(tmp_path, monkeypatch, capsys, tmp_path / "short", "a.jsonl", rows)
    assert "drafted items cannot be asked and are left out" in (tmp_path / "my.yaml").read_text()
    assert "it is fine " * 3 not in (tmp_path / "my_items.jsonl").read_text()
    assert run_command(["suite", "new", "a.jsonl", "--base", "short"]) == 0
    assert "left out; the first takes" in capsys.readouterr().out
    assert run_command(["suite", "check", "a_suite.yaml", "--base", "short"]) == 0
    write = [{**row, "text": row["text"] * 20} for row in rows]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in write))
    assert run_command(["suite", "new", "b.jsonl", "--base", "short"]) == 2
    assert "0 are left, and 20 are needed" in capsys.readouterr().err


def test_a_header_cannot_inject_a_key(tmp_path, monkeypatch, capsys, base):
    text = (
        'instruction,output,"Notes\nprotect: {kl_to_base: {weight: 5.0}}\n#"\n'
        "Say hi,hallo,n\nSay ho,hallo2,n\nSay hu,hallo3,n\n"
    )
    init(tmp_path, monkeypatch, capsys, base, "a.csv", text)
    tree = yaml.safe_load((tmp_path / "my.yaml").read_text())
    assert tree["protect"] == {"kl_to_base": {"weight": 1.0}}
    assert set(tree) == {
        "protect",
        *("run_dir", "seed", "model", "adapter", "data", "train", "merge", "evaluate"),
    }


@settings(max_examples=60)
@given(st.text(min_size=1, max_size=40), st.sampled_from(["instruction", "output"]))
def test_any_column_name_survives_the_config(tmp_path_factory, name, role):
    name = name.encode("utf-8", "ignore").decode()
    other = {"instruction": "output", "output": "instruction"}[role]
    if not name.strip() or name in ("instruction", "output"):
        return
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    path.write_text(json.dumps({name: "a", other: "b"}) + "\n")
    found = describe_data(str(path), asked=Asked("instruction", {role: name}))
    (source,) = yaml.safe_load(render_config(found))["data"]["train"]
    assert source["columns"] == {role: name}


def test_dolly_keeps_its_instruction_and_its_context(tmp_path, monkeypatch, capsys, base):
    data = init(tmp_path, monkeypatch, capsys, base, "a.jsonl", DOLLY)
    assert data["train"][0]["format"] == "instruction"
    assert data["train"][0]["columns"] == {"output": "response", "input": "context"}


def test_openorca_keeps_its_system_prompt(tmp_path, monkeypatch, capsys, base):
    rows = [
        {"system_prompt": "Be brief.", "question": f"Q {i}?", "response": "A."} for i in range(5)
    ]
    data = init(tmp_path, monkeypatch, capsys, base, "a.jsonl", rows)
    assert data["train"][0]["columns"]["system"] == "system_prompt"


def test_a_labeled_csv_is_trained_on_its_labels(tmp_path, monkeypatch, capsys, base):
    lines = [f"I {word} it {i},{label}" for i in range(60) for word, label in
             (("love", "positive"), ("hate", "negative"))]  # fmt: skip
    text = "text,label\n" + "\n".join(lines) + "\n"
    data = init(tmp_path, monkeypatch, capsys, base, "a.csv", text)
    assert data["train"][0]["format"] == "completion"
    assert data["train"][0]["columns"] == {"prompt": "text", "completion": "label"}
    suite = yaml.safe_load((tmp_path / "my_suite.yaml").read_text())
    assert suite["task"] == "choice" and suite["choices"] == ["negative", "positive"]


def test_dates_and_numbers_of_records_beside_the_text_are_no_texts(
    tmp_path, monkeypatch, capsys, base
):
    topics = ("Lieferung", "Konto", "Rechnung", "Defekt", "Anderes")
    lines = [
        f"2025-01-{1 + i % 28:02}T10:{i % 60:02};ORD-2025-{i:04};u{i}@mail.example.org;"
        f"Größe {i} passt nicht;{topics[i % 5]}"
        for i in range(100)
    ]
    text = "Datum;Nummer;Von;Betreff;Kategorie\n" + "\n".join(lines) + "\n"
    data = init(tmp_path, monkeypatch, capsys, base, "März.csv", text)
    assert data["train"][0]["columns"] == {"prompt": "Betreff", "completion": "Kategorie"}
    assert "März.csv" in (tmp_path / "my_suite.yaml").read_text(encoding="utf-8")


def test_format_and_columns_say_what_names_do_not(tmp_path, monkeypatch, capsys, base):
    alpaca = [
        {"instruction": f"Say {i}.", "input": "", "output": "one", "text": "### ..."}
        for i in range(4)
    ]
    (tmp_path / "b.jsonl").write_text(json.dumps(alpaca[0]) + "\n")
    data = init(tmp_path, monkeypatch, capsys, base, "a.jsonl", alpaca, "--format", "instruction")
    assert data["train"][0]["format"] == "instruction"
    rows = [{"p": f"{i}+3?", "s": "5"} for i in range(4)]
    (tmp_path / "my.yaml").unlink()
    data = init(
        tmp_path, monkeypatch, capsys, base, "c.jsonl", rows,
        *("--format", "instruction", "--columns", "instruction=p,output=s"),
    )  # fmt: skip
    assert data["train"][0]["columns"] == {"instruction": "p", "output": "s"}


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        ('{"x": 1}\n', (), "--format NAME"),
        ('{"x": 1}\n', ("--columns", "instruction"), "NAME=COLUMN pairs"),
        ('{"x": 1}\n', ("--format", "alpaca"), "expected one of messages"),
        ('{"chosen": "a", "rejected": "b"}\n', (), "preference pairs"),
        ('{"role": "user", "content": "a"}\n', (), "one message of a chat"),
    ],
)
def test_what_init_cannot_tell_is_one_line_with_the_option(
    tmp_path, monkeypatch, capsys, content, options, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text(content)
    assert run_command(["init", "a.jsonl", *options]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "llmtune.yaml").exists()


def test_letters_and_digits_stay_readable(tmp_path):
    path = tmp_path / f"{string.ascii_letters}.jsonl"
    path.write_text('{"text": "a"}\n')
    text = render_config(describe_data(str(path)))
    assert f"run_dir: runs/{string.ascii_letters}" in text
