"""Open chat is held to the untouched base's own answers, and a collapse of answers is seen."""

import dataclasses
import json

import pytest

from llmtune import load_config, run
from llmtune.evaluation.answer_style import AnswerStyle
from llmtune.evaluation.evaluate import take_base_answers
from llmtune.evaluation.results import ItemScore
from llmtune.evaluation.suite import load_suite
from llmtune.evaluation.tasks.chat import ChatSuite
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.config import TemplateChoice
from llmtune.reporting.suites import ArmScore, SuiteReport, Thresholds
from llmtune.reporting.verdict.evidence import Evidence
from llmtune.reporting.verdict.rules import decide
from tests.conftest import write_jsonl
from tests.evaluation.live import make_live
from tests.project import make_project
from tests.reporting.verdict.test_rules import prose, suite
from tests.tiny import make_model

FULL = {"answer_words": 42.7, "length_ratio": 1.0, "short_answers": 0.0}
GONE = {"answer_words": 1.1, "length_ratio": 0.03, "short_answers": 0.8}


def chat(after: dict, rise: float = 0.05) -> SuiteReport:
    found = suite(rise, 0.01, name="chat", role="general", base=0.4, metric="nats_per_token")
    arms = {arm: ArmScore(0.4, also=also) for arm, also in (("base", FULL), ("tuned", after))}
    return dataclasses.replace(found, task="chat", arms=arms)


def test_the_shipped_prompts_are_forty_and_ask_nothing_that_protection_trains_with():
    from llmtune.data.open_prompts import OPEN_PROMPTS, OPENERS

    found = load_suite("chat")
    prompts = {item.prompt for item in found.items}
    assert len(prompts) == 40
    assert not prompts & {*OPEN_PROMPTS, *OPENERS}
    assert found.role == "general"


def test_answers_are_described_by_length_and_words_and_ends():
    config = ChatSuite(task="chat", items="chat.jsonl")
    written = ("one two two", "", "panic")
    items = [
        ItemScore(str(i), 0.5, text, "four words of text", details={"stopped": bool(text)})
        for i, text in enumerate(written)
    ]
    found = config.describe(items)
    assert found["short_answers"] == pytest.approx(2 / 3)
    assert found["length_ratio"] == pytest.approx(4 / 12)
    assert found["distinct_words"] == pytest.approx(3 / 4)
    assert found["ended_answers"] == pytest.approx(2 / 3)


def test_answers_in_a_different_language_share_few_words_with_the_bases_other_answers():
    english = [
        "You can boil the water first, then add the rice and wait for it.",
        "The best way is to start with the first page and read it slowly.",
        "Add the salt, then wait for the water to boil and read the page.",
    ]
    french = [
        "Vous pouvez faire bouillir de l'eau, puis ajouter le riz et attendre.",
        "Il vaut mieux commencer par la page un et lire lentement.",
        "Ajoutez le sel, puis attendez que l'eau soit chaude et lisez.",
    ]
    other = [
        "First boil the rice slowly and wait.",
        "Start to read the best page.",
        "The water is for the rice, then add the salt.",
    ]

    def describe(written):
        items = [
            ItemScore(str(i), 0.5, text, base, details={"stopped": True})
            for i, (text, base) in enumerate(zip(written, english, strict=True))
        ]
        return AnswerStyle.measure(items)

    before = describe(english)
    assert describe(other).shared_words > 0.7
    assert describe(french).shared_words < 0.05  # "page" is in both
    assert describe(french).speaks_otherwise(before, shared=Thresholds().shared_words)
    assert not describe(other).speaks_otherwise(before, shared=Thresholds().shared_words)


def test_the_bases_answers_are_kept_for_the_prompts_that_it_was_given(
    tmp_path, monkeypatch, caplog
):
    make_model("llama", tmp_path / "base")
    write_jsonl(tmp_path / "chat.jsonl", [{"id": "a", "prompt": "Hello?"}])
    values = {"task": "chat", "items": "chat.jsonl", "max_new_tokens": 4}
    (tmp_path / "chat.yaml").write_text(json.dumps(values))
    asked = load_suite(tmp_path / "chat.yaml")
    loaded = []

    def answer(system, date):
        base = Checkpoint.open(tmp_path / "base", template=TemplateChoice(system=system))
        base = dataclasses.replace(base, template_date=date)

        def load(_arm):
            loaded.append(system)
            return dataclasses.replace(make_live(make_model("llama"), base.tokenizer), source=base)

        return take_base_answers((asked,), base, load)[0].items[0].references

    plain = answer(None, "2030-01-01")
    assert answer(None, "2030-01-02") == plain  # this template prints no date
    answer("Be brief.", "2030-01-01")
    answer("Be brief.", "2030-01-01")
    assert loaded == [None, "Be brief."]
    with monkeypatch.context() as other:
        other.setattr("llmtune.evaluation.evaluate.versions", lambda: {"torch": "0"})
        answer(None, "2030-01-01")
    assert loaded == [None, "Be brief.", None]
    monkeypatch.setenv("LLMTUNE_CACHE", "/proc/none")  # an evaluation needs no cache
    assert answer(None, "2030-01-01") == plain
    assert caplog.messages[-1].startswith("the base's answers are not kept in /proc/none/answers: ")


def test_collapsed_answers_are_broken_though_the_loss_is_within_its_bound():
    target = suite(0.16, 0.03)
    assert decide(Evidence((target, chat(FULL)))).name == "SHIP"
    verdict = decide(Evidence((target, chat(GONE))))
    assert verdict.name == "BROKE-GENERAL"
    assert any("1.1 words, before 42.7" in reason for reason in verdict.reasons)
    assert not chat(FULL).has_collapsed(Thresholds())


def test_chat_that_is_given_up_by_name_is_in_the_headline():
    verdict = decide(
        Evidence((suite(0.16, 0.03), prose(0.02), chat(GONE)), keep=("knowledge", "text"))
    )
    assert verdict.name == "SHIP"
    assert verdict.meaning.endswith("For this task only: open chat is gone.")


def test_a_run_writes_the_bases_answers_once_and_scores_every_arm_on_them(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "cache"))
    path = make_project(tmp_path)
    prompts = [{"id": f"p{i}", "prompt": f"The film {i} is"} for i in range(4)]
    write_jsonl(tmp_path / "chat.jsonl", prompts)
    chat_suite = {"task": "chat", "role": "general", "items": "chat.jsonl", "max_new_tokens": 8}
    (tmp_path / "chat.yaml").write_text(json.dumps(chat_suite))
    suites = [str(tmp_path / f"{name}.yaml") for name in ("sentiment", "chat")]
    overrides = [
        f"evaluate.suites={json.dumps(suites)}",
        "evaluate.extent=none",
        "train.max_steps=2",
        "model.quantization={method: nf4}",
    ]
    run(load_config(path, overrides))
    (kept,) = (tmp_path / "cache" / "answers").glob("*.json")
    answers = json.loads(kept.read_text())["kept"]
    assert len(answers) == 4
    values = json.loads((tmp_path / "run" / "report.json").read_text())
    found = values["suites"]["chat"]
    assert found["compared"] == ["original", "merged"]
    assert found["arms"]["original"]["also"]["length_ratio"] == pytest.approx(1.0)
    scored = json.loads((tmp_path / "run" / "evaluations" / "chat.merged.json").read_text())
    assert [item["answer"] for item in scored["items"]] == answers
    assert "Its own answers" in (tmp_path / "run" / "report.html").read_text()
