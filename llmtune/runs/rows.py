"""The rows of a config before training, and a first config for a file of rows."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml
from transformers import PreTrainedTokenizerFast

from llmtune.config import RunConfig
from llmtune.data.check import ModelLimits
from llmtune.data.config import DataConfig
from llmtune.data.init import Asked, DataDescription, describe_data, draft_suite
from llmtune.data.init_config import FirstTraining, render_config
from llmtune.data.init_job import Job
from llmtune.data.init_suite import NoSuite, SuiteDraft, render_items
from llmtune.errors import LlmtuneError
from llmtune.evaluation.config import EvaluateConfig
from llmtune.evaluation.lengths import find_unfit_items, without_unfit_items
from llmtune.evaluation.results import is_suite_name
from llmtune.evaluation.suite import load_suite, load_suites, render_suite
from llmtune.io.fingerprint import JsonObject
from llmtune.io.run_dir import atomic_write_texts
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.config import ModelConfig
from llmtune.models.resolve import resolve_base
from llmtune.runs.targets import require_run, run_target
from llmtune.training.config import suggest_learning_rate

SHIPPED_BESIDE = ("general", "chat")
DEFAULT_OUT = "llmtune.yaml"
"""A config of this name says nothing of the run, which is then named after the rows."""


@dataclass(frozen=True)
class Rows:
    """The data that a run trains on, and the tokenizer that its rows go through."""

    data: DataConfig
    tokenizer: PreTrainedTokenizerFast
    positions: int | None = None
    """The longest sequence that the model has positions for; None has no limit."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def find_limits(self) -> ModelLimits:
        """Return what the model cannot read: too long rows, and items of the config's suites."""
        suites = load_suites(self.evaluate)
        problems = find_unfit_items(self.tokenizer, suites, self.positions)
        return ModelLimits(self.positions, tuple(problems))


def open_rows(name: str, overrides: Sequence[str] = (), *, use_cache: bool = True) -> Rows:
    """Return the rows of a run directory or a YAML file.

    Raises:
        LlmtuneError: there is no such run, or its base cannot be found.
    """
    more = () if use_cache else ("data.cache=false",)
    config = require_run(name, (*overrides, *more))
    base = run_target(name, config).dense_base
    return Rows(config.mixed_data, base.tokenizer, base.num_positions, config.evaluate)


@dataclass(frozen=True)
class Draft:
    """A first config for some rows: what is known of them, and the files that were written."""

    found: DataDescription
    config: Path
    suite: Path | None
    training: FirstTraining


def draft_config(
    data: str,
    out: Path,
    *,
    base: str | None = None,
    asked: Asked | None = None,
    quantize: bool = False,
    force: bool = False,
) -> Draft:
    """Look at rows, and write a commented config and a suite for them.

    Args:
        data: a file, a directory, a glob or a hub id.
        out: the config to write; the suite is written next to it.
        base: the base model; with it lengths are counted in its tokens.
        asked: what the user says of the rows.
        quantize: store the base in few bits though it would fit.
        force: replace files that are there.

    Raises:
        LlmtuneError: the rows cannot be read, or a file exists already.
    """
    model = resolve_base(ModelConfig(base=base)) if base else None
    found = describe_data(
        data,
        tokenizer=model.tokenizer if model else None,
        positions=model.num_positions if model else None,
        asked=asked,
    )
    if model is not None and isinstance(found.suite, SuiteDraft):
        fitting, note = without_unfit_items(found.suite, model.tokenizer, model.num_positions)
        notes = (*found.notes, note) if note else found.notes
        found = replace(found, suite=fitting, notes=notes)
    files: dict[Path, str] = {}
    suite = None
    if isinstance(found.suite, SuiteDraft):
        suite, items = (out.with_name(f"{out.stem}_{end}") for end in ("suite.yaml", "items.jsonl"))
        source = (found.test or found.evaluation or found.source).path
        files[items] = render_items(found.suite)
        name = out.stem if is_suite_name(out.stem) else "task"
        files[suite] = render_suite(
            found.suite,
            name=name,
            items_name=items.name,
            source=source,
            is_held_out=found.test is None,
        )
    _refuse_existing([*files, out], force=force)
    written = str(suite) if suite else None
    training = _first_training(found, model, quantize=quantize)
    run = None if out.name == DEFAULT_OUT else out.stem
    files[out] = render_config(found, base=base, suite=written, training=training, name=run)
    atomic_write_texts(files)
    return Draft(found, out, suite, training)


def _first_training(
    found: DataDescription, model: Checkpoint | None, *, quantize: bool
) -> FirstTraining:
    """Return learning rate and precision for a base."""
    first = FirstTraining()
    if model is not None:
        width = model.config.get("hidden_size")
        known_width = width if isinstance(width, int) else None
        suggested = suggest_learning_rate(model.model_type, known_width)
        first = FirstTraining(suggested.learning_rate, suggested.reason)
    if quantize:
        return replace(first, is_quantized=True, quantized_reason="as asked")
    if model is not None and not _fits(found, model, first):
        return replace(first, is_quantized=True)
    return first


