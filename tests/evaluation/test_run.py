"""Suites scored on the arms of one tiny model, resumed, and compared."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from llmtune.data.render import render_messages
from llmtune.errors import LlmtuneError
from llmtune.evaluation.compare import compare_arms
from llmtune.evaluation.run import (
    ScoringSettings,
    evaluate_arms,
    evaluate_suite,
)
from llmtune.evaluation.stats import Resampling
from llmtune.evaluation.suite import load_suite
from llmtune.evaluation.tasks.base import Demonstration, PromptedSuite
from llmtune.scoring.generate import Decoding, generate_texts
from tests.evaluation.live import IDENTITY, make_live
from tests.tiny import CHATML, make_model, make_tokenizer

WORDS = ["dog", "fox", "film", "plot", "quick", "lazy", "warm", "funny"]


@pytest.fixture(scope="module")
def scored():
    lora = LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear")
    model = get_peft_model(make_model("llama"), lora).eval()
    return make_live(model, make_tokenizer())


@pytest.fixture
def suites(tmp_path):
    items = [
        {"q": f"{a} or {b}", "answer": a if n % 3 else b, "text": f"The {a} and the {b}. " * 4}
        for n, (a, b) in enumerate((x, y) for x in WORDS for y in WORDS if x < y)
    ]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)) + "\n")
    common = {"items": "items.jsonl", "prompt": "{{ q }}"}
    declared = {
        "pick": common | {"task": "choice", "choices": WORDS},
        "say": common | {"task": "exact", "max_new_tokens": 4, "extract": "([a-z]+)"},
        "prose": {"task": "perplexity", "items": "items.jsonl", "max_length": 16},
    }
    found = {}
    for name, values in declared.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps(values))
        found[name] = load_suite(tmp_path / f"{name}.yaml")
    return found


def test_every_task_gives_items_and_a_mean_on_both_arms(scored, suites, tmp_path):
    results = evaluate_arms(scored, list(suites.values()), results_dir=tmp_path / "out")
    for name, suite in suites.items():
        base, tuned = results[name]["base"], results[name]["tuned"]
        assert base.n == len(base.items) == len(suite.items) == 28
        weights = [item.weight for item in base.items]
        total = sum(i.score * w for i, w in zip(base.items, weights, strict=True))
        assert base.mean == pytest.approx(total / sum(weights))
        assert base.items != tuned.items
        assert (base.model["adapter"], tuned.model["adapter"]) == (None, "a")
        assert (tmp_path / "out" / f"{name}.tuned.json").is_file()
        compare_arms(base, tuned, resampling=Resampling(samples=200))
    assert results["pick"]["base"].chance == pytest.approx(1 / 8)
    assert results["prose"]["base"].majority is None


def test_the_base_arm_is_the_model_without_adapter(scored, suites):
    plain = make_live(make_model("llama"), scored.tokenizer, replace(IDENTITY, adapter=None))
    for suite in suites.values():
        [base] = evaluate_arms(scored, [suite], arms=("base",))[suite.name].values()
        alone = evaluate_suite(plain, suite, arm="base")
        assert base.recipe_hash == alone.recipe_hash
        for item, other in zip(base.items, alone.items, strict=True):
            assert item.prediction == other.prediction
            assert item.score == pytest.approx(other.score, rel=1e-5)


def test_choice_scores_are_the_likelihoods_of_the_rendered_answers(scored, suites):
    result = evaluate_suite(scored, suites["pick"], arm="tuned")
    item, score = suites["pick"].items[5], result.items[5]
    expected = []
    for choice in item.choices:
        talk = [{"role": "user", "content": item.prompt}]
        prompt = render_messages(scored.tokenizer, talk, add_generation_prompt=True)
        ids = scored.tokenizer(choice, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = scored.model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(ids) - 1)
        expected.append(sum(logits[p, t].item() for p, t in zip(places, ids, strict=True)))
    assert score.details["log_likelihoods"] == pytest.approx(expected, abs=1e-4)
    assert score.prediction == item.choices[expected.index(max(expected))]
    assert score.score == float(score.prediction == score.answer)


def test_an_answer_that_cannot_be_read_is_counted_apart(scored, suites, tmp_path):
    (tmp_path / "never.yaml").write_text(
        json.dumps(
            {
                "task": "exact",
                "items": "items.jsonl",
                "prompt": "{{ q }}",
                "extract": "ANSWER: (.*)",
                "max_new_tokens": 2,
            }
        )
    )
    result = evaluate_suite(scored, load_suite(tmp_path / "never.yaml"), arm="tuned")
    assert (result.unparseable, result.mean) == (28, 0.0)
    assert not any(item.parsed for item in result.items)


def test_bits_per_byte_and_nats_per_token_are_the_same_loss(scored, suites, tmp_path):
    (tmp_path / "bits.yaml").write_text(
        json.dumps(
            {
                "task": "perplexity",
                "items": "items.jsonl",
                "max_length": 16,
                "metric": "bits_per_byte",
            }
        )
    )
    bits = evaluate_suite(scored, load_suite(tmp_path / "bits.yaml"), arm="tuned")
    nats = evaluate_suite(scored, suites["prose"], arm="tuned")
    for result, per_unit in ((bits, 0.6931471805599453), (nats, 1.0)):
        total = sum(item.score * item.weight * per_unit for item in result.items)
        loss = sum(item.details["negative_log_likelihood"] for item in result.items)
        assert total == pytest.approx(loss)
    assert bits.mean != pytest.approx(nats.mean)


def test_a_finished_result_is_read_and_not_computed_again(scored, suites, tmp_path):
    out = tmp_path / "out"
    seen = []
    settings = ScoringSettings(on_progress=seen.append)
    first = evaluate_arms(scored, [suites["pick"]], results_dir=out, settings=settings)
    count = len(seen)
    assert count > 0 and (seen[-1].done, seen[-1].total, seen[-1].arm) == (28, 28, "tuned")
    second = evaluate_arms(scored, [suites["pick"]], results_dir=out, settings=settings)
    assert second == first and len(seen) == count


@pytest.mark.parametrize(
    ("change", "recomputed"),
    [
        ({"identity": replace(IDENTITY, adapter="other")}, {"tuned"}),
        ({"identity": replace(IDENTITY, base="other")}, {"base", "tuned"}),
        ({"identity": replace(IDENTITY, dtype="bfloat16")}, {"base", "tuned"}),
        ({"tokenizer": make_tokenizer(chat_template=CHATML.replace("user", "human") + " ")}, None),
    ],
)
def test_another_model_or_recipe_is_computed_again(scored, suites, tmp_path, change, recomputed):
    out, suite = tmp_path / "out", suites["pick"]
    evaluate_arms(scored, [suite], results_dir=out)
    seen = []
    settings = ScoringSettings(on_progress=seen.append)
    evaluate_arms(replace(scored, **change), [suite], results_dir=out, settings=settings)
    assert {progress.arm for progress in seen} == (recomputed or {"base", "tuned"})


def test_a_finished_result_is_scored_again_when_asked(scored, suites, tmp_path):
    evaluate_arms(scored, [suites["pick"]], results_dir=tmp_path)
    seen = []
    settings = ScoringSettings(on_progress=seen.append)
    evaluate_arms(scored, [suites["pick"]], results_dir=tmp_path, settings=settings, reuse=False)
    assert {progress.arm for progress in seen} == {"base", "tuned"}


def test_written_answers_end_at_every_stop_token_of_the_model(scored, suites):
    written = evaluate_suite(scored, suites["say"], arm="tuned").items[0]
    assert written.details["num_tokens"] > 0
    everything = tuple(range(scored.model.config.vocab_size))
    stopping = replace(scored, stop_token_ids=everything)
    stopped = evaluate_suite(stopping, suites["say"], arm="tuned").items[0]
    assert stopped.details["stopped"] is True
    assert stopped.details["num_tokens"] == 0


def test_choices_are_also_scored_as_the_model_writes_them(scored, suites):
    suite = suites["pick"]
    result = evaluate_suite(scored, suite, arm="tuned")
    prompts = [
        list(each.prompt_ids) for each in suite.config.choice_requests(scored.tokenizer, suite)
    ]
    plain = generate_texts(
        scored.model,
        scored.tokenizer,
        prompts,
        Decoding(suite.config.num_written, scored.stop_token_ids),
        token_budget=1000,
    )
    for item, score, text in zip(suite.items, result.items, plain, strict=True):
        written = score.details["written"]
        assert text.text.startswith(written["text"])
        assert written["score"] == float(written["choice"] == item.right_answer)
        if score.details["answer_is_greedy"]:
            assert written["choice"] == item.right_answer
    rights = [score.details["written"]["score"] for score in result.items]
    assert result.also["written_accuracy"] == pytest.approx(sum(rights) / len(rights))
    assert 0 <= result.also["calibration_error"] <= 1


def test_no_answer_is_written_if_its_length_is_zero(scored, suites):
    pick = suites["pick"]
    silent = replace(pick, config=pick.config.model_copy(update={"written_tokens": 0}))
    result = evaluate_suite(scored, silent, arm="tuned")
    assert "written" not in result.items[0].details
    assert "written_accuracy" not in result.also


def test_an_exact_answer_has_a_strict_and_a_lenient_score(suites):
    suite = suites["say"]
    [right, *_] = suite.items[0].references
    score = suite.config.score_text(suite.items[0], f"I think it is {right}, of course")
    assert score.score == 0.0
    assert (score.details["strict"], score.details["lenient"]) == (0.0, 1.0)
    assert suite.config.describe([score]) == {"strict": 0.0, "lenient": 1.0}


def test_an_answer_that_names_two_labels_or_denies_one_holds_none(tmp_path):
    """Else a base that names them all would have every right answer, and tuning would lose some."""
    rows = [{"q": f"{n}?", "answer": ("positive", "negative")[n % 2]} for n in range(6)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    declared = {"task": "exact", "items": "items.jsonl", "prompt": "{{ q }}"}
    (tmp_path / "suite.yaml").write_text(json.dumps(declared))
    suite = load_suite(tmp_path / "suite.yaml")

    assert isinstance(suite.config, PromptedSuite)
    score_text = suite.config.score_text

    def lenient(text, item=suite.items[0]):
        return score_text(item, text).details["lenient"]

    assert lenient("It is Positive, I think.") == 1.0
    assert lenient("Positive or negative?") == lenient("It is not positive.") == 0.0
    free = replace(suite.items[0], labels=())
    assert lenient("Positive or negative?", free) == 1.0


def test_the_share_of_answers_that_the_length_cut_off_is_said_beside_the_score(scored, suites):
    result = evaluate_suite(scored, suites["say"], arm="tuned")
    whole = [score.details["stopped"] for score in result.items]
    assert result.also["cut_off"] == pytest.approx(1 - sum(whole) / len(whole))
    everything = suites["say"].config.model_copy(update={"stop": ("",)})
    ended = evaluate_suite(scored, replace(suites["say"], config=everything), arm="tuned")
    assert (result.also["cut_off"], ended.also["cut_off"]) == (1.0, 0.0)


def test_raw_answers_end_at_the_lines_end(suites):
    config = suites["say"].config
    raw = config.model_copy(update={"chat": False})
    assert raw.cut("\n Paris\nQ: and Spain?") == "Paris"
    assert config.cut("Paris\nindeed") == "Paris\nindeed"
    assert (
        raw.model_copy(update={"stop": (" and",)}).cut("Paris\nand more and") == "Paris\nand more"
    )


def test_half_a_result_is_computed_again(scored, suites, tmp_path):
    evaluate_arms(scored, [suites["pick"]], arms=("base",), results_dir=tmp_path)
    path = tmp_path / "pick.base.json"
    path.write_text(path.read_text()[:50])
    evaluate_arms(scored, [suites["pick"]], arms=("base",), results_dir=tmp_path)
    assert json.loads(path.read_text())["n"] == 28


def test_demonstrations_are_another_recipe(scored, suites):
    shown = ScoringSettings(demonstrations=(Demonstration("dog or fox", "fox"),))
    plain = evaluate_suite(scored, suites["pick"], arm="base")
    few = evaluate_suite(scored, suites["pick"], arm="few_shot", settings=shown)
    with pytest.raises(LlmtuneError, match="demonstrations"):
        compare_arms(plain, few)
    found = compare_arms(plain, few, resampling=Resampling(samples=200), across=("demonstrations",))
    assert found.tuned_arm == "few_shot"


def test_two_suites_of_one_name_are_refused(scored, suites):
    with pytest.raises(LlmtuneError, match="two suites are named 'pick'"):
        evaluate_arms(scored, [suites["pick"], suites["pick"]])
