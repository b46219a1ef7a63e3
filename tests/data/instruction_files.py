"""A file of rows through init, check and show, as a person at the terminal would take it."""

import gzip
import json
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet

from llmtune.cli import run_command
from tests.data.shapes import make_shape
from tests.tiny import make_model

EMPTY_THOUGHT = "<think>\n\n</think>\n\n"


def make_base(directory: Path) -> Path:
    """Make a tiny model whose template takes tools and thinks."""
    base = directory / "base"
    make_model("llama", base, max_position_embeddings=2048)
    give_shape(base, "qwen3")
    return base


def give_shape(base: Path, name: str) -> None:
    """Give a model the tokenizer of a template's shape."""
    for path in [*base.glob("*token*"), *base.glob("*.jinja")]:
        path.unlink()
    make_shape(name).save_pretrained(base)


def place(source: Path, to: Path) -> None:
    """Copy a file, or make a Parquet or gzip file of its rows, by the name it is to have."""
    data = source.read_bytes()
    if to.suffix == ".parquet":
        rows = [json.loads(line) for line in data.splitlines()]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), to)
    else:
        to.write_bytes(gzip.compress(data) if to.suffix == ".gz" else data)


def assert_read_as_expected(case: dict, name: str, source: Path, base: Path, capsys) -> None:
    """Run the three commands on one file in the current directory and compare.

    `case` says which stretches are `trained`, what `prompts` hold before them, at which `lines` the
    rows are, or why the file is `refused`.
    """
    shape = case.get("shape", "qwen3")
    if shape != "qwen3":
        base = shutil.copytree(base, Path.cwd() / "base")
        give_shape(base, shape)
    place(source, Path(name))
    options = case.get("options", [])
    code = run_command(["init", name, "--base", str(base), "--out", "my.yaml", *options])
    captured = capsys.readouterr()
    if "refused" in case:
        assert code == 2, captured.out
        assert case["refused"] in captured.err
        assert not Path("my.yaml").exists()
        return
    assert code == 0, captured.err
    written = [line for line in Path("my.yaml").read_text().splitlines() if line[:1] != "#"]
    assert not any("weight: 5.0" in line for line in written)
    whole = ["my.yaml", "data.evaluation_share=0"]
    if "evaluation" in case:
        shutil.copy(source.with_name(case["evaluation"]), ".")
        whole.append(f"data.evaluation=[{{path: {case['evaluation']}}}]")
    code = run_command(["data", "check", *whole, "--no-near-duplicates", "--quiet"])
    assert code == 0, capsys.readouterr().out
    capsys.readouterr()
    assert run_command(["data", "show", *whole, "--limit", "9", "--json"]) == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    tokenizer = make_shape(shape)
    trained, before = [], ""
    for row in shown:
        runs = tokenizer.decode(
            [id if id >= 0 else tokenizer.pad_token_id for id in row["labels"]]
        ).split(tokenizer.pad_token)
        trained += [_without_frame(run, tokenizer) for run in runs if run]
        before += row["text"]
    assert sorted(trained) == sorted(case["trained"]), trained
    for part in case.get("prompts", []):
        assert part in before
        assert not any(part in piece for piece in trained)
    if "lines" in case:
        assert sorted(row["line"] for row in shown) == case["lines"]


def _without_frame(text: str, tokenizer) -> str:
    """Return a trained stretch without an empty thought and the tokens that end it."""
    for token in tokenizer.added_tokens_decoder.values():
        text = text.removesuffix(token.content) if token.special else text
    return text.replace(EMPTY_THOUGHT, "").strip("\n")