def _fits(found: DataDescription, model: Checkpoint, first: FirstTraining) -> bool:
    """Say whether a run with 16-bit weights fits on this machine, as far as can be told."""
    from llmtune.runs.pipeline import plan

    tree = yaml.safe_load(render_config(found, base=str(model.directory), training=first))
    config = RunConfig.model_validate(tree)
    try:
        return plan(config).memory.fits
    except LlmtuneError:
        return True  # what cannot be planned is said by the plan of the run itself


@dataclass(frozen=True)
class EvalDraft:
    """A suite of all rows, for models that were trained elsewhere."""

    suite: Path
    task: str
    num_items: int
    job: Job
    note: str | None = None
    """What was left out of it."""

    @property
    def suites(self) -> list[str]:
        """The suite, and what ships with llmtune and belongs beside it."""
        return [str(self.suite), *SHIPPED_BESIDE]

    def as_json(self) -> JsonObject:
        """Return what was written, for scripts."""
        return {
            "suite": str(self.suite),
            "task": self.task,
            "items": self.num_items,
            "suites": self.suites,
        }

    def describe(self) -> str:
        """Return what was written, and what to do with it."""
        names = " ".join(map(shlex.quote, self.suites))
        note = f"{self.note}\n" if self.note else ""
        return (
            f"understood as {self.job.describe()}\n{note}"
            f"{self.suite}: {self.num_items} items, task {self.task}\n"
            f"next: llmtune judge ADAPTER_OR_MODEL --base MODEL --suites {names}"
        )


def draft_eval_suite(
    data: str,
    out: Path,
    *,
    base: str | None = None,
    asked: Asked | None = None,
    force: bool = False,
) -> EvalDraft:
    """Write a suite of rows that nobody trains on, at most 300 of them.

    Args:
        out: the suite to write; its items are written next to it.

    Raises:
        LlmtuneError: no suite can be made of these rows, or a file exists already.
    """
    model = resolve_base(ModelConfig(base=base)) if base else None
    suite, job = draft_suite(data, asked or Asked(), model.tokenizer if model else None)
    note = None
    if model is not None and isinstance(suite, SuiteDraft):
        suite, note = without_unfit_items(suite, model.tokenizer, model.num_positions)
    if isinstance(suite, NoSuite):
        raise LlmtuneError(
            f"{data}: no suite can be made of it: {suite.reason}; a suite is a short YAML file, "
            "see docs/evaluation.md"
        )
    items = out.with_name(f"{out.stem.removesuffix('_suite')}_items.jsonl")
    name = out.stem if is_suite_name(out.stem) else "task"
    text = render_suite(suite, name=name, items_name=items.name, source=data, is_held_out=False)
    _refuse_existing([items, out], force=force)
    atomic_write_texts({items: render_items(suite), out: text})
    return EvalDraft(out, load_suite(out).task, len(suite.items), job, note)


@dataclass(frozen=True)
class CheckedSuite:
    """A suite that was read whole, as a command shows it."""

    suite: str
    file: str
    task: str
    role: str
    metric: str
    items: int
    groups: int
    """Of items that belong together."""
    choices: int
    """That all items have; 0 if each has its own, or none."""

    def describe(self) -> str:
        """Return it as a line."""
        grouped = f" in {self.groups} groups" if self.groups < self.items else ""
        among = f", {self.choices} choices" if self.choices else ""
        return (
            f"{self.file}: {self.suite}, task {self.task}, role {self.role}, {self.items} items"
            f"{grouped}{among}, metric {self.metric}"
        )


def check_suites(names: Sequence[str], base: str | None) -> list[CheckedSuite]:
    """Read suites with their items; with a base also what it cannot be asked.

    Raises:
        LlmtuneError: what is wrong, by file and line.
    """
    suites = [load_suite(name) for name in names]
    if base is not None:
        model = resolve_base(ModelConfig(base=base))
        if problems := find_unfit_items(model.tokenizer, suites, model.num_positions):
            raise LlmtuneError("\n".join(map(str, problems)))
    return [
        CheckedSuite(
            suite=each.name,
            file=str(each.path),
            task=each.task,
            role=each.role,
            metric=each.config.chosen_metric.name,
            items=len(each.items),
            groups=len({item.cluster or item.id for item in each.items}),
            choices=len(each.config.fixed_choices),
        )
        for each in suites
    ]


def _refuse_existing(files: Sequence[Path], *, force: bool) -> None:
    """Refuse to replace a file that is not to be replaced, before anything is written."""
    for path in files:
        if path.exists() and not force:
            raise LlmtuneError(
                f"{path}: exists already; choose another name with --out, or replace it with "
                "--force"
            )
        if not path.parent.is_dir():
            raise LlmtuneError(
                f"{path.parent}: no such directory; make it, or choose another --out"
            )
