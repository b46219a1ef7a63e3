"""What a stage is made from: its rows, its suites and its files."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmtune.adapters.manifest import adapter_fingerprint
from llmtune.config import RunConfig
from llmtune.data.config import DataConfig, SourceConfig
from llmtune.data.prepare import PreparedData, prepare_examples
from llmtune.errors import LlmtuneError
from llmtune.evaluation.config import DIAGNOSES, EXTENTS, Extent
from llmtune.evaluation.results import arm_result_path
from llmtune.evaluation.suite import Suite, load_suite
from llmtune.io.fingerprint import hash_file
from llmtune.io.run_dir import RunDir
from llmtune.models.identity import base_fingerprint
from llmtune.models.resolve import BaseSource
from llmtune.models.tokenizer import load_tokenizer
from llmtune.runs.stage_inputs import complete_inputs

log = logging.getLogger("llmtune")


def load_suites(config: RunConfig) -> list[Suite]:
    """Read the run's suites with all their items; what is wrong in them is found here."""
    return [
        load_suite(name, seed=config.evaluate.seed, limit=config.evaluate.limit)
        for name in config.evaluate.suites
    ]


def prepare_data(config: RunConfig, source: BaseSource) -> dict[str, PreparedData]:
    """Tokenize the rows of both splits, and those that `protect` holds the model to.

    Raises:
        LlmtuneError: rows cannot be used, or stand in both splits.
    """
    tokenizer = load_tokenizer(source.dir, chat_template=config.model.chat_template)
    prepared = {
        "train": prepare_examples(config.mixed_data, tokenizer, split="train", seed=config.seed),
        "evaluation": prepare_examples(
            config.data, tokenizer, split="evaluation", seed=config.seed
        ),
    }
    penalty = config.protect.kl_to_base
    if penalty is not None and isinstance(penalty.source, SourceConfig):
        general = DataConfig(train=[penalty.source], cache=config.data.cache)
        prepared["protect"] = prepare_examples(general, tokenizer, split="train", seed=config.seed)
    for name, data in prepared.items():
        for line in data.report.lines():
            log.info("%s", line.replace(f"{data.report.split}:", f"{name} data:", 1))
    return prepared


def refuse_other_inputs(run: RunDir, record: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
    """Refuse to go on with an adapter that was trained on another base, rows or start.

    Raises:
        LlmtuneError: naming which of them differ.
    """
    known = record.get("inputs", inputs)
    other = [name for name in inputs if known.get(name) != inputs[name]]
    if other:
        raise LlmtuneError(
            f"{run.path}: its adapter was trained on another {' and '.join(other)} (compared by "
            "content); choose another run_dir, or redo this one with --force"
        )


def trained_adapter(config: RunConfig) -> str:
    """Return the fingerprint of the run's adapter.

    Raises:
        LlmtuneError: nothing was trained yet.
    """
    if not config.run.adapter_dir.is_dir():
        raise LlmtuneError(
            f"{config.run.path}: has no trained adapter yet; make it with: llmtune train CONFIG"
        )
    return adapter_fingerprint(config.run.adapter_dir)


def evaluate_inputs(
    config: RunConfig, suites: Sequence[Suite], source: BaseSource, *, adapter: str, merge: Any
) -> dict[str, Any]:
    """Return what decides the scores, except the extent; `merge` is that stage's fingerprint."""
    return {
        "adapter": adapter,
        "base": base_fingerprint(source.dir),
        "merge": merge,
        "evaluate": config.evaluate.measuring_knobs(),
        "suites": {suite.name: suite.fingerprint for suite in suites},
        "files": {str(path): hash_file(path) for path in _evaluation_files(config)},
    }


def kept_extent(record: Mapping[str, Any], inputs: Mapping[str, Any], config: RunConfig) -> Extent:
    """Return the larger of the extent asked for and the one measured before on equal inputs."""
    asked = config.evaluate.extent
    known = complete_inputs(record.get("inputs") or {})
    measured = known.get("extent")
    is_same = record.get("finished") and all(known.get(key) == inputs[key] for key in inputs)
    if measured not in EXTENTS or not is_same:
        return asked
    return max(asked, measured, key=EXTENTS.index)


def evaluation_results(
    config: RunConfig, suites: Sequence[Suite], made: Mapping[str, Any]
) -> Iterator[Path]:
    """Yield every file that the evaluate stage leaves; `made` is its result, where it has one."""
    run, knobs = config.run, config.evaluate
    for suite in suites:
        arms = {arm for arm in knobs.arms if arm != "merged" or suite.role == "target"}
        for arm in arms | set(made.get("suites", {}).get(suite.name, {})):
            yield arm_result_path(run.evaluations_dir, suite.name, arm)
    for name in DIAGNOSES:
        if knobs.measures(name) and name not in made.get("left_out", {}):
            yield run.diagnostics_dir / f"{name}.json"


def _evaluation_files(config: RunConfig) -> list[Path]:
    """Return the user's prompt and prediction files."""
    return [*config.evaluate.prompts.values(), *config.evaluate.predictions.values()]
