"""The result of verifying one model: what was compared, what differs too much, and its words."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from llmtune.errors import CheckFailed
from llmtune.io.fingerprint import JsonObject

# Largest KL(model || file) after a prompt, in nats, with which a file is kept. A broken file has
# several nats; SmolLM2-135M, which suffers more than larger models, has 0.00001 in f16 and 0.010
# in q8_0.
MAX_KL = {"f32": 0.01, "f16": 0.01, "bf16": 0.02, "q8_0": 0.05}
MAX_KL_SMALL = 0.6
"""For everything of fewer than 8 bits."""
MERGED_KL = 0.05
"""Nats that a file may differ more from base + adapter than from the merged model: a merge rounds
too. SmolLM2-135M in bfloat16 is 0.02 from its adapter at an answer's first token."""
# Largest change of a suite's label accuracy, as a fraction of 1.
ACCURACY_CHANGE = {"f32": 0.01, "f16": 0.01, "bf16": 0.02, "q8_0": 0.02}
ACCURACY_CHANGE_SMALL = 0.10
MERGED_ACCURACY = 0.02
"""What the merge into 16 bits may add to that."""


@dataclass(frozen=True)
class Tolerances:
    """By how much what is verified may differ from its reference."""

    max_kl: float | None = None
    """Largest KL in nats per token; None is the bound of the file's type."""
    max_odd_strings: int = 0
    """How many of the tricky strings may be tokenized differently."""
    max_accuracy_change: float | None = None
    """Largest change of a target suite's label accuracy in a GGUF file, as a fraction of 1; None
    is the bound of the file's type."""

    def string_problems(self, num_odd: int, num_strings: int, odd: Sequence[str]) -> list[str]:
        """Say how many strings differ in their tokens if too many do; `odd` are the first."""
        if num_odd <= self.max_odd_strings:
            return []
        return [
            f"{num_odd} of {num_strings} tricky strings are tokenized differently, such as "
            f"{odd[0]!r} (the limit is {self.max_odd_strings})"
        ]


class Comparison(Protocol):
    """A model directory or a file, compared with what it was made from."""

    @property
    def problems(self) -> tuple[str, ...]:
        """What differs by more than allowed, one text each."""

    def to_dict(self) -> JsonObject:
        """Return the comparison as JSON."""

    def lines(self, subject: str) -> Iterator[str]:
        """Yield each comparison with its limit, for the terminal."""


@dataclass(frozen=True)
class Verification:
    """What was verified, against what, and how they compare."""

    subject: str
    against: str
    found: Comparison

    def to_dict(self) -> JsonObject:
        """Return the result as JSON."""
        return {"subject": self.subject, "against": self.against, **self.found.to_dict()}

    def describe(self) -> str:
        """Return every comparison with its limit, and the verdict."""
        lines = list(self.found.lines(self.subject))
        if self.found.problems:
            lines.append(f"FAILED: {len(self.found.problems)} of these are beyond their limit")
        else:
            lines.append(f"passed: the same as {self.against} within these limits")
        return "\n".join(lines)

    def require_passed(self) -> None:
        """Check that nothing differs by more than allowed.

        Raises:
            CheckFailed: something does; the message says what.
        """
        if self.found.problems:
            raise CheckFailed(
                f"{self.subject} differs from {self.against}: " + "; ".join(self.found.problems)
            )


def format_line(what: str, found: str, limit: str) -> str:
    """Return one line of a comparison for the terminal."""
    return f"  {what:<30}{found}  [{limit}]"


def format_strings(num_same: int, num_strings: int) -> str:
    """Return the line on the tricky strings."""
    return format_line("tricky strings, same tokens", f"{num_same} of {num_strings}", "all of them")


def format_prompts(num_same: int, num_prompts: int) -> str:
    """Return the line on the rendered chat prompts."""
    found = f"{num_same} of {num_prompts}"
    return format_line("chat prompts, same token ids", found, "all of them")


def allowed_kl(type: str) -> float:
    """Return the KL, in nats, with which a file of this type is kept."""
    return MAX_KL.get(type, MAX_KL_SMALL)


def allowed_accuracy_change(type: str) -> float:
    """Return by how much a file of this type may change a suite's label accuracy."""
    return ACCURACY_CHANGE.get(type, ACCURACY_CHANGE_SMALL)
