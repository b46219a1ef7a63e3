"""Sets of one kind are not told apart, sets of two kinds are, and formulas match hand sums."""

import math
import random
from pathlib import Path

import numpy as np
import pytest

import llmtune
from llmtune.evaluation.diagnosis.distances import (
    kernel_discrepancy,
    proxy_a_distance,
    unbiased_mmd,
)
from llmtune.evaluation.diagnosis.shift import plan_shift
from llmtune.scoring.perplexity import score_texts

SEEDS = range(4)
NOUNS = ("fox", "dog", "film", "plot", "ending", "cast", "story", "house", "river", "child")
VERBS = ("sees", "likes", "follows", "forgets", "paints", "hears", "wants", "leaves")


def prose(count, seed):
    draw = random.Random(seed)
    return [
        " ".join(
            f"The {draw.choice(NOUNS)} {draw.choice(VERBS)} the {draw.choice(NOUNS)}."
            for _ in range(draw.randint(2, 6))
        )
        for _ in range(count)
    ]


def code(count):
    lines = []
    for path in sorted(Path(llmtune.__file__).parent.rglob("*.py")):
        lines += [line for line in path.read_text().splitlines() if line.startswith("    ")]
    return ["\n".join(lines[start * 4 : start * 4 + 4]) for start in range(count)]


def test_two_samples_of_one_distribution_are_not_told_apart():
    covered, p_values, below_null = 0, [], 0
    for seed in SEEDS:
        points = np.random.default_rng(seed).normal(size=(160, 48))
        found = proxy_a_distance(points[:100], points[100:], seed=seed)
        covered += found.interval[0] == 0.0
        below_null += found.pad <= found.null + 0.3
        p_values.append(kernel_discrepancy(points[:100], points[100:], seed=seed).p_value)
    assert covered >= len(SEEDS) - 1 and below_null == len(SEEDS)
    assert np.median(p_values) > 0.1 and min(p_values) > 0.005


def test_two_distributions_are_told_apart_and_one_massive_channel_hides_nothing():
    random_ = np.random.default_rng(0)
    first, second = random_.normal(size=(80, 48)), random_.normal(size=(60, 48))
    second[:, 3] += 6
    for states in (first, second):
        states[:, 0] *= 30_000
    found = proxy_a_distance(first, second)
    assert found.pad > 1.5 and found.null < 0.8 and found.interval[0] > 1.2
    assert kernel_discrepancy(first, second).p_value < 0.01


def test_mmd_equals_the_double_sums():
    points = np.random.default_rng(2).normal(size=(7, 3))
    kernel = np.exp(-((points[:, None] - points[None]) ** 2).sum(-1))
    np.fill_diagonal(kernel, 0)
    m, n = 3, 4
    x, y = kernel[:m, :m].sum(), kernel[m:, m:].sum()
    expected = x / (m * (m - 1)) + y / (n * (n - 1)) - 2 * kernel[:m, m:].sum() / (m * n)
    assert unbiased_mmd(kernel, np.arange(7) < m) == pytest.approx(expected)


def test_a_seed_gives_the_same_numbers_again():
    points = np.random.default_rng(3).normal(size=(60, 8))
    assert proxy_a_distance(points[:30], points[30:]) == proxy_a_distance(points[:30], points[30:])
    assert kernel_discrepancy(points[:30], points[30:]) == kernel_discrepancy(
        points[:30], points[30:]
    )


def test_code_lies_far_from_prose_and_prose_near_to_prose(subject, settings):
    texts = {"train": prose(80, 0), "evaluation": prose(60, 1), "general": code(60), "few": ["a b"]}
    found = plan_shift(subject.scored, texts, settings).measure()
    assert set(found.pairs) == {"train-evaluation", "train-general"}
    assert found.layer == 1
    far, near = found.pairs["train-general"], found.pairs["train-evaluation"]
    assert far.pad > 1.5 and far.mmd_p < 0.01
    assert near.pad_interval[0] == 0.0 and near.mmd_p > 0.01 and abs(near.mmd) < far.mmd


def test_gaps_and_lengths_are_those_of_the_texts(subject, settings):
    texts = {"train": prose(12, 0), "general": prose(14, 1)}
    found = plan_shift(subject.scored, texts, settings).measure()
    with subject.scored.model.disable_adapter():
        scores = {
            name: score_texts(
                subject.scored.model, subject.scored.tokenizer, given,
                max_length=512, token_budget=1000,
            )
            for name, given in texts.items()
        }  # fmt: skip
    gaps = {}
    for name, each in scores.items():
        loss = sum(score.negative_log_likelihood for score in each)
        nats = loss / sum(score.num_tokens for score in each)
        bits = loss / math.log(2) / sum(score.num_bytes for score in each)
        short = all(score.num_tokens < 128 for score in each)
        if short:
            assert found.sets[name].nats_per_token == pytest.approx(nats, rel=1e-4)
            assert found.sets[name].bits_per_byte == pytest.approx(bits, rel=1e-4)
        gaps[name] = (found.sets[name].nats_per_token, found.sets[name].bits_per_byte)
    pair = found.pairs["train-general"]
    assert pair.ppl_gap_nats == pytest.approx(gaps["train"][0] - gaps["general"][0])
    assert pair.ppl_gap_bits_per_byte == pytest.approx(gaps["train"][1] - gaps["general"][1])
    words = sum(len(text.split()) for text in texts["train"])
    ids = [subject.scored.tokenizer(text)["input_ids"] for text in texts["train"]]
    assert found.sets["train"].tokens_per_word == pytest.approx(sum(map(len, ids)) / words)
    assert found.sets["train"].length_quantiles[2] == pytest.approx(np.median([*map(len, ids)]))


def test_train_text_alone_is_refused(subject, settings):
    planned = plan_shift(subject.scored, {"train": prose(20, 0), "general": ["a b"]}, settings)
    assert planned.refused and "a different set" in planned.refused
