"""Metrics of longer answers, against their own libraries and by hand."""

import json
import sys
import types

import pytest
import sacrebleu
from rouge_score import rouge_scorer

from llmtune.errors import LlmtuneError
from llmtune.evaluation.results import ItemScore
from llmtune.evaluation.suite import load_suite
from llmtune.evaluation.tasks.exact import ExactSuite
from llmtune.evaluation.text_metrics import TEXT_METRICS, fingerprint_own_metric, load_own_metric
from tests.conftest import write_jsonl

TEXTS = [("the cat sat on the mat", "a cat sat on a mat today"), ("dogs", "cats"), ("", "cats")]


@pytest.mark.parametrize(("written", "right"), TEXTS)
def test_overlaps_are_those_of_the_libraries(written, right):
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    assert (
        TEXT_METRICS["rouge_l"](written, right) == scorer.score(right, written)["rougeL"].fmeasure
    )
    bleu = sacrebleu.sentence_bleu(written, [right]).score
    assert TEXT_METRICS["bleu"](written, right) == pytest.approx(bleu / 100)
    chrf = sacrebleu.sentence_chrf(written, [right]).score
    assert TEXT_METRICS["chrf"](written, right) == pytest.approx(chrf / 100)


def test_words_of_every_script_count():
    assert TEXT_METRICS["rouge_l"]("добрый день", "добрый день") == 1.0


@pytest.mark.parametrize(
    ("written", "valid", "match", "fields"),
    [
        ('{"b": [1, 2], "a": "x"}', 1, 1, 1),
        ('```json\n{"a": "x", "b": [1, 2]}\n```', 1, 1, 1),
        ('{"a": "x", "b": [1, 3]}', 1, 0, 2 / 3),
        ('{"a": "x"}', 1, 0, 0.5),
        ("null", 1, 0, 0),
        ('{"a": "x"', 0, 0, 0),
        ("so: {}", 0, 0, 0),
    ],
)
def test_json_by_hand(written, valid, match, fields):
    right = '{"a": "x", "b": [1, 2]}'
    names = ("json_valid", "json_match", "json_fields")
    assert [TEXT_METRICS[name](written, right) for name in names] == pytest.approx(
        [valid, match, fields]
    )


@pytest.mark.parametrize(
    ("written", "right", "match", "fields"),
    [
        ('{"a": 1}', '{"a": true}', 0, 0),
        ('{"a": 1.0, "b": 2}', '{"a": 1, "b": 2.0}', 1, 1),
        ('{"a.b": 1}', '{"a": {"b": 1}}', 0, 0),
        ('{"a[0]": 1}', '{"a": [1]}', 0, 0),
        ('{"0": 1}', "[1]", 0, 0),
        ('{"a": {"b": [1, 2]}}', '{"a": {"b": [2, 1]}}', 0, 0),
        ('{"a": []}', '{"a": {}}', 0, 0),
        ('{"a": null}', "{}", 0, 0),
        ("NaN", "NaN", 0, 0),
        ("[]", "[]", 1, 1),
        ("[" * 990 + "]" * 990, "[]", 0, 0),
    ],
)
def test_json_that_python_takes_for_equal_or_for_json(written, right, match, fields):
    found = [TEXT_METRICS[name](written, right) for name in ("json_match", "json_fields")]
    assert found == [match, fields]
    assert TEXT_METRICS["json_valid"](written, right) == (written != "NaN" and len(written) < 500)


def write_suite(folder, metric, answer="Paris", **keys):
    write_jsonl(folder / "i.jsonl", [{"q": "where?", "answer": answer}])
    values = {"task": "exact", "items": "i.jsonl", "prompt": "{{ q }}", "metric": metric}
    values |= keys
    (folder / "s.yaml").write_text(json.dumps(values))
    return folder / "s.yaml"


def score_of(suite, text):
    assert isinstance(suite.config, ExactSuite)
    return suite.config.score_text(suite.items[0], text).score


def test_an_answer_may_be_json_itself(tmp_path):
    suite = load_suite(write_suite(tmp_path, "json_fields", {"city": "Paris"}))
    assert score_of(suite, '{"city": "Paris"}') == 1.0


