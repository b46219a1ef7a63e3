"""The result of verifying one model: what was compared, what differs too much, and its words."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from llmtune.errors import CheckFailed


class Comparison(Protocol):
    """A model directory or a file, compared with what it was made from."""

    @property
    def problems(self) -> tuple[str, ...]:
        """What differs by more than allowed, one text each."""

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON."""

    def lines(self, subject: str) -> Iterator[str]:
        """Yield each comparison with its limit, for the terminal."""


@dataclass(frozen=True)
class Verification:
    """What was verified, against what, and how they compare."""

    subject: str
    against: str
    found: Comparison

    def to_dict(self) -> dict[str, Any]:
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
