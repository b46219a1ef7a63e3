"""Kept answers are scored by a new metric without a model, and suites are checked alone."""

import json
from typing import Any

import pytest
import yaml

from llmtune.cli import run_command
from llmtune.config import RunConfig
from llmtune.evaluation.results import save_arm_result
from llmtune.evaluation.run import summarize_items
from llmtune.evaluation.suite import load_suite
from llmtune.io.manifest import Manifest
from llmtune.io.run_dir import RunDir
from tests.conftest import write_jsonl

ANSWERS = {"base": ("no idea", "a b"), "tuned": ("x y z", "a b")}


@pytest.fixture
def run(tmp_path):
    """A run that keeps what two arms wrote."""
    write_jsonl(
        tmp_path / "items.jsonl",
        [{"prompt": "p", "answer": "x y"}, {"prompt": "q", "answer": "a b"}],
    )
    suite = {"task": "exact", "items": "items.jsonl", "prompt": "{{ prompt }}", "name": "words"}
    for name, more in {
        "words": {},
        "f1": {"metric": "token_f1"},
        "long": {"max_new_tokens": 99},
    }.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(suite | more))
    loaded = load_suite(tmp_path / "words.yaml")
    knobs: Any = loaded.config
    place = RunDir(tmp_path / "run")
    config = RunConfig(
        run_dir=place.path, model={"base": "b"}, data={"train": [{"path": "r"}]}
    ).model_dump(mode="json")
    place.path.mkdir()
    Manifest(config=config).save(place)
    for arm, texts in ANSWERS.items():
        scores = [
            knobs.score_text(item, text) for item, text in zip(loaded.items, texts, strict=True)
        ]
        scoring = loaded.config.model_dump(
            mode="json", exclude={"name", "description", "items", "id", "slices", "limit", "role"}
        )
        recipe: Any = {"items": loaded.items_fingerprint, "num_items": 2, "scoring": scoring}
        save_arm_result(
            summarize_items(loaded, arm, scores, recipe=recipe, model={}, seconds=1.0),
            place.evaluations_dir,
        )
    return tmp_path


def test_a_new_metric_needs_no_model(run, capsys):
    command = ["eval", str(run / "run"), "--rescore", "--json", "--suite"]
    assert run_command([*command, str(run / "f1.yaml")]) == 0
    found = json.loads(capsys.readouterr().out)["words"]
    assert found["metric"] == "token_f1"
    assert found["arms"]["base"]["mean"] == 0.5
    assert found["arms"]["tuned"]["mean"] == pytest.approx(0.9)
    assert run_command([*command, str(run / "long.yaml")]) == 2
    assert "keeps no answers to these items" in capsys.readouterr().err
    assert run_command(["eval", str(run / "run"), "--rescore"]) == 2


def test_suites_are_checked_alone(run, capsys):
    assert run_command(["suite", "check", str(run / "f1.yaml"), "general"]) == 0
    said = capsys.readouterr().out
    assert "2 items, metric token_f1" in said and "role general" in said
    (run / "bad.yaml").write_text("task: exact\nitems: items.jsonl\nprompt: '{{ nothing }}'\n")
    assert run_command(["suite", "check", str(run / "bad.yaml")]) == 2
    assert "items.jsonl:1" in capsys.readouterr().err


def test_a_suite_of_rows_is_new(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(
        tmp_path / "test.jsonl", [{"text": f"{i} a", "label": "ab"[i % 2]} for i in range(40)]
    )
    assert run_command(["suite", "new", "test.jsonl"]) == 0
    assert "classification into 2 labels" in capsys.readouterr().out
    assert load_suite("test_suite.yaml").task == "choice"
