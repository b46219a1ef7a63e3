"""Scores of the untouched base, kept for later runs on it."""

import json
from dataclasses import replace

import pytest

from llmtune.evaluation import kept
from llmtune.evaluation.results import REUSED
from llmtune.evaluation.run import ArmPlan, score_plan
from llmtune.evaluation.suite import load_suite
from llmtune.io import kept_json
from llmtune.io.cached import cache_dir
from llmtune.models.template_date import fix_template_date
from tests.evaluation.live import IDENTITY, make_live
from tests.tiny import CHATML, make_model, make_tokenizer

LIVE = make_live(make_model("llama"), make_tokenizer(), replace(IDENTITY, adapter=None))


@pytest.fixture
def suite(tmp_path):
    return write_suite(tmp_path, "fox")


def write_suite(directory, word, **declared):
    lines = [{"id": str(n), "q": f"{word} {n}?", "answer": "dog"} for n in range(3)]
    (directory / "items.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    values = {"task": "choice", "items": "items.jsonl", "prompt": "{{ q }}"}
    values |= {"choices": ["dog", "fox"]} | declared
    (directory / "pick.yaml").write_text(json.dumps(values))
    return load_suite(directory / "pick.yaml")


def kept_files():
    return list((cache_dir() / kept.FOLDER).glob("*"))


def test_the_base_is_taken_over_bit_by_bit_and_an_adapter_never(suite):
    measured = score_plan(LIVE, ArmPlan("base", suite))
    assert kept.find_kept(LIVE, ArmPlan("base", suite)) is None
    kept.keep_scores(LIVE, ArmPlan("base", suite), measured)
    for arm in ("base", "original"):  # without quantization the same model
        found = kept.find_kept(LIVE, ArmPlan(arm, suite))
        expected = replace(measured, arm=arm, seconds=0.0, about={REUSED: True})
        assert found == expected
    for arm in ("tuned", "merged", "strength-0.5"):
        kept.keep_scores(LIVE, ArmPlan(arm, suite), measured)
        assert kept.find_kept(LIVE, ArmPlan(arm, suite)) is None
    assert len(kept_files()) == 1


def test_what_the_scores_depend_on_finds_nothing_when_it_changes(suite, tmp_path, monkeypatch):
    plan = ArmPlan("base", suite)
    kept.keep_scores(LIVE, plan, score_plan(LIVE, plan))
    others = [
        replace(LIVE, identity=replace(IDENTITY, adapter=None, base="different")),
        replace(LIVE, identity=replace(IDENTITY, adapter=None, quantization="nf4")),
        replace(LIVE, tokenizer=make_tokenizer(chat_template=CHATML + " ")),
        replace(LIVE, attention="eager"),
        replace(LIVE, stop_token_ids=(1,)),
    ]
    assert [kept.find_kept(other, plan) for other in others] == [None] * len(others)
    budget = replace(plan, settings=replace(plan.settings, token_budget=64))
    fewer = replace(plan, suite=suite.select({"0", "1"}))
    changed = [write_suite(tmp_path, "cat"), write_suite(tmp_path, "fox", written_tokens=2)]
    for other in (budget, fewer, *(ArmPlan("base", each) for each in changed)):
        assert kept.find_kept(LIVE, other) is None
    described = ArmPlan(
        "base", write_suite(tmp_path, "fox", description="new words", role="general")
    )
    found = kept.find_kept(LIVE, described)
    assert (found.description, found.role) == ("new words", "general")
    quantized = replace(LIVE, identity=replace(LIVE.identity, quantization="nf4"))
    kept.keep_scores(quantized, plan, score_plan(quantized, plan))
    with monkeypatch.context() as patch:
        knobs = {"double_quant": True}
        patch.setattr(LIVE.model.config, "quantization_config", knobs, raising=False)
        assert kept.find_kept(quantized, plan) is None
        # The original is asked about while its quantized form is loaded.
        assert kept.find_kept(LIVE, ArmPlan("original", suite)) is not None
    monkeypatch.setattr(kept, "code_fingerprint", lambda _: "a later version")
    assert kept.find_kept(LIVE, plan) is None


def test_the_date_counts_only_where_the_template_prints_it(suite):
    plan = ArmPlan("base", suite)
    kept.keep_scores(LIVE, plan, score_plan(LIVE, plan))
    tomorrow = replace(LIVE, source=replace(LIVE.source, template_date="2031-02-03"))
    assert kept.find_kept(tomorrow, plan) is not None
    tokenizer = make_tokenizer(chat_template="{{ strftime_now('%Y-%m-%d') }}" + CHATML)
    dated = replace(LIVE, tokenizer=tokenizer)  # an adapter sets its own date on the tokenizer
    fix_template_date(tokenizer, "2031-02-03")
    kept.keep_scores(dated, plan, score_plan(dated, plan))
    assert kept.find_kept(dated, plan) is not None
    fix_template_date(tokenizer, "2031-02-04")
    assert kept.find_kept(dated, plan) is None


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"key": 1}', '{"kept": NaN}', "one number"])
def test_a_damaged_file_is_measured_again(suite, damage):
    plan = ArmPlan("base", suite)
    measured = score_plan(LIVE, plan)
    kept.keep_scores(LIVE, plan, measured)
    (path,) = kept_files()
    text = path.read_text()
    path.write_text(
        damage if damage != "one number" else text.replace('"score": ', '"score": 1', 1)
    )
    assert kept.find_kept(LIVE, plan) is None
    kept.keep_scores(LIVE, plan, measured)
    assert path.read_text() == text


def test_only_the_files_used_last_stay_and_no_room_is_one_line(suite, monkeypatch, caplog):
    plan = ArmPlan("base", suite)
    measured = score_plan(LIVE, plan)
    monkeypatch.setattr(kept_json, "FOLDER_BYTES", 2000)
    for ids in ({"0"}, {"1"}):
        part = replace(plan, suite=suite.select(ids))
        items = tuple(item for item in measured.items if item.id in ids)
        kept.keep_scores(LIVE, part, replace(measured, items=items))
    assert len(kept_files()) == 1
    monkeypatch.setenv("LLMTUNE_CACHE", "/proc/none")
    kept.keep_scores(LIVE, plan, measured)
    assert [record.message.split(" in ")[0] for record in caplog.records] == [
        "the base's scores are not kept"
    ]


def test_what_the_user_wrote_is_never_kept(suite, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.py").write_text("def closeness(text, answers):\n    return 0.5\n")
    own = {"task": "exact", "items": "items.jsonl", "prompt": "{{ q }}", "metric": "mine:closeness"}
    (tmp_path / "own.yaml").write_text(json.dumps(own))
    plan = ArmPlan("base", load_suite(tmp_path / "own.yaml"))
    kept.keep_scores(LIVE, plan, score_plan(LIVE, plan))
    assert not (cache_dir() / kept.FOLDER).exists()
