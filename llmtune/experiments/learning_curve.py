"""The learning curve: the run's own training on an eighth, a quarter and half of its rows."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtune.config import RunConfig, anchor_paths
from llmtune.data.config import SourceConfig
from llmtune.data.example import ExampleTable
from llmtune.data.files import json_line
from llmtune.data.prepare import prepare_examples
from llmtune.data.problems import RowProblem
from llmtune.data.rows import iter_raw_rows, open_source
from llmtune.errors import LlmtuneError
from llmtune.evaluation.diagnosis.base import write_diagnostic
from llmtune.evaluation.diagnosis.config import DIAGNOSES
from llmtune.evaluation.diagnosis.learning_curve import LearningCurveResult
from llmtune.evaluation.results import ArmResult, arm_result_path, read_arm_result
from llmtune.evaluation.suite import load_suites
from llmtune.evaluation.tasks.base import Suite
from llmtune.io.fingerprint import hash_text
from llmtune.io.manifest import read_manifest
from llmtune.io.run_dir import RunDir, atomic_write_text
from llmtune.runs import pipeline
from llmtune.runs.targets import run_target

Place = tuple[int, str, int]
"""A row by its source's number, its file and its line."""

log = logging.getLogger("llmtune")

CURVE_DIR = "learning_curve"
FRACTIONS = (8, 4, 2)
SMALLEST_SEEDS = 2
ARM = "tuned"


@dataclass(frozen=True)
class Training:
    """One training of the curve: on how many rows, and the run that it is."""

    rows: int
    config: RunConfig


@dataclass(frozen=True)
class CurvePlan:
    """The trainings beside the run's own on `num_rows` rows, and what they cost.

    The seconds are as the run itself took them.
    """

    suite: Suite
    trainings: tuple[Training, ...]
    num_rows: int
    seconds: float

    def line(self) -> str:
        """Return the cost for people."""
        sizes = ", ".join(str(training.rows) for training in self.trainings)
        return (
            f"learning curve on {self.suite.name}: {len(self.trainings)} trainings on {sizes} rows "
            f"beside the run's own on {self.num_rows}; about {self.seconds / 60:.1f} minutes by "
            "the run's own times, finished ones are not repeated"
        )


def measure_learning_curve(
    config: RunConfig, *, suite: str | None = None, target_score: float | None = None
) -> LearningCurveResult:
    """Train on nested parts of the rows that the run saw, score them, fit L(n) = E + A n^-beta.

    The parts are n/8 (with two seeds), n/4 and n/2 rows in the order of a hash, trained for the
    run's epochs, so the schedule is rescaled; n is the run itself. Sub-runs are in
    `run_dir/learning_curve/`; the same call continues with what is missing. The cost is logged
    beforehand, the result also written to `diagnostics/learning_curve.json`.

    Args:
        suite: the name of one of the run's suites; its first target suite by default.
        target_score: a score of the suite; the law of its error says how many rows reach it.

    Raises:
        LlmtuneError: the run is not evaluated, has no such suite, or saw too few rows.
    """
    from llmtune.evaluation.diagnosis.curve_fit import summarize_curve

    plan = plan_learning_curve(config, suite=suite)
    log.info("%s", plan.line())
    trained = []
    for training in plan.trainings:
        pipeline.train(training.config)
        pipeline.evaluate(training.config)
        result = _read_result(training.config.run, plan.suite)
        trained.append((training.rows, training.config.seed, result))
    own = (plan.num_rows, config.seed, _read_result(config.run, plan.suite))
    found = summarize_curve(
        plan.suite,
        [*trained, own],
        target_score=target_score,
        confidence=config.evaluate.confidence,
    )
    write_diagnostic(found, config.run.diagnostics_dir)
    return found


