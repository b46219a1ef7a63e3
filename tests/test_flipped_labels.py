"""A model that knows the task and is trained on the wrong answers is found out."""

import json

from llmtune import evaluate, load_config, merge, report, train
from tests.conftest import write_jsonl
from tests.project import make_project

TAUGHT = ["train.max_steps=40", "train.learning_rate=1e-2", "evaluate.extent=none"]
OTHER = {"positive": "negative", "negative": "positive"}


def test_flipped_labels_are_negative(tmp_path):
    knowing = load_config(make_project(tmp_path / "knowing"), TAUGHT)
    train(knowing)
    merge(knowing)
    path = make_project(tmp_path / "flipped")
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
    assert verdict.name == "NEGATIVE"
    found = verdict.numbers["sentiment"]
    assert found["difference"] < -0.5 and found["interval"][1] < 0
    assert f"{100 * found['difference']:+.1f} points".replace("-", "\N{MINUS SIGN}") in " ".join(
        verdict.reasons
    )
