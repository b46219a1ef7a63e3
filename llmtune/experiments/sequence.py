"""Tasks learned one after another on one adapter: what each keeps of those before it."""

import logging
from collections.abc import Sequence
from pathlib import Path

from llmtune.adapters.manifest import adapter_fingerprint
from llmtune.config import RunConfig
from llmtune.errors import LlmtuneError
from llmtune.evaluation.suite import load_suites
from llmtune.evaluation.tasks.base import Suite
from llmtune.io.run_dir import SEQUENCE_FILE, atomic_write_json
from llmtune.reporting.sections.sequence import SequenceResult
from llmtune.runs import pipeline

log = logging.getLogger("llmtune")


def train_sequence(configs: Sequence[RunConfig], out_dir: Path) -> SequenceResult:
    """Train every config on the adapter that the one before it left, and score all tasks each time.

    The runs are in `out_dir/1-NAME`, `2-NAME`, ..., after the configs' own run directories; what
    is finished is skipped, so the same call continues after a stop. `sequence.json` holds the
    result, and every run has its report, which shows it.

    Raises:
        LlmtuneError: fewer than two configs, other bases, or a task without a target suite whose
            metric is better when higher.
    """
    _check(configs)
    suites = [_target_suites(config) for config in configs]
    every = tuple(dict.fromkeys(name for names in suites for name in names))
    steps: list[RunConfig] = []
    rows, untrained = [], None
    start: Path | None = None
    for number, config in enumerate(configs, start=1):
        step = _step(config, out_dir / f"{number}-{config.run_dir.name}", every, start)
        log.info("sequence: task %d of %d, %s", number, len(configs), config.run_dir.name)
        pipeline.train(step)
        scores = pipeline.evaluate(step)
        tuned = {name: suite["arms"]["tuned"]["mean"] for name, suite in scores.items()}
        base = {name: suite["arms"]["base"]["mean"] for name, suite in scores.items()}
        names = [[suite.name for suite in group.values()] for group in suites]
        rows.append(tuple(_mean([tuned[name] for name in group]) for group in names))
        untrained = untrained or tuple(_mean([base[name] for name in group]) for group in names)
        start = step.run.adapter_dir.absolute()
        steps.append(step)
    assert untrained is not None, "there are at least two tasks"
    result = SequenceResult(
        tasks=tuple(config.run_dir.name for config in configs),
        matrix=tuple(rows),
        untrained=untrained,
        runs=tuple(step.run_dir.name for step in steps),
        adapters=tuple(adapter_fingerprint(step.run.adapter_dir) for step in steps),
    )
    atomic_write_json(out_dir / SEQUENCE_FILE, result.as_json())
    for step in steps:
        pipeline.report(step.run_dir)
    return result


def _check(configs: Sequence[RunConfig]) -> None:
    if len(configs) < 2:
        raise LlmtuneError(f"a sequence needs at least two configs, not {len(configs)}")
    first = configs[0]
    for config in configs[1:]:
        if config.model != first.model:
            raise LlmtuneError(
                f"{config.run_dir}: its model section differs from that of {first.run_dir}; all "
                "tasks of a sequence share one base, loaded in one way"
            )
    given = [str(config.run_dir) for config in configs if config.adapter.init_from is not None]
    if given:
        raise LlmtuneError(
            f"{given[0]}: adapter.init_from is set, but a sequence hands each adapter on itself"
        )
    names = [config.run_dir.name for config in configs]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise LlmtuneError(
            f"two tasks have a run_dir named {repeated[0]!r}, which names the task: give one "
            "a different run_dir"
        )


def _target_suites(config: RunConfig) -> dict[str, Suite]:
    """Return the suites of a task: its config's target suites, by what the config calls them."""
    loaded = zip(config.evaluate.suites, load_suites(config.evaluate), strict=True)
    found = {name: suite for name, suite in loaded if suite.role == "target"}
    bad = [s.name for s in found.values() if not s.config.chosen_metric.higher_is_better]
    if not found or bad:
        raise LlmtuneError(
            f"{config.run_dir}: a task needs a target suite (role: target) whose metric is better "
            f"when higher{f', and {bad[0]} is not' if bad else ', and evaluate.suites has none'}"
        )
    return found


def _step(
    config: RunConfig, run_dir: Path, suites: tuple[str, ...], start: Path | None
) -> RunConfig:
    return config.model_copy(
        update={
            "run_dir": run_dir,
            "adapter": config.adapter.model_copy(update={"init_from": start}),
            "evaluate": config.evaluate.model_copy(
                update={"suites": suites, "arms": ("base", "tuned"), "extent": "none"}
            ),
        }
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