def plan_learning_curve(config: RunConfig, *, suite: str | None = None) -> CurvePlan:
    """Write the parts' rows and return what is to be trained on them.

    Raises:
        LlmtuneError: as for `measure_learning_curve`.
    """
    from llmtune.runs.evaluate import trained_steps

    config = anchor_paths(config)
    chosen = _choose_suite(config, suite)
    full = _read_result(config.run, chosen)
    record = read_manifest(config.run).trained
    steps = trained_steps(config)
    tokenizer = run_target(str(config.run.path), config).dense_base.tokenizer
    table = prepare_examples(config.mixed_data, tokenizer, split="train", seed=config.seed).examples
    is_split = config.data.length_policy == "split"
    places = seen_places(table, steps.seen(table), is_split=is_split)
    rows = order_rows(config.data.train, places)
    if len(rows) < 2 * FRACTIONS[0]:
        raise LlmtuneError(
            f"{config.run.path}: training saw {len(rows)} rows; a learning curve needs at least "
            f"{2 * FRACTIONS[0]}"
        )
    epochs = max(1.0, steps.num_epochs(len(table)))
    trainings = []
    for fraction in FRACTIONS:
        part = rows[: len(rows) // fraction]
        directory = config.run.path / CURVE_DIR / f"rows-{len(part)}"
        sources = write_part(config.data.train, part, directory)
        for extra in range(SMALLEST_SEEDS if fraction == FRACTIONS[0] else 1):
            run_dir = RunDir(directory / f"seed-{config.seed + extra}")
            sub = _sub_config(config, chosen, sources, epochs, run_dir)
            trainings.append(Training(len(part), sub.model_copy(update={"seed": sub.seed + extra})))
    share = sum(training.rows for training in trainings) / len(rows)
    seconds = share * record["seconds"] + len(trainings) * full.seconds
    return CurvePlan(chosen, tuple(trainings), len(rows), seconds)


def _choose_suite(config: RunConfig, name: str | None) -> Suite:
    suites = load_suites(config.evaluate)
    found = [s for s in suites if s.name == name or (name is None and s.role == "target")]
    if not found:
        there = ", ".join(suite.name for suite in suites) or "none"
        wanted = "a target suite" if name is None else f"the suite {name!r}"
        raise LlmtuneError(f"{config.run.path}: needs {wanted}; the run has {there}")
    return found[0]


def _read_result(run: RunDir, suite: Suite) -> ArmResult:
    path = arm_result_path(run.evaluations_dir, suite.name, ARM)
    if not path.is_file():
        raise LlmtuneError(
            f"{run.path}: no result of the tuned model on {suite.name} yet; make it with: "
            f"llmtune run {run.path}"
        )
    return read_arm_result(path)


def _sub_config(
    config: RunConfig,
    suite: Suite,
    sources: Sequence[SourceConfig],
    epochs: float,
    run: RunDir,
) -> RunConfig:
    """Return the run's config on a part of its rows: same epochs, one suite, the tuned model."""
    train = config.train.model_copy(
        update={
            "num_epochs": epochs,
            "max_steps": None,
            "eval_every": None,
            "early_stopping": None,
            "report_to": (),
        }
    )
    data = config.data.model_copy(
        update={"train": list(sources), "evaluation": [], "evaluation_share": 0.0}
    )
    evaluate = config.evaluate.model_copy(
        update={
            "suites": (str(suite.path),),
            "arms": (ARM,),
            "extent": "none",
            "prompts": {},
            "predictions": {},
            "endpoints": {},
            "strengths": (),
        }
        | {diagnosis.name: None for diagnosis in DIAGNOSES if diagnosis.is_evaluated}
        | {"few_shot": config.evaluate.few_shot.model_copy(update={"measure": None})}
    )
    return config.model_copy(
        update={"run_dir": run.path, "train": train, "data": data, "evaluate": evaluate}
    )


@dataclass(frozen=True)
class SeenRow:
    """A row as its file holds it, and how often one epoch shows it."""

    source_index: int
    content: str
    times: int


def seen_places(table: ExampleTable, trained: Sequence[int], *, is_split: bool) -> Counter[Place]:
    """Return how often training saw each row in an epoch.

    Args:
        trained: the examples it saw, by their place.
        is_split: one row may have become several examples; it is then counted once.
    """
    places: Counter[Place] = Counter()
    files = table.columns["files"]
    for index in trained:
        file = table.file_names[files[index]]
        line = int(table.columns["lines"][index])
        places[int(table.source_indices[index]), file, line] += 1
    return Counter(dict.fromkeys(places, 1)) if is_split else places


def order_rows(sources: Sequence[SourceConfig], places: Counter[Place]) -> list[SeenRow]:
    """Read the rows at `places` and order them by a hash of their content: any prefix is nested.

    Raises:
        LlmtuneError: a source cannot be read any more.
    """
    rows = []
    for index, source in enumerate(sources):
        for file, parsed in iter_raw_rows(source):
            if isinstance(parsed, RowProblem):
                continue
            line, values = parsed
            if times := places[index, file, line]:
                rows.append(SeenRow(index, json_line(values), times))
    return sorted(rows, key=lambda row: (hash_text(row.content), row.source_index))


def write_part(
    sources: Sequence[SourceConfig], rows: Sequence[SeenRow], directory: Path
) -> list[SourceConfig]:
    """Write rows as one JSONL a source and return the sources that name them, read whole.

    What mixing did is in the rows: one that an epoch showed twice is there twice.
    """
    written = []
    for index, source in enumerate(sources):
        lines = [row.content for row in rows if row.source_index == index for _ in range(row.times)]
        if not lines:
            continue
        path = directory / f"source-{index}.jsonl"
        atomic_write_text(path, "\n".join(lines) + "\n")
        written.append(
            SourceConfig(
                path=str(path),
                format=open_source(source).format.format.name,
                columns=source.columns,
                render=source.render,
            )
        )
    return written
