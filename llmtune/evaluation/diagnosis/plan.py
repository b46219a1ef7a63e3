"""A diagnosis before it is made: from which inputs, at which cost, and how."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

from llmtune.errors import LlmtuneError
from llmtune.evaluation.diagnosis.results import DiagnosticT, read_diagnostic


@dataclass(frozen=True)
class Diagnosis(Generic[DiagnosticT]):
    """What `measure` will return is made from `inputs` and costs `tokens` forward tokens at most.

    `refused` says why it cannot be measured on this run; `measure` then raises that.
    """

    kind: type[DiagnosticT]
    inputs: Mapping[str, str]
    tokens: int
    measure: Callable[[], DiagnosticT]
    refused: str | None = None

    def find(self, diagnostics_dir: Path) -> DiagnosticT | None:
        """Return the result that lies there, if it was made from the same inputs."""
        try:
            known = read_diagnostic(self.kind, diagnostics_dir)
        except LlmtuneError:
            return None  # half a file, or another version's: it is measured again
        return known if known is not None and dict(known.inputs) == dict(self.inputs) else None


def refuse(kind: type[DiagnosticT], why: str) -> Diagnosis[DiagnosticT]:
    """Return a diagnosis that cannot be made."""

    def measure() -> DiagnosticT:
        raise LlmtuneError(why)

    return Diagnosis(kind, {}, 0, measure, refused=why)
