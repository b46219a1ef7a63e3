"""What one item scores: a metric is one function and its entry in METRICS."""

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

ARTICLES = re.compile(r"\b(a|an|the)\b")
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?|[-+]?\.\d+")
PUNCTUATION = str.maketrans("", "", string.punctuation)

Normalization = Literal["strip", "lowercase", "punctuation", "articles", "whitespace"]


@dataclass(frozen=True)
class Metric:
    """How a metric is read: the task it belongs to, its direction, and what one unit means."""

    name: str
    task: str
    higher_is_better: bool
    unit: str


METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", "choice", True, "share of items"),
        Metric("answer_probability", "choice", True, "probability among the choices"),
        Metric("exact_match", "exact", True, "share of items"),
        Metric("contains", "exact", True, "share of items"),
        Metric("token_f1", "exact", True, "F1 of words"),
        Metric("number_match", "exact", True, "share of items"),
        Metric("nats_per_token", "perplexity", False, "nats per token"),
        Metric("bits_per_byte", "perplexity", False, "bits per byte"),
    )
}


def accuracy(values: Sequence[float], answer: int) -> float:
    """1 where the right choice has the highest value; the first of equals counts as chosen."""
    return float(int(np.argmax(values)) == answer)


def answer_probability(values: Sequence[float], answer: int) -> float:
    """The right choice's share of probability among the choices: softmax of `values` (nats)."""
    shifted = np.exp(np.asarray(values, dtype=np.float64) - max(values))
    return float(shifted[answer] / shifted.sum())


def exact_match(prediction: str, reference: str) -> float:
    """1 where the two normalised texts are the same."""
    return float(prediction == reference)


def contains(prediction: str, reference: str) -> float:
    """1 where the normalised reference stands anywhere in the prediction as whole words."""
    pattern = rf"(?<!\w){re.escape(reference)}(?!\w)"
    return float(re.search(pattern, prediction) is not None)


def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of the precision and recall of words (SQuAD); 0 where none is shared."""
    written, expected = prediction.split(), reference.split()
    if not written or not expected:
        return float(written == expected)
    shared = sum((Counter(written) & Counter(expected)).values())
    return 2 * shared / (len(written) + len(expected))


def number_match(prediction: str, reference: str) -> float:
    """1 where the last number in the prediction equals the last number in the reference."""
    written, expected = last_number(prediction), last_number(reference)
    return float(written is not None and written == expected)


CHOICE_FUNCTIONS = {"accuracy": accuracy, "answer_probability": answer_probability}
EXACT_FUNCTIONS = {
    "exact_match": exact_match,
    "contains": contains,
    "token_f1": token_f1,
    "number_match": number_match,
}


def last_number(text: str) -> float | None:
    """Return the last number written in `text` (thousands commas allowed), or None."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def normalize_text(text: str, steps: Sequence[Normalization]) -> str:
    """Apply the steps in a fixed order: lowercase, punctuation, articles, whitespace, strip."""
    if "lowercase" in steps:
        text = text.lower()
    if "punctuation" in steps:
        text = text.translate(PUNCTUATION)
    if "articles" in steps:
        text = ARTICLES.sub(" ", text)
    if "whitespace" in steps:
        text = " ".join(text.split())
    if "strip" in steps:
        text = text.strip()
    return text
