"""The four models that every suite is asked, and which two of them a verdict is about."""

from collections.abc import Container, Iterable
from typing import Literal

MainArm = Literal["original", "base", "tuned", "merged"]
MAIN_ARMS: tuple[MainArm, ...] = ("original", "base", "tuned", "merged")
"""`original`: the base as the user gave it. `base`: the base as it was trained on, quantized or
not. `tuned`: that base with the adapter on it. `merged`: the merged checkpoint."""

CHAIN: dict[str, tuple[MainArm, MainArm]] = {
    "quantization": ("original", "base"),
    "training": ("base", "tuned"),
    "merging": ("tuned", "merged"),
}
"""What merged minus original is made of: each part is the second arm minus the first."""

WITHOUT_ADAPTER = ("original", "base", "few-shot", "prompt")
"""Kinds of arms that the base answers; the others are the model as it is."""

OTHER = "other"
"""Kind of an arm that neither base nor adapter answers: predictions, an endpoint."""

BEFORE: tuple[MainArm, ...] = ("original", "base")
AFTER: tuple[MainArm, ...] = ("merged", "tuned")
SAME_AS = "same_as"
"""Key of a result's `about`: the arm whose scores these are, because both are one model."""
OWN_TEMPLATE = "own_template"
"""Key of a result's `about`: a whole model that was asked in the chat template it ships with."""


def compared_arms(arms: Container[str]) -> tuple[MainArm, MainArm] | None:
    """Return which two arms are compared: what ships with what the user had.

    If one of them was not measured, the closest arm takes its place: the base as it was trained on
    for the original, base + adapter for the merged model. None if there is no such pair.
    """
    before = next((arm for arm in BEFORE if arm in arms), None)
    after = next((arm for arm in AFTER if arm in arms), None)
    return (before, after) if before and after else None


def kind_among(kinds: Iterable[str], arm: str) -> str | None:
    """Return which of these kinds an arm is one of (`few-shot-2` is a `few-shot`); else None."""
    return next((kind for kind in kinds if arm == kind or arm.startswith(f"{kind}-")), None)
