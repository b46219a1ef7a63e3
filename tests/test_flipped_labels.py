"""A model that knows the task and is trained on the wrong answers is found out."""

import json

from llmtune import evaluate, load_config, merge, report, train
from tests.conftest import write_jsonl
from tests.project import make_project, sentences

TAUGHT = ["train.max_steps=40", "train.learning_rate=1e-2", "evaluate.extent=none"]
OTHER = {"positive": "negative", "negative": "positive"}


def ask_the_train_rows(path):
    """Let the suite ask for the rows that are trained on: a tiny model learns little else."""
    rows = [row for place, row in enumerate(sentences()) if place % 4]
    write_jsonl(path.parent / "items.jsonl", [{"text": t, "answer": a} for t, a in rows])


def test_flipped_labels_are_negative(tmp_path):
    path = make_project(tmp_path / "knowing")
    knowing = load_config(path, TAUGHT)
    train(knowing)
    merge(knowing)
    path = make_project(tmp_path / "flipped")
    ask_the_train_rows(path)
    rows = [json.loads(line) for line in (path.parent / "train.jsonl").read_text().splitlines()]
    for row in rows:
        answer = row["messages"][-1]
        answer["content"] = OTHER[answer["content"]]
    write_jsonl(path.parent / "train.jsonl", rows)
    base = f"model.base={knowing.run.merged_dir}"
    config = load_config(path, [*TAUGHT, base, "evaluate.arms=[base, tuned]"])
    train(config)
    evaluate(config)
    verdict = report(config.run_dir).verdict
    found = verdict.numbers["sentiment"]
    assert verdict.name == "NEGATIVE" and found["n"] == 48
    assert found["difference"] < -0.3 and found["interval"][1] < 0
    assert f"\N{MINUS SIGN}{-100 * found['difference']:.1f} points" in verdict.reasons[0]
