"""Which choice of an item is right, if its line says so by a whole number."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from llmtune.evaluation.tasks.base import BadItem, SuiteItem

NumberReading = Literal["auto", "text", "position"]
"""A whole number as an answer: the text of a choice, or its position from 0."""


def settle_numbers(
    items: Sequence[SuiteItem], reading: NumberReading, *, has_own_choices: bool
) -> tuple[SuiteItem, ...]:
    """Return the items with the right choice that their numbers mean, read in one way for all.

    `auto` takes the numbers as texts if all of them are choices, else as positions. Where each item
    has its own choices and both readings fit, neither is guessed; the suite's own `choices` are
    what its answers are written in, so there texts come first.

    Raises:
        BadItem: a number does not fit the reading of the others, or both readings fit and differ.
    """
    numbered = [(item, item.number) for item in items if item.number is not None]
    is_text = [str(number) in item.choices for item, number in numbered]
    is_position = [0 <= number < len(item.choices) for item, number in numbered]
    chosen = reading
    if reading == "auto":
        if has_own_choices and all(is_text) and all(is_position):
            _refuse_different(numbered)
        chosen = "text" if all(is_text) else "position"
    for (item, number), fits in zip(
        numbered, is_text if chosen == "text" else is_position, strict=True
    ):
        if not fits:
            raise BadItem(
                f"line {item.line}: the answer {number} is not a {chosen} of the choices "
                f"{list(item.choices)}, and whole numbers are read in one way for all lines; write "
                "the choices' texts, or set answer_is: text or answer_is: position"
            )
    return tuple(_settle(item, chosen) for item in items)


def _settle(item: SuiteItem, reading: NumberReading) -> SuiteItem:
    if item.number is None:
        return item
    answer = item.choices.index(str(item.number)) if reading == "text" else item.number
    return replace(item, answer=answer)


def _refuse_different(numbered: Sequence[tuple[SuiteItem, int]]) -> None:
    for item, number in numbered:
        if item.choices.index(str(number)) != number:
            raise BadItem(
                f"line {item.line}: the answer {number} is the text of one of the choices "
                f"{list(item.choices)} and the position of a different one; set answer_is: text "
                "or answer_is: position in the suite"
            )
