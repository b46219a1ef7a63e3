"""What the diagnoses of a run found, as far as they are of the models that are there now."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from llmtune.evaluation.diagnosis.base import (
    Diagnosis,
    Diagnostic,
    Leak,
    MoreRows,
    read_diagnostic,
)
from llmtune.evaluation.diagnosis.config import DIAGNOSES
from llmtune.evaluation.results import hash_answers
from llmtune.io.fingerprint import JsonObject
from llmtune.io.run_dir import RunDir
from llmtune.reporting.run_results import Results


@dataclass(frozen=True)
class Diagnostics:
    """What was found, by the name of each diagnosis that was made on the run's models."""

    found: Mapping[str, Diagnostic] = field(default_factory=dict)

    def __iter__(self) -> Iterator[tuple[Diagnosis[Any], Any]]:
        """Yield every diagnosis in the order of the report, with its result or None."""
        for diagnosis in DIAGNOSES:
            yield diagnosis, self.found.get(diagnosis.name)

    @property
    def seconds(self) -> dict[str, float]:
        """What each diagnosis took, by its name."""
        return {diagnosis.name: made.seconds for diagnosis, made in self if made is not None}

    @property
    def leaks(self) -> dict[str, Leak]:
        """The items of each suite that training has seen, of the diagnosis that found most."""
        found: dict[str, Leak] = {}
        for diagnosis, made in self:
            for suite, leak in diagnosis.leaks(made).items() if made is not None else ():
                if suite not in found or leak.share > found[suite].share:
                    found[suite] = leak
        return found

    @property
    def more_rows(self) -> dict[str, MoreRows]:
        """What more training rows would bring, by the diagnosis that says so."""
        said = {each.name: each.more_rows(made) for each, made in self if made is not None}
        return {name: forecast for name, forecast in said.items() if forecast is not None}

    def unguarded(self) -> Iterator[str]:
        """Yield what a verdict to ship is not guarded against, because it was not measured."""
        for diagnosis, made in self:
            if made is None and diagnosis.guards:
                yield f"whether {diagnosis.guards} was not checked"

    def without_more_rows(self) -> "Diagnostics":
        """Return these without what says what more rows would bring: it is of one training."""
        said = self.more_rows
        return Diagnostics({name: made for name, made in self.found.items() if name not in said})

    def as_json(self) -> JsonObject:
        """Return every diagnosis as its file holds it, None if it was not made."""
        return {
            diagnosis.name: TypeAdapter(type(made)).dump_python(made, mode="json") if made else None
            for diagnosis, made in self
        }


def read_diagnostics(
    run: RunDir, results: Results, *, base: str | None, adapter: str | None
) -> Diagnostics:
    """Read what is in the run's `diagnostics/`, without what was measured on other models.

    Args:
        results: the arms' scores that are of these models; what was made from other answers is
            left out.
        base, adapter: fingerprints of the models that are there now.

    Raises:
        LlmtuneError: a file is damaged or of a different version.
    """
    found = {each.name: read_diagnostic(each.result, run.diagnostics_dir) for each in DIAGNOSES}
    return Diagnostics(
        {
            name: made
            for name, made in found.items()
            if made is not None
            and made.is_of(base=base, adapter=adapter)
            and _is_of_answers(made, results)
        }
    )


def _is_of_answers(made: Diagnostic, results: Results) -> bool:
    """Return whether the answers that it was made from are those of the results."""
    return all(
        arm in results.get(suite, {}) and hash_answers(results[suite][arm]) == known
        for suite, arms in made.answers.items()
        for arm, known in arms.items()
    )
