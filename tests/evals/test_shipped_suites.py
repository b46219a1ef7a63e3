"""The shipped suites: the general items are sound, and every suite file loads as declared."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

from llmtune.evaluation.suite import load_suite
from llmtune.evaluation.tasks.config import TASKS

EVALS_DIR = Path(__file__).resolve().parents[2] / "evals"
SUITE_FILES = sorted(EVALS_DIR.glob("*.yaml"))
OPERATIONS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "x": lambda a, b: a * b,
    "/": lambda a, b: a / b,
}


def read_general(name: str = "general") -> list[dict]:
    text = (EVALS_DIR / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def items_by_category() -> dict[str, list[dict]]:
    categories: dict[str, list[dict]] = {}
    for item in read_general():
        categories.setdefault(item["category"], []).append(item)
    return categories


def test_general_suite_has_forty_items_in_each_of_six_categories():
    assert {name: len(items) for name, items in items_by_category().items()} == {
        "arithmetic": 40,
        "capitals": 40,
        "word meaning": 40,
        "grammar": 40,
        "everyday sense": 40,
        "science": 40,
    }


@pytest.mark.parametrize("name", ["general", "knowledge_hard"])
def test_general_items_are_unique_with_four_different_choices(name):
    items = read_general(name)
    assert len({item["id"] for item in items}) == len(items)
    assert len({item["question"].casefold() for item in items}) == len(items)
    for item in items:
        assert item.keys() - {"difficulty"} == {"id", "category", "question", "choices", "answer"}
        assert len({choice.casefold() for choice in item["choices"]}) == 4
        assert all(choice == choice.strip() for choice in item["choices"])


def test_the_right_choice_stands_equally_often_at_each_place():
    for items in items_by_category().values():
        assert Counter(item["answer"] for item in items) == dict.fromkeys(range(4), 10)


def test_harder_items_are_spread_over_subjects_difficulties_and_places():
    items = read_general("knowledge_hard")
    subjects = Counter(item["category"] for item in items)
    assert subjects == dict.fromkeys(
        ("arithmetic", "reasoning", "reading", "science", "language"), 18
    )
    assert min(Counter(item["difficulty"] for item in items).values()) >= 15
    places = Counter((item["category"], item["answer"]) for item in items)
    assert len(places) == 20 and min(places.values()) >= 4
    sums = [item for item in items if item["category"] == "arithmetic"]
    ranks = Counter(
        sorted(map(float, item["choices"])).index(float(item["choices"][item["answer"]]))
        for item in sums
    )
    assert min(ranks[rank] for rank in range(4)) >= 4
    assert len(load_suite(EVALS_DIR / "knowledge_hard.yaml").items) == 90


@pytest.mark.parametrize("name", ["general", "knowledge_hard"])
def test_length_does_not_give_the_right_choice_away(name):
    items = read_general(name)
    longest = shortest = 0
    for item in items:
        lengths = [len(choice) for choice in item["choices"]]
        right = lengths[item["answer"]]
        longest += (right == max(lengths)) / lengths.count(max(lengths))
        shortest += (right == min(lengths)) / lengths.count(min(lengths))
    assert longest / len(items) < 0.32
    assert shortest / len(items) < 0.32


def test_arithmetic_answers_are_what_the_numbers_give():
    for item in items_by_category()["arithmetic"]:
        first, sign, second = re.fullmatch(r"(\d+) ([-+x/]) (\d+) =", item["question"]).groups()
        result = OPERATIONS[sign](int(first), int(second))
        assert [float(choice) == result for choice in item["choices"]].index(True) == item["answer"]


def test_the_right_number_is_no_more_often_in_the_middle_of_the_choices():
    ranks = Counter()
    for item in items_by_category()["arithmetic"]:
        numbers = sorted(map(int, item["choices"]))
        ranks[numbers.index(int(item["choices"][item["answer"]]))] += 1
    assert min(ranks[rank] for rank in range(4)) >= 8


def test_the_general_suite_loads_and_continues_a_sentence():
    suite = load_suite(EVALS_DIR / "general.yaml")
    assert suite.role == "general"
    assert len(suite.items) == 240
    assert suite.items[0].prompt == f"Complete the sentence: {read_general()[0]['question']}"


@pytest.mark.parametrize("path", SUITE_FILES, ids=lambda path: path.stem)
def test_every_suite_file_declares_only_known_keys(path):
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    config = TASKS[values["task"]].model_validate(values)
    assert config.name == path.stem
    assert config.description
