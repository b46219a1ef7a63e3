"""lm-evaluation-harness on a loaded model, and our own choice scoring against it."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from tokenizers.processors import TemplateProcessing

from llmtune.errors import LlmtuneError
from llmtune.evaluation.compare import compare_arms
from llmtune.evaluation.lm_eval import LmEvalSettings, harness_model, run_tasks
from llmtune.evaluation.run import evaluate_suite
from llmtune.evaluation.stats import Resampling
from llmtune.evaluation.suite import load_suite
from llmtune.models.config import ModelConfig
from llmtune.models.load import load_model
from llmtune.models.resolve import resolve_base
from tests.evaluation.live import make_live
from tests.tiny import make_model, make_tokenizer

WORDS = ["dog", "fox", "film", "plot", "quick", "lazy", "warm", "funny", "ending", "sentence"]
NUM_ITEMS = 200
BATCH_NOISE = 5e-5
"""By how much a choice's log-likelihood in float32 may depend on its batch (2e-5 was seen, as
docs/evaluation.md says); choices that are closer than twice that may be decided either way."""


def write_task(directory, num_items=NUM_ITEMS):
    """Write the same items as a task of the harness and as a suite."""
    draw = random.Random(0)
    rows = []
    for number in range(num_items):
        options = draw.sample(WORDS, 3)
        question = f"{number}. Which of {', '.join(options)} comes after {draw.choice(WORDS)}?"
        # Some contexts end in a space, which moves to the continuation.
        question += " " if number % 7 == 0 else ""
        rows.append({"question": question, "options": options, "answer": draw.randrange(3)})
    data = directory / "items.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "local_words",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "metadata": {"version": 1},
    }
    (directory / "tasks").mkdir()
    (directory / "tasks" / "local_words.yaml").write_text(json.dumps(task))
    suite = {
        "task": "choice",
        "items": "items.jsonl",
        "prompt": "{{ question }}",
        "choices_field": "options",
        "chat": False,
    }
    (directory / "suite.yaml").write_text(json.dumps(suite))
    return load_suite(directory / "suite.yaml")


@pytest.fixture(scope="module")
def model():
    lora = LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear")
    return get_peft_model(make_model("llama"), lora).eval()


def tokenizer_with_bos():
    tokenizer = make_tokenizer()
    bos = ("<|im_start|>", tokenizer.bos_token_id)
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[bos]
    )
    return tokenizer


def assert_equal_but_for_noise(ours, theirs):
    """Require the same likelihoods up to the noise of batches, and scores that only it may turn."""
    for mine, other in zip(ours.items, theirs.items, strict=True):
        values = mine.details["log_likelihoods"]
        assert values == pytest.approx(other.details["log_likelihoods"], abs=BATCH_NOISE, rel=0)
        first, second = sorted(values)[:-3:-1]
        assert mine.score == other.score or first - second <= 2 * BATCH_NOISE


@pytest.mark.parametrize("make", [make_tokenizer, tokenizer_with_bos])
def test_choice_accuracy_equals_the_harness_item_by_item(model, make, tmp_path):
    suite = write_task(tmp_path)
    scored = make_live(model, make())
    settings = LmEvalSettings(("local_words",), include_path=str(tmp_path / "tasks"))
    run = run_tasks(scored, "tuned", settings)
    [theirs] = run.results
    ours = evaluate_suite(scored, suite, arm="tuned")

    assert theirs.n == ours.n == NUM_ITEMS
    assert_equal_but_for_noise(ours, theirs)
    assert ours.mean == theirs.mean == run.summary["local_words"]["acc,none"]
    assert 0 < ours.mean < 1


def test_accuracy_per_character_is_acc_norm_item_by_item(model, tmp_path):
    suite = write_task(tmp_path)
    live = make_live(model, make_tokenizer())
    settings = LmEvalSettings(("local_words",), include_path=str(tmp_path / "tasks"))
    run = run_tasks(live, "tuned", settings)
    [theirs] = run.results
    normalized = suite.config.model_copy(update={"normalize": "characters"})
    ours = evaluate_suite(live, replace(suite, config=normalized), arm="tuned")

    for item, mine, other in zip(suite.items, ours.items, theirs.items, strict=True):
        pairs = zip(other.details["log_likelihoods"], item.choices, strict=True)
        values = [likelihood / len(choice) for likelihood, choice in pairs]
        assert mine.score == float(values.index(max(values)) == item.answer)
    assert ours.mean == pytest.approx(run.summary["local_words"]["acc_norm,none"])
    assert ours.mean != theirs.mean


@pytest.mark.parametrize("make", [make_tokenizer, tokenizer_with_bos])
def test_both_read_the_same_token_ids(model, make, tmp_path):
    suite = write_task(tmp_path, num_items=40)
    scored = make_live(model, make())
    theirs = harness_model(scored)
    for item, request in zip(
        suite.items, suite.config.choice_requests(scored.tokenizer, suite), strict=True
    ):
        for choice, ids in zip(item.choices, request.choice_ids, strict=True):
            context, continuation = theirs._encode_pair(item.prompt, " " + choice)
            assert list(request.prompt_ids) == context
            assert list(ids) == continuation


def test_arms_of_a_task_are_compared_as_any_suite(model, tmp_path):
    write_task(tmp_path, num_items=30)
    scored = make_live(model, make_tokenizer())
    settings = LmEvalSettings(("local_words",), include_path=str(tmp_path / "tasks"), limit=20)
    with model.disable_adapter():
        [base] = run_tasks(scored, "base", settings).results
    [tuned] = run_tasks(scored, "tuned", settings).results
    assert base.n == tuned.n == 20
    assert base.metric == "accuracy"
    found = compare_arms(base, tuned, resampling=Resampling(samples=200))
    assert found.difference == pytest.approx(tuned.mean - base.mean)
    whole = run_tasks(scored, "tuned", LmEvalSettings(**{**vars(settings), "limit": None}))
    with pytest.raises(LlmtuneError, match="items"):
        compare_arms(base, whole.results[0], resampling=Resampling(samples=200))


def test_generation_and_likelihood_tasks_keep_a_value_an_item(model, tmp_path):
    write_task(tmp_path, num_items=6)
    data: dict[str, Any] = {"dataset_path": "json", "test_split": "test"}
    data["dataset_kwargs"] = {"data_files": {"test": str(tmp_path / "items.jsonl")}}
    tasks = {
        "local_write": {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{options[answer]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
            "metric_list": [{"metric": "exact_match"}],
        },
        "local_prose": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{question}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
    }
    for name, task in tasks.items():
        (tmp_path / "tasks" / f"{name}.yaml").write_text(json.dumps({"task": name} | data | task))
    scored = make_live(model, make_tokenizer())
    settings = LmEvalSettings(tuple(tasks), include_path=str(tmp_path / "tasks"))
    run = run_tasks(scored, "tuned", settings)
    results = {result.suite: result for result in run.results}
    assert results["lm_eval_local_write"].metric == "exact_match"
    prose = results["lm_eval_local_prose"]
    assert (prose.metric, prose.higher_is_better) == ("bits_per_byte", False)
    assert prose.mean == pytest.approx(run.summary["local_prose"]["bits_per_byte,none"])


def test_an_unknown_task_is_named_with_its_neighbors(model, tmp_path):
    write_task(tmp_path, num_items=2)
    scored = make_live(model, make_tokenizer())
    settings = LmEvalSettings(("local_wrods",), include_path=str(tmp_path / "tasks"))
    with pytest.raises(LlmtuneError, match="local_words"):
        run_tasks(scored, "tuned", settings)


def test_a_template_of_a_task_that_does_not_end_is_stopped(model, tmp_path, monkeypatch):
    monkeypatch.setattr("llmtune.evaluation.lm_eval.TEMPLATE_SECONDS", 0.2)
    write_task(tmp_path, num_items=2)
    path = tmp_path / "tasks" / "local_words.yaml"
    endless = "{% for a in range(10**9) %}{% endfor %}{{question}}"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"doc_to_text": endless}))
    settings = LmEvalSettings(("local_words",), include_path=str(tmp_path / "tasks"))
    with pytest.raises(LlmtuneError, match=r"--lm-eval: rendering .* takes longer than 0.2 s"):
        run_tasks(make_live(model, make_tokenizer()), "tuned", settings)


@pytest.mark.slow
def test_the_real_model_scores_movies_as_the_harness_does(monkeypatch, tmp_path):
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    config = ModelConfig(base="models/SmolLM2-135M-Instruct.Q4_1.gguf", dtype="float32")
    loaded = load_model(config, resolve_base(config))
    scored = make_live(loaded.model, loaded.tokenizer)
    settings = LmEvalSettings(("llmtune_movies",), include_path="evals/tasks", limit=80)
    [theirs] = run_tasks(scored, "base", settings).results

    rows = (root / "data/quickstart/movies_test.jsonl").read_text().splitlines()[:80]
    (tmp_path / "items.jsonl").write_text("\n".join(rows) + "\n")
    suite = {"task": "choice", "items": "items.jsonl", "prompt": "{{ prompt }}", "chat": False}
    suite["choices"] = ["positive", "negative"]
    (tmp_path / "suite.yaml").write_text(json.dumps(suite))
    ours = evaluate_suite(scored, load_suite(tmp_path / "suite.yaml"), arm="base")
    assert theirs.n == ours.n == 80
    assert_equal_but_for_noise(ours, theirs)
    assert 0.4 < ours.mean < 0.9
