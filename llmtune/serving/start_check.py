"""The start-up check of a server: a few greedy answers beside those that the report is made of."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmtune.data.problems import shorten
from llmtune.errors import LlmtuneError
from llmtune.evaluation.question import question_of
from llmtune.evaluation.results import (
    ArmResult,
    KeptAnswer,
    arm_result_path,
    read_arm_result,
)
from llmtune.evaluation.tasks.base import Suite
from llmtune.io.fingerprint import JsonObject, hash_json

log = logging.getLogger("llmtune")

NO_DEMONSTRATIONS = hash_json([])
SHOWN_CHARACTERS = 120


@dataclass(frozen=True)
class Known:
    """Where the answers of a report are: a run's suites and results. Neither is there otherwise."""

    suites: tuple[Suite, ...] = ()
    results_dir: Path | None = None
    problem: str | None = None
    """Why the suites cannot be read."""


@dataclass(frozen=True)
class Asked:
    """Who is asked: its name for people, whose results it is compared with, and its identity."""

    name: str
    arm: str
    identity: Mapping[str, Any] | None = None
    """Of the loaded model; None if it is a file made of it."""
    rounding: str | None = None
    """The numbers of such a file, if they hold less than the model's."""


@dataclass(frozen=True)
class KnownQuestion:
    """One item of a suite, and what the model wrote to it when it was evaluated."""

    where: str
    messages: tuple[Mapping[str, Any], ...]
    kept: KeptAnswer


@dataclass(frozen=True)
class Difference:
    """An answer that is not the report's."""

    question: str
    served: str
    reported: str


@dataclass(frozen=True)
class StartCheck:
    """How many known questions were asked, and which answers differ; else why none was."""

    model: str
    compared_with: str = ""
    """Whose answers in the report they are compared with."""
    rounding: str | None = None
    asked: int = 0
    differences: tuple[Difference, ...] = ()
    why_not: str | None = None

    def to_json(self) -> JsonObject:
        """Return it as JSON values."""
        return asdict(self)

    def say(self) -> None:
        """Tell the user: a difference as loudly as a log can."""
        if self.why_not is not None:
            log.info("serve: not compared with a report: %s", self.why_not)
            return
        same = self.asked - len(self.differences)
        is_other = self.compared_with not in ("", self.model, "base")
        whose = f"the report's {self.compared_with} model" if is_other else "the report"
        if not self.differences:
            log.info("serve: %s gives %d of %d answers of %s", self.model, same, self.asked, whose)
            return
        why = "so what it says of the model may not hold here"
        if self.rounding is not None and same:
            numbers = "numbers of an unknown type" if self.rounding == "other" else self.rounding
            why = (
                f"whose weights this file holds in {numbers}: some answers differ for that alone, "
                "and llmtune verify and llmtune eval say how much it costs"
            )
        lines = [
            f"  {one.question}: serves {shorten(one.served, SHOWN_CHARACTERS)}, the report has "
            f"{shorten(one.reported, SHOWN_CHARACTERS)}"
            for one in self.differences
        ]
        log.warning(
            "WARNING: %s gives only %d of %d answers of %s, %s:\n%s",
            self.model,
            same,
            self.asked,
            whose,
            why,
            "\n".join(lines),
        )


def check_answers(
    asked: Asked, known: Known, count: int, ask: Callable[[KnownQuestion], str]
) -> StartCheck:
    """Ask up to `count` known questions and compare the answers.

    Args:
        ask: returns the greedy answer that is served.
    """
    name = asked.name
    if count == 0:
        return StartCheck(name, why_not="--check 0")
    if known.problem is not None or known.results_dir is None:
        return StartCheck(name, why_not=known.problem or "this is not a run")
    questions = _find_questions(known, asked, count)
    if not questions:
        why = f"no answer that this {asked.arm} model wrote to a chat is kept"
        return StartCheck(name, why_not=why)
    differences = []
    for question in questions:
        served = ask(question)
        if not question.kept.is_said_by(served):
            differences.append(Difference(question.where, served, question.kept.text))
    return StartCheck(name, asked.arm, asked.rounding, len(questions), tuple(differences))


def _find_questions(known: Known, asked: Asked, count: int) -> list[KnownQuestion]:
    """Return the first questions of every suite in turn."""
    assert known.results_dir is not None
    found = []
    for suite in known.suites:
        path = arm_result_path(known.results_dir, suite.name, asked.arm)
        if path.is_file():
            try:
                found.append(_of_suite(suite, read_arm_result(path), asked))
            except LlmtuneError as error:
                log.warning("serve: %s", error)
    mixed = [
        questions[place]
        for place in range(max(map(len, found), default=0))
        for questions in found
        if place < len(questions)
    ]
    return mixed[:count]


def _of_suite(suite: Suite, result: ArmResult, asked: Asked) -> list[KnownQuestion]:
    if asked.identity is not None and dict(result.model) != dict(asked.identity):
        log.warning(
            "serve: %s was evaluated on a different %s model; not asked", suite.name, asked.arm
        )
        return []
    if not _is_of(suite, result):
        log.info("serve: %s has changed since it was evaluated; not asked", suite.name)
        return []
    scores = {score.id: score for score in result.items}
    questions = []
    for item in suite.items:
        kept = suite.config.kept_answer(scores[item.id]) if item.id in scores else None
        if kept is not None and not item.tools:
            messages = tuple(question_of(suite, item).messages)
            questions.append(KnownQuestion(f"{suite.name}, {item.id}", messages, kept))
    return questions


def _is_of(suite: Suite, result: ArmResult) -> bool:
    """Whether a result is of these very items, asked without demonstrations."""
    fingerprints: Sequence[str] = [suite.items_fingerprint]
    answers = [score.answer or "" for score in result.items]
    if len(answers) == len(suite.items):
        fingerprints = [*fingerprints, suite.with_base_answers(answers).items_fingerprint]
    recipe = result.recipe
    return (
        recipe.get("items") in fingerprints
        and recipe.get("demonstrations", NO_DEMONSTRATIONS) == NO_DEMONSTRATIONS
    )