def test_a_function_of_ones_own_scores_items(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_scores.py").write_text(
        "def by_length(written, right):\n    return min(1, len(written) / len(right))\n"
        "def broken(written, right):\n    return written / right\n"
        "def text(written, right):\n    return 'good'\n"
    )
    suite = load_suite(write_suite(tmp_path, "own_scores:by_length"))
    assert score_of(suite, "Par") == 0.6
    assert suite.config.chosen_metric.name == "own_scores:by_length"
    before = suite.config.recipe_facts()
    assert len(str(before["source"])) == 64
    for name, message in (("broken", "failed on 'a'"), ("text", "returned 'good'")):
        with pytest.raises(LlmtuneError, match=message):
            load_own_metric(f"own_scores:{name}")("a", "b")
    with pytest.raises(LlmtuneError, match="own_scores:nothing: cannot be imported"):
        load_suite(write_suite(tmp_path, "own_scores:nothing"))
    with pytest.raises(LlmtuneError, match="no_such_module"):
        load_suite(write_suite(tmp_path, "no_such_module:f"))


def test_an_unknown_metric_is_refused(tmp_path):
    with pytest.raises(LlmtuneError, match="metric"):
        load_suite(write_suite(tmp_path, "rouge"))


def test_bleu_of_all_answers_is_given_beside():
    suite = ExactSuite(task="exact", items="i.jsonl", prompt="{{ q }}", metric="bleu")
    scores = [ItemScore("i", 0.5, written, right) for written, right in TEXTS]
    expected = sacrebleu.corpus_bleu([w for w, _ in TEXTS], [[r for _, r in TEXTS]]).score / 100
    assert suite.describe(scores) == {"corpus_bleu": pytest.approx(expected)}


HANGS = "a" * 40 + "!"


def test_a_pattern_that_does_not_end_is_stopped_and_named(tmp_path, monkeypatch):
    for room in ("tasks.exact", "text_metrics"):
        monkeypatch.setattr(f"llmtune.evaluation.{room}.MATCHING_SECONDS", 0.2)
    suite = load_suite(write_suite(tmp_path, "exact_match", extract="(a+)+$"))
    with pytest.raises(LlmtuneError, match=r"extract: matching '\(a\+\)\+\$' .* longer than 0.2 s"):
        score_of(suite, HANGS)
    schema = {"type": "string", "pattern": "^(a+)+$"}
    suite = load_suite(write_suite(tmp_path, "json_schema", answer_schema=schema))
    with pytest.raises(LlmtuneError, match="answer_schema: .* longer than"):
        score_of(suite, json.dumps(HANGS))


def test_a_schema_says_which_json_is_right(tmp_path):
    schema = {
        "type": "object",
        "required": ["city"],
        "properties": {"city": {"type": "string"}},
        "additionalProperties": False,
    }
    path = write_suite(tmp_path, "json_schema", answer_schema=schema)
    write_jsonl(tmp_path / "i.jsonl", [{"q": "where?"}])
    suite = load_suite(path)
    assert suite.config.majority(suite.items) is None
    for text, score in (
        ('{"city": "Paris"}', 1.0),
        ('```json\n{"city": "Rome"}\n```', 1.0),
        ('{"city": 3}', 0.0),
        ('{"city": "Paris", "more": 1}', 0.0),
        ("Paris", 0.0),
    ):
        assert score_of(suite, text) == score
    wrong = write_suite(tmp_path, "json_schema", answer_schema={"type": "city"})
    with pytest.raises(LlmtuneError, match="not a JSON Schema"):
        load_suite(wrong)
    elsewhere = {"$ref": "https://example.org/city.json"}
    suite = load_suite(write_suite(tmp_path, "json_schema", answer_schema=elsewhere))
    with pytest.raises(LlmtuneError, match="leads nowhere"):
        score_of(suite, "{}")


def test_a_schema_needs_its_metric_and_its_package(tmp_path, monkeypatch):
    with pytest.raises(LlmtuneError, match="belong together"):
        load_suite(write_suite(tmp_path, "json_schema"))
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    monkeypatch.setitem(sys.modules, "jsonschema.exceptions", None)
    with pytest.raises(LlmtuneError, match="pip install jsonschema"):
        load_suite(write_suite(tmp_path, "json_schema", answer_schema={}))


def test_a_script_counts_whole_and_a_function_of_no_file_as_in_every_process(tmp_path, monkeypatch):
    source = "def helper(): return {}\ndef mine(a, b):\n    return max(map(lambda x: x, [1]))\n"
    script, hashes = types.ModuleType("__main__"), []
    monkeypatch.setitem(sys.modules, "__main__", script)
    for number in range(2):
        exec(source.format(number), vars(script))  # from no file: its code has no source
        script.__file__ = None
        hashes.append(fingerprint_own_metric("__main__:mine"))
        script.__file__ = str(tmp_path / "script.py")
        (tmp_path / "script.py").write_text(source.format(number))
        hashes.append(fingerprint_own_metric("__main__:mine"))
    assert hashes[0] == hashes[2]
    assert hashes[1] != hashes[3]
