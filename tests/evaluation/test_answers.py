"""A written answer is read as what it says: never as less than its signs, never as its opposite."""

import pytest

from llmtune.evaluation.answers import find_choice, find_last_number

FEELINGS = ("positive", "negative")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("New York", 1),
        ("york", 0),
        ("it is york.", 0),
        ("I think New York!", 1),
        ("Boston", None),
        ("", None),
        ("york or new york", None),
    ],
)
def test_the_longest_choice_counts(text, found):
    assert find_choice(text, ["york", "new york"]) == found


@pytest.mark.parametrize(
    ("text", "choices", "found"),
    [
        ("C++", ("C", "C++"), 1),
        ("It is C++.", ("C", "C++"), 1),
        ("C++", ("C", "Java"), None),
        ("C#", ("C", "C#"), 1),
        ("A+", ("A", "A+", "A-"), 1),
        ("grade: A-", ("A", "A+", "A-"), 2),
        ("A+", ("A", "B"), None),
        ("-1", ("-1", "0", "1"), 0),
        ("-1", ("1", "2"), None),
        ("1.5", ("1", "5"), None),
        (">", ("<", ">"), 1),
        ("a > b", ("<", ">"), 1),
        (">=", (">", "<"), None),
        ("(B)", ("A", "B"), 1),
        ("**B.**", ("A", "B"), 1),
        ("Answer:B", ("A", "B"), 1),
        ("'positive'", FEELINGS, 0),
        ("POSITIVE!", FEELINGS, 0),
        ("a", ("A", "a"), 1),
    ],
)
def test_signs_belong_to_the_word_that_they_touch(text, choices, found):
    assert find_choice(text, choices) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("not positive", None),
        ("It isn't really positive.", None),
        ("not positive but negative", 1),
        ("neither positive nor negative", None),
        ("Not sure. Positive.", 0),
        ("No, it is negative", 1),
        ("non-positive", None),
    ],
)
def test_what_is_denied_is_not_named(text, found):
    assert find_choice(text, FEELINGS) == found


@pytest.mark.parametrize(
    ("text", "choices", "found"),
    [
        ("यह हिन्दी है", ("हिन्दी", "हिन्द"), 0),
        ("यह हिन्दी है", ("हिन्द", "उर्दू"), None),
        ("答案是正面。", ("正面", "负面"), 0),
        ("不正面", ("正面", "负面"), None),
        ("naïve", ("na", "ve"), None),
        ("\uff22", ("A", "B"), 1),
    ],
)
def test_words_end_where_their_script_ends_them(text, choices, found):
    assert find_choice(text, choices) == found


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 12 + 30 = 42.", 42),
        ("1,234 in all", 1234),
        ("1,234.5", 1234.5),
        ("12,345,678", 12345678),
        ("1 000", 1000),
        ("1_000", 1000),
        ("1'000.5", 1000.5),
        ("1\u202f000\u202f000", 1000000),
        ("-12 000 500", -12000500),
        ("about 12 500", None),
        ("In 2020 500 people", 500),
        ("7 12", 12),
        ("item_1", 1),
        ("1_2", None),
        ("-5", -5),
        ("it is −5", -5),
        ("$-5 or -$6", -6),
        ("12-30=-18", -18),
        ("-3.50", -3.5),
        (".5", 0.5),
        ("GPT-4", 4),
        ("1e-3", 0.001),
        ("1,2", None),
        ("0,123", None),
        ("1.234,5", None),
        ("1.234.567", None),
        ("10-20", None),
        ("10–20", None),
        ("3/4", None),
        ("2020-05-17", None),
        ("forty-two", None),
    ],
)
def test_a_number_is_read_in_one_way_or_not_at_all(text, number):
    assert find_last_number(text) == number
