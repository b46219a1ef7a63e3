"""Do a GGUF file in llama.cpp and the model it came from give the same labels."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import nn

from llmtune.checks.runtime import RuntimeAnswers
from llmtune.io.fingerprint import JsonObject
from llmtune.scoring.batches import choose_token_budget
from llmtune.scoring.likelihood import score_continuations
from llmtune.scoring.requests import ContinuationRequest


@dataclass(frozen=True)
class LabelQuestion:
    """A prompt, the first token of every choice, and which choice is right."""

    prompt_ids: tuple[int, ...]
    first_ids: tuple[int, ...]
    answer: int


@dataclass(frozen=True)
class LabelAgreement:
    """Accuracy of model and file on the same questions, both by the likeliest first token."""

    suite: str
    n: int
    model_accuracy: float
    file_accuracy: float
    num_same: int

    @property
    def difference(self) -> float:
        """How much of accuracy the file loses or gains, as a fraction of 1."""
        return abs(self.file_accuracy - self.model_accuracy)

    def to_dict(self) -> JsonObject:
        """Return the agreement as JSON."""
        return asdict(self)


def first_token_questions(
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[Sequence[int]]],
    answers: Sequence[int],
) -> list[LabelQuestion]:
    """Return the questions whose choices differ in their first token; others cannot be asked so.

    Args:
        prompts: token ids of every item.
        choices: token ids of every item's choices.
        answers: the right choice of every item.
    """
    questions = []
    for prompt, options, answer in zip(prompts, choices, answers, strict=True):
        first = tuple(ids[0] for ids in options)
        if len(set(first)) == len(first):
            questions.append(LabelQuestion(tuple(prompt), first, answer))
    return questions


def label_in_model(model: nn.Module, questions: Sequence[LabelQuestion]) -> list[int]:
    """Return the choice whose first token is likeliest in transformers, for every question."""
    requests = [
        ContinuationRequest(question.prompt_ids, tuple((token,) for token in question.first_ids))
        for question in questions
    ]
    scores = score_continuations(model, requests, token_budget=choose_token_budget(model))
    return [_likeliest([score.log_likelihood for score in one]) for one in scores]


def file_labels(answers: RuntimeAnswers) -> list[int]:
    """Return the candidate that llama.cpp found likeliest, for every question it was asked."""
    return [_likeliest(values) for values in answers.candidates]


def compare_labels(
    suite: str,
    questions: Sequence[LabelQuestion],
    model_labels: Sequence[int],
    file_labels: Sequence[int],
) -> LabelAgreement:
    """Compare the labels that a model and a file gave to the same questions."""
    right = [question.answer for question in questions]
    count = max(len(questions), 1)
    return LabelAgreement(
        suite=suite,
        n=len(questions),
        model_accuracy=_count_equal(model_labels, right) / count,
        file_accuracy=_count_equal(file_labels, right) / count,
        num_same=_count_equal(model_labels, file_labels),
    )


def _likeliest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda choice: values[choice])


def _count_equal(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(a == b for a, b in zip(one, other, strict=True))
