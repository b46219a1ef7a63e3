"""How far the model moved, and whether it still stops, on the texts that are meant."""

import contextlib
from dataclasses import replace

import pytest
import torch

from llmtune.data.config import DataConfig
from llmtune.data.prepare import prepare_examples
from llmtune.errors import LlmtuneError
from llmtune.evaluation.diagnosis.base import write_diagnostic
from llmtune.evaluation.diagnosis.divergence import plan_divergence
from llmtune.evaluation.diagnosis.stops import StopCount, Stops, StopsResult, plan_stops
from llmtune.evaluation.diagnosis.subject import (
    general_sequences,
    general_texts,
    last_turn,
    pick,
    target_prompts,
)
from llmtune.reporting.numbers import NumberWriter
from tests.conftest import write_jsonl
from tests.tiny import make_tokenizer


def silence(subject):
    for name, parameter in subject.scored.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)


def test_divergence_is_measured_on_general_text_and_on_the_tasks_prompts(subject, settings):
    found = plan_divergence(subject, settings).measure()
    assert found.general.num_texts == 4 and found.target.num_texts == 12
    for text in (found.general, found.target):
        low, high = text.kl_interval or (0, 0)
        assert 0 < low < text.kl < high
        assert 0 < text.top1_flips <= 1
    silence(subject)
    still = plan_divergence(subject, settings).measure()
    assert still.general.kl == pytest.approx(0, abs=1e-6) and still.target.top1_flips == 0


def test_other_strengths_stand_beside_the_full_one(subject, settings):
    strengths = {0.5: contextlib.nullcontext, 0.25: subject.scored.model.disable_adapter}
    found = plan_divergence(subject, settings, strengths=strengths).measure()
    assert set(found.by_strength) == {"1.0", "0.5", "0.25"}
    assert found.by_strength["1.0"].general == found.general
    assert found.by_strength["0.25"].target.kl == pytest.approx(0, abs=1e-6)


def test_a_result_on_disk_is_found_until_its_inputs_change(subject, settings, tmp_path):
    planned = plan_divergence(subject, settings)
    assert planned.find(tmp_path) is None
    found = planned.measure()
    path = write_diagnostic(found, tmp_path)
    assert plan_divergence(subject, settings).find(tmp_path) == found
    identity = replace(subject.scored.identity, adapter="another")
    other = replace(subject, scored=replace(subject.scored, identity=identity))
    assert plan_divergence(other, settings).find(tmp_path) is None
    path.write_text("{half")
    assert planned.find(tmp_path) is None


def test_the_cost_is_known_beforehand(subject, settings):
    planned = plan_divergence(subject, settings, strengths={0.5: contextlib.nullcontext})
    found = planned.measure()
    assert planned.tokens == 3 * (found.general.num_tokens + found.target.num_tokens)


def test_progress_counts_up_to_all_texts(subject, settings):
    seen = []
    tracked = replace(settings, token_budget=40, on_progress=lambda *step: seen.append(step))
    plan_divergence(subject, tracked).measure()
    assert ("divergence on general text", 4, 4) in seen and len(seen) > 3


def test_stops_count_who_ends_and_what_was_trained(subject, settings):
    subject = replace(subject, suites=())
    found = plan_stops(subject, settings).measure()
    assert found.base.n == found.tuned.n == 4
    assert found.trained_stop_share == 1.0
    everything = replace(subject.scored, stop_token_ids=tuple(range(512)))
    at_once = plan_stops(replace(subject, scored=everything), settings).measure()
    assert at_once.base.stopped == at_once.tuned.stopped == 4
    assert at_once.tuned.mean_new_tokens == 0
    never = replace(subject.scored, stop_token_ids=(512,))
    endless = plan_stops(replace(subject, scored=never), settings).measure()
    assert endless.base.stopped == 0 and endless.base.mean_new_tokens == 64
    assert endless.trained_stop_share == 0.0


def test_where_a_document_should_end_is_not_asked_and_the_report_says_why(
    subject, settings, tmp_path
):
    path = tmp_path / "prose.jsonl"
    write_jsonl(path, [{"text": "The film is warm and the plot is dull."}])
    config = DataConfig(train=[{"path": str(path)}], cache=False)
    documents = prepare_examples(config, make_tokenizer(), split="train", seed=0).examples
    subject = replace(subject, train=documents, held_out=documents)
    assert plan_stops(subject, settings).refused is None  # the target suite asks
    planned = plan_stops(replace(subject, suites=subject.suites[1:]), settings)
    assert planned.tokens == 0
    assert "the rows are documents and no target suite asks anything" in planned.refused
    with pytest.raises(LlmtuneError, match="a target suite with prompts is measured"):
        planned.measure()


def test_stops_are_said_in_one_line_and_one_paragraph():
    counts = (StopCount(12, 24, 40.0), StopCount(23, 24, 9.5))
    found = StopsResult(
        inputs={},
        seconds=0.0,
        base=counts[0],
        tuned=counts[1],
        trained_stop_share=1.0,
        max_new_tokens=64,
    )
    assert Stops().numbers(found) == {"stop_rate": 23 / 24}
    line = "Answers that end by themselves: 23 of 24 after tuning, 12 of 24 before."
    assert Stops().summary_lines(found, NumberWriter()) == [line]


def test_prompts_come_from_the_target_suite_or_else_from_rows(subject):
    prompts = target_prompts(subject, limit=5, seed=0)
    assert len(prompts) == 5
    rows = target_prompts(replace(subject, suites=()), limit=50, seed=0)
    assert rows == [last_turn(example).prompt_ids for example in subject.held_out]
    text = subject.scored.tokenizer.decode(list(rows[0]))
    assert text.endswith("<|im_start|>assistant\n")


def test_general_text_is_cut_and_comes_from_general_suites_only(subject, suites):
    sequences = general_sequences(subject, limit=2, max_tokens=7, seed=0)
    assert [len(ids) for ids in sequences] == [7, 7]
    assert general_texts(suites[:1]) == []


def test_a_pick_keeps_the_order_and_is_the_same_again():
    chosen = pick(range(100), 10, seed=3)
    assert chosen == sorted(chosen) == pick(range(100), 10, seed=3)
    assert len(set(chosen)) == 10 and chosen != pick(range(100), 10, seed=4)
    assert pick("abc", 5, seed=0) == ["a", "b", "c"]
