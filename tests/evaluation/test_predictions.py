"""Another model's answers are found by id or place and scored by the suite's own metric."""

import json
from typing import Any

import pytest

from llmtune.errors import LlmtuneError
from llmtune.evaluation.predictions import read_predictions, score_predictions
from llmtune.evaluation.suite import load_suite
from tests.conftest import write_jsonl

ITEMS = [{"id": f"i{n}", "q": f"{n}?", "answer": "yes" if n % 2 else "no"} for n in range(4)]


def make_suite(folder, name="suite", **keys):
    write_jsonl(folder / "items.jsonl", ITEMS)
    values: dict[str, Any] = {"task": "choice", "items": "items.jsonl", "prompt": "{{ q }}"}
    if keys.get("task") != "exact":
        values["choices"] = ["yes", "no"]
    (folder / f"{name}.yaml").write_text(json.dumps(values | keys))
    return load_suite(folder / f"{name}.yaml")


def read(folder, rows):
    return read_predictions("large", write_jsonl(folder / "p.jsonl", rows))


def scores_of(folder, rows, suite):
    [(found, texts)] = read(folder, rows).texts_by_suite([suite])
    return score_predictions(found, texts)


def test_answers_are_matched_by_id_and_unparseable_ones_counted_apart(tmp_path):
    rows = [
        {"id": "i3", "prediction": "Yes."},
        {"id": "i0", "prediction": "The answer is no!"},
        {"id": "i1", "prediction": "yes or no"},
        {"id": "elsewhere", "prediction": "no"},
    ]
    scores = scores_of(tmp_path, rows, make_suite(tmp_path))
    assert [(s.id, s.score, s.parsed) for s in scores] == [
        ("i0", 1.0, True),
        ("i1", 0.0, False),
        ("i3", 1.0, True),
    ]
    assert [s.prediction for s in scores] == ["no", "yes or no", "yes"]


def test_answers_without_ids_are_in_the_order_of_the_items(tmp_path):
    rows = [{"prediction": text} for text in ("no", "yes", "no", "no")]
    scores = scores_of(tmp_path, rows, make_suite(tmp_path))
    assert [s.score for s in scores] == [1.0, 1.0, 1.0, 0.0]


def test_written_answers_are_scored_as_the_suite_scores_its_own(tmp_path):
    suite = make_suite(tmp_path, task="exact", extract="answer: (.*)")
    rows = [{"id": "i0", "prediction": "So, answer: NO "}, {"id": "i1", "prediction": "yes"}]
    scores = scores_of(tmp_path, rows, suite)
    assert [(s.score, s.parsed) for s in scores] == [(1.0, True), (0.0, False)]


def test_a_line_that_names_a_suite_is_about_that_one(tmp_path):
    target, other = make_suite(tmp_path), make_suite(tmp_path, "other", role="transfer")
    rows = [{"id": "i0", "prediction": "no"}, {"id": "i1", "prediction": "yes", "suite": "other"}]
    found = read(tmp_path, rows).texts_by_suite([target, other])
    assert [(s.name, texts) for s, texts in found] == [
        ("suite", {"i0": "no"}),
        ("other", {"i1": "yes"}),
    ]


def test_a_file_about_nothing_is_refused(tmp_path):
    with pytest.raises(LlmtuneError, match=r"none of its 1 lines .* suite \(4 items\)"):
        read(tmp_path, [{"prediction": "no"}]).texts_by_suite([make_suite(tmp_path)])


def test_probabilities_cannot_be_had_from_a_text(tmp_path):
    suite = make_suite(tmp_path, metric="answer_probability")
    with pytest.raises(LlmtuneError, match="needs the probabilities"):
        score_predictions(suite, {"i0": "no"})


def test_bad_lines_are_named_with_their_place(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": 1}\nnot json\n{"prediction": "a"}\n[1]\n')
    with pytest.raises(LlmtuneError) as error:
        read_predictions("large", path)
    assert [f"p.jsonl:{n}" in str(error.value) for n in (1, 2, 3, 4)] == [True, True, False, True]
    path.write_text("\n")
    with pytest.raises(LlmtuneError, match="holds no predictions"):
        read_predictions("large", path)
    with pytest.raises(LlmtuneError, match="cannot be read"):
        read_predictions("large", tmp_path / "none.jsonl")
    with pytest.raises(LlmtuneError, match="give all or none"):
        read(tmp_path, [{"prediction": "a"}, {"id": 1, "prediction": "b"}])


def test_lines_that_answer_no_item_are_said_and_one_id_twice_is_refused(tmp_path, caplog):
    suite = make_suite(tmp_path)
    first = suite.items[0].id
    path = tmp_path / "answers.jsonl"
    path.write_text(
        json.dumps({"id": first, "prediction": "a"}) + "\n" + '{"id": "gone", "prediction": "a"}\n'
    )
    found = read_predictions("large", path)
    found.say_unknown(found.texts_by_suite([suite]))
    assert "1 of 2 lines answer no item that is measured (first: id 'gone')" in caplog.text
    path.write_text(2 * (json.dumps({"id": first, "prediction": "a"}) + "\n"))
    with pytest.raises(LlmtuneError, match="answered more than once"):
        read_predictions("large", path)
