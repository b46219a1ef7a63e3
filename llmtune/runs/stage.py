"""What a stage of a run is: what decides it, what it leaves, and how it is done."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, cast

from llmtune.adapters.manifest import adapter_fingerprint
from llmtune.config import RunConfig, anchor_paths
from llmtune.data.config import SourceConfig
from llmtune.errors import LlmtuneError
from llmtune.io.fingerprint import JsonObject
from llmtune.io.manifest import Manifest, StageRecord, is_judgment, read_manifest
from llmtune.io.validation import validate_section
from llmtune.io.yaml_source import SourcedTree
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.resolve import resolve_base
from llmtune.models.template_date import today
from llmtune.runs.ledger import Ledger, open_ledger

Result = TypeVar("Result", bound=Mapping[str, Any])


class Stage(ABC, Generic[Result]):
    """One stage of a run, with its config; `Result` is what it records of itself.

    A finished stage of equal `inputs` whose `outputs` are all there is skipped; with `force` it is
    done again.
    """

    name: str
    paths_in_run: ClassVar[tuple[str, ...]] = ()
    """Keys of the result that are paths; below the run they are recorded relative to it."""
    is_first: bool = False
    """Whether it begins the run: it records the config, and `force` clears the run directory."""

    def __init__(
        self, config: RunConfig, *, force: bool = False, opened: Checkpoint | None = None
    ) -> None:
        """Hold the config, and the base if an earlier stage has `opened` it."""
        self.config = anchor_paths(config)
        self.force = force
        self._opened = opened

    def check(self) -> None:
        """Find what is wrong with the input before the run directory is opened.

        Raises:
            LlmtuneError: the stage cannot be done.
        """

    @abstractmethod
    def inputs(self, manifest: Manifest) -> JsonObject:
        """Return everything that decides the result, as JSON values."""

    def complete(self, inputs: Mapping[str, Any]) -> JsonObject:
        """Return recorded inputs with what this version has added to them, as its defaults."""
        return inputs

    @abstractmethod
    def outputs(self, record: StageRecord) -> Iterable[Path]:
        """Return the paths that the stage has left, by its record of equal inputs."""

    @abstractmethod
    def run(self, inputs: JsonObject) -> Result:
        """Do the work and return the result as JSON values."""

    def do(self) -> Result:
        """Check the input, open the run, and do the stage or skip it; return its result."""
        self.check()
        with self.open() as ledger:
            self.before(ledger)
            inputs = self.inputs(ledger.manifest)
            result: Result | None = None
            if not self.force:
                recorded = ledger.finished(
                    self.name, inputs, complete=self.complete, outputs=self.outputs
                )
                if recorded is not None:
                    result = self._with_paths(cast(Result, recorded), self.config.run.place)
            if result is None:
                ledger.begin(self.name, inputs)
                result = self.run(inputs)
                ledger.finish(self.name, self._with_paths(result, self.config.run.name_in_run))
            self.after(ledger, result)
        return result

    def _with_paths(self, result: Result, change: Callable[[str], str]) -> Result:
        changed = {key: change(result[key]) for key in self.paths_in_run if key in result}
        return cast(Result, {**result, **changed})

    def why_unfinished(self, manifest: Manifest, present: JsonObject) -> str | None:
        """Say why what the stage has left may not be used, and what to do; None if it may.

        It may if the stage is finished and was made from these of its inputs.
        """
        record = manifest.record(self.name)
        again = f"redo it with: llmtune {self.name} {self.config.run.path}"
        if not record.get("finished"):
            return f"{self.config.run.path}: its {self.name} did not finish; {again}"
        known = self.complete(record.get("inputs") or {})
        other = [key for key in present if known.get(key) != present[key]]
        if not other:
            return None
        return (
            f"{self.config.run.path}: its {self.name} was made from a different "
            f"{' and '.join(other)} than now; {again}"
        )

    def before(self, ledger: Ledger) -> None:
        """Describe in the open run what the stage is about to use, or refuse it."""

    def after(self, ledger: Ledger, result: Result) -> None:
        """Describe in the open run what the stage has left, done or skipped."""

    def open(self) -> AbstractContextManager[Ledger]:
        """Hold the run directory."""
        return open_ledger(
            self.config.run,
            self.config.model_dump(mode="json"),
            deciding=deciding_knobs_of,
            is_recorded=self.is_first,
            force=self.is_first and self.force,
        )

    @cached_property
    def source(self) -> Checkpoint:
        """The base of the run; its chat template prints the date of the run, whatever day it is."""
        source = self._opened or resolve_base(self.config.model)
        date = self._recorded_date() or today()
        return source if source.template_date == date else replace(source, template_date=date)

    def _recorded_date(self) -> str | None:
        """Return the date that the run has trained with, if it is to be kept."""
        run = self.config.run
        if (self.is_first and self.force) or not run.manifest_path.is_file():
            return None
        date = read_manifest(run).base.get("template_date")
        return None if date is None else str(date)

    @cached_property
    def adapter(self) -> str:
        """The fingerprint of the run's adapter.

        Raises:
            LlmtuneError: nothing was trained yet.
        """
        run = self.config.run
        if not run.adapter_dir.is_dir():
            raise LlmtuneError(
                f"{run.path}: has no trained adapter yet; make it with: llmtune train CONFIG"
            )
        return adapter_fingerprint(run.adapter_dir)


def deciding_knobs(config: RunConfig) -> JsonObject:
    """Return the knobs that decide the adapter; base and rows are compared by their content."""
    values = config.model_dump(
        mode="json",
        include={"seed", "model", "adapter", "data", "protect"},
        exclude={
            "protect": {
                part: {"source": {"path", "revision"}}
                for part in ("replay", "kl_to_base")
                if isinstance(getattr(getattr(config.protect, part), "source", None), SourceConfig)
            },
            "model": {"base", "revision", "trust_remote_code", "cache_quantized"},
            "data": {
                "cache": True,
                "train": {"__all__": {"path", "revision"}},
                "evaluation": {"__all__": {"path", "revision"}},
            },
        },
    )
    return values | {"train": config.train.deciding_knobs()}


def deciding_knobs_of(recorded: Mapping[str, Any]) -> JsonObject:
    """Return what `deciding_knobs` does, of a config as a manifest holds it.

    A config of an older version lacks the keys that were added since. Such a key counts as its
    default, so that an older run can still be evaluated and reported.

    Raises:
        LlmtuneError: it has a key that this version does not know, or is not a run's.
    """
    if is_judgment(recorded):
        raise LlmtuneError(
            "the directory holds a judgment (llmtune judge) and no run; choose another run_dir"
        )
    tree = SourcedTree(dict(recorded), {(): "the run's manifest.json"})
    return deciding_knobs(validate_section(RunConfig, tree))
