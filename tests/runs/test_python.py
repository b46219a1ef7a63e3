"""llmtune as a program uses it: rows and results are Python values, and what happens is heard."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest
import torch
from transformers import AutoModelForCausalLM

import llmtune
from llmtune.errors import LlmtuneError
from llmtune.runs.python import Prediction, Predictions
from tests.tiny import make_model, make_tokenizer

ROOT = Path(__file__).parents[2]
THINGS = ("card", "transfer", "account", "payment", "refund", "pin")
ROWS = [
    {"text": f"{THINGS[i % 6]} {i}: where is it, {i % 7}", "label": ("ask", "tell")[i % 2]}
    for i in range(110)
]
SHORT = {
    "train.num_epochs": None,
    "train.max_steps": 2,
    "evaluate.extent": "none",
    "evaluate.limit": 8,
    "protect.kl_to_base": None,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("python") / "base"
    make_model("llama", directory)
    return directory


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory, shared_cache):
    steps, evals = [], []
    found = llmtune.tune(
        model=base,
        rows=ROWS,
        run_dir=tmp_path_factory.mktemp("run") / "run",
        settings=SHORT,
        on_step=steps.append,
        on_eval=evals.append,
    )
    return types.SimpleNamespace(found=found, steps=steps, evals=evals)


def test_rows_become_a_judged_run_and_each_step_is_heard(tuned):
    assert [line["step"] for line in tuned.steps] == [1, 2]
    assert all(line["loss"] > 0 for line in tuned.steps)
    assert tuned.evals and tuned.evals[-1]["eval_loss"] > 0
    assert tuned.found.verdict and (tuned.found.run_dir / "report.html").is_file()


def test_an_answer_in_the_rows_is_not_replaced():
    said = Predictions([Prediction({"prompt": "Hi", "answer": "mine"}, "the model's", True)])
    with pytest.raises(LlmtuneError, match="have a column 'answer' already"):
        said.to_pandas()
    frame = said.to_pandas("new")
    assert list(frame.columns) == ["prompt", "answer", "new", "new_stopped"]
    assert "mine" in said._repr_html_() and "the model" in said._repr_html_()


def test_rows_that_are_left_out_are_said(base, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("llmtune.runs.pipeline.run", lambda *_, **__: None)
    rows = [*ROWS, {"text": "The last one", "label": None}]
    llmtune.tune(model=base, rows=rows, run_dir=tmp_path / "run", settings=SHORT)
    assert "1 of 111 rows cannot be used and are left out; the first: " in caplog.text


def test_scores_and_answers_are_tables(tuned, base):
    scores = tuned.found.scores()
    assert scores["task"]["task"] == "choice"
    frame = scores.to_pandas()
    assert {"suite", "arm", "mean"} <= set(frame.columns) and len(frame) == len(scores.rows())
    assert "<table>" in tuned.found._repr_html_()
    said = tuned.found.predict(ROWS[:2], max_new_tokens=2)
    assert [each.row["text"] for each in said] == [row["text"] for row in ROWS[:2]]
    assert isinstance(said.answers[0], str) and "<td>" in said._repr_html_()
    assert list(said.to_pandas().columns) == ["text", "label", "answer", "stopped"]
    separated, half = "two\u2028lines", "half of a pair \ud83d"
    given = [{"prompt": separated, "note": half}]
    kept = llmtune.predict(base, given, max_new_tokens=1)[0].row
    assert (kept["prompt"], kept["note"]) == (separated, half)
    asked = llmtune.predict(base, ["Is it <b>?"], max_new_tokens=1)
    assert "&lt;b&gt;" in asked._repr_html_()


@pytest.mark.parametrize("kind", ["DataFrame", "Dataset"])
def test_tables_are_read_as_lists_are(kind, base, tmp_path, monkeypatch):
    from llmtune.runs import pipeline, python

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["ask", "tell"])}
    )
    table = (
        pandas.DataFrame(ROWS)
        if kind == "DataFrame"
        else datasets.Dataset.from_list(ROWS, features)
    )
    asked = []
    monkeypatch.setattr(pipeline, "run", lambda config, **_: asked.append(config))
    python.tune(base, table, run_dir=tmp_path / "r", settings=SHORT)
    source = asked[0].data.train[0]
    assert source.instruction.endswith("ask, tell.")
    assert source.labels == (("ask", "tell") if kind == "Dataset" else ())


def test_a_config_may_be_a_dict_and_its_mistakes_are_named():
    given = {"run_dir": "r", "model": {"base": "b"}, "data": {"train": [{"path": "a"}]}}
    config = llmtune.load_config(given, ["adapter.rank=4"])
    assert config.adapter.rank == 4 and "adapter" not in given
    with pytest.raises(llmtune.LlmtuneError, match="the dict: train.lr"):
        llmtune.load_config(given | {"train": {"lr": 1}})


def own_metric(answer: str, reference: str) -> float:
    """Return whether both begin alike."""
    return float(answer[:1] == reference[:1])


def test_a_metric_is_a_function_that_has_a_name(base, tmp_path, monkeypatch):
    from llmtune.evaluation.suite import load_suite
    from llmtune.runs import pipeline, python

    monkeypatch.setattr(pipeline, "run", lambda config, **_: config)
    asked = {"run_dir": tmp_path / "r", "task": "instruct", "settings": SHORT}
    found = python.tune(base, ROWS, metric=own_metric, **asked)
    suite = load_suite(found.config.evaluate.suites[0])
    assert suite.config.metric == "tests.runs.test_python:own_metric"
    with pytest.raises(llmtune.LlmtuneError, match="by its own name"):
        python.tune(base, ROWS, metric=lambda a, b: 1.0, **asked)
    with pytest.raises(llmtune.LlmtuneError, match="metric"):
        python.tune(base, ROWS, metric=own_metric, run_dir=tmp_path / "r", settings=SHORT)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rows": 3}, "rows are a int"),
        ({"rows": {"train": ROWS}}, "one split"),
        ({"rows": [1]}, "row 1 is a int"),
        ({"rows": []}, "no rows"),
        ({"model": types.SimpleNamespace(), "rows": ROWS}, "a path, a hub id or a loaded model of"),
        ({"rows": ROWS, "tokenizer": 3}, "tokenizer: a path or a hub id has its own; take it out"),
        ({"rows": ROWS, "task": "foo"}, "task 'foo' is not known; expected one of classify"),
        ({"rows": ROWS, "settings": ["adapter.rank=4"]}, "settings are a list; expected a dict"),
        ({"rows": ROWS, "run_dir": None}, "run_dir is a NoneType; expected a path"),
        ({"rows": ROWS, "on_step": 3}, "on_step is a int; expected a function"),
    ],
)
def test_what_cannot_be_taken_is_named(given, words, base):
    with pytest.raises(llmtune.LlmtuneError, match=words):
        llmtune.tune(**{"model": base, **given})


def test_a_loaded_model_is_saved_as_it_is_now(base, tmp_path, monkeypatch, shared_cache):
    from llmtune.models.checkpoint import Checkpoint
    from llmtune.runs import pipeline, python

    monkeypatch.setattr(pipeline, "run", lambda config, **_: None)
    model = make_model("llama", seed=3)
    asked: dict[str, Any] = {"rows": ROWS, "run_dir": tmp_path / "r", "settings": SHORT}
    with pytest.raises(llmtune.LlmtuneError, match="no tokenizer in its checkpoint; give the"):
        python.tune(model, **asked)
    tokenizer = make_tokenizer()
    found = [python.tune(model, tokenizer=tokenizer, **asked).config.model.base for _ in "ab"]
    with torch.no_grad():
        model.lm_head.weight[0] += 1
    found.append(python.tune(model, tokenizer=tokenizer, **asked).config.model.base)
    assert found[0] == found[1] != found[2]
    tokenizer(["short", "a longer text"], padding=True)  # leaves its way to pad in the tokenizer
    found.append(python.tune(model, tokenizer=tokenizer, **asked).config.model.base)
    model.generation_config.eos_token_id = 7
    found.append(python.tune(model, tokenizer=tokenizer, **asked).config.model.base)
    assert found[2] == found[3] != found[4]
    made = Checkpoint.open(Path(found[2]))
    assert made.tokenizer.chat_template == tokenizer.chat_template
    kept = AutoModelForCausalLM.from_pretrained(found[2])
    assert torch.equal(kept.lm_head.weight, model.lm_head.weight)
    with torch.device("meta"):
        absent = AutoModelForCausalLM.from_config(model.config)
    with pytest.raises(llmtune.LlmtuneError, match="not all in memory; give the directory"):
        python.tune(absent, tokenizer=tokenizer, **asked)


def test_the_notebook_runs_cell_by_cell(base, tmp_path, monkeypatch, shared_cache):
    notebook = json.loads((ROOT / "docs" / "notebook.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    # like a kernel's: a module in which the functions of the notebook are, and which is no file
    kernel = types.ModuleType("cells")
    del kernel.__dict__["__loader__"], kernel.__dict__["__spec__"]
    monkeypatch.setitem(sys.modules, "cells", kernel)
    exec(cells[0], kernel.__dict__)
    kernel.__dict__.update(MODEL=str(base), RUN_DIR=str(tmp_path / "run"))
    for cell in cells[1:]:
        cell = cell.replace('"train.max_steps": 24', '"train.max_steps": 2')
        exec(cell, kernel.__dict__)
    assert len(kernel.losses) == 2 and len(kernel.answers.answers) == 3
    assert "<table>" in kernel.tuned._repr_html_() and "<td>" in kernel.answers._repr_html_()
    scores = kernel.second.scores()["task"]
    assert scores["metric"] == "cells:names_the_desk"


def test_the_public_names_are_listed():
    assert {"tune", "predict", "evaluate", "load_config", "RunConfig", "LlmtuneError"} <= set(
        dir(llmtune)
    )
    for name in dir(llmtune):
        assert getattr(llmtune, name)
