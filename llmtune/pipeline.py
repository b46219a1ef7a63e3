"""The stages of a run in order; each leaves an artifact on disk and can be rerun alone."""

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.adapters.manifest import adapter_fingerprint
from llmtune.config import RunConfig
from llmtune.data.example import IGNORE_INDEX
from llmtune.data.prepare import PreparedData, prepare_examples
from llmtune.errors import LlmtuneError
from llmtune.fingerprint import hash_json
from llmtune.ledger import Ledger, open_ledger
from llmtune.models.identity import base_fingerprint
from llmtune.models.resolve import BaseSource, resolve_base
from llmtune.models.tokenizer import load_tokenizer
from llmtune.run_dir import RunDir

if TYPE_CHECKING:
    from llmtune.evaluation.scores import Scores
    from llmtune.evaluation.suite import Suite
    from llmtune.reporting.report import Report
    from llmtune.targets import Target

log = logging.getLogger("llmtune")

TRAIN_SECTIONS = ("seed", "model", "adapter", "data", "train")
"""The parts of a config that decide the adapter; with others it is another run."""

FREE_KEYS = {
    "train": ("report_to", "resume", "log_every", "save_every", "keep_checkpoints"),
    "data": ("cache",),
}
"""Keys in those parts that do not change the adapter and may differ between two calls."""


def run(config: RunConfig, *, force: bool = False) -> "Report":
    """Train, merge, evaluate and report; what is finished on unchanged inputs is skipped.

    With `force` everything is done again. After a failure the same call continues where it failed.

    Raises:
        LlmtuneError: the input is wrong; nothing was lost.
        RunInterrupted: stopped by Ctrl-C or SIGTERM after saving a checkpoint.
    """
    load_suites(config)
    train(config, force=force)
    merge(config)
    evaluate(config)
    return report(config.run_dir)


def train(config: RunConfig, *, force: bool = False) -> Mapping[str, Any]:
    """Fit an adapter and save it in `run_dir/adapter`; go on from a checkpoint if there is one.

    Everything that can be wrong with the input is found before the base model is loaded.

    Returns:
        What the manifest records of the stage: steps, tokens, trained_tokens, seconds, peak_bytes,
        final_loss, adapter_bytes, choices and more.
    """
    from llmtune.training.reporters import check_reporters

    check_reporters(config.train.report_to)
    source = resolve_base(config.model)
    data = _prepare_data(config, source)
    identity = _identity(config, source, data)

    def work() -> Mapping[str, Any]:
        from llmtune.stages.train import TrainInputs, run_train_stage

        return run_train_stage(
            config, TrainInputs(source, data["train"], data["evaluation"], identity)
        )

    with _open(config, force=force) as ledger:
        ledger.describe(
            base={**source.as_dict(), "fingerprint": identity["base"]},
            data={name: prepared.report.to_json() for name, prepared in data.items()},
        )
        result = ledger.stage("train", identity, work)
        precision = {"dtype": result["dtype"], "quantization": config.model.quantization_method}
        ledger.describe(base={**ledger.manifest.base, **precision})
        return result


def merge(config: RunConfig, *, force: bool = False) -> Mapping[str, Any]:
    """Add the run's adapter into its 16-bit base, and check it against the live adapter.

    Raises:
        CheckFailed: the merged model differs from base + adapter; nothing is left in `merged/`.
    """
    source = resolve_base(config.model)
    adapter = _trained_adapter(config)

    def work() -> Mapping[str, Any]:
        from llmtune.stages.merge import MergeRequest, run_merge_stage

        return run_merge_stage(
            MergeRequest(
                model=config.model,
                source=source,
                adapter_dir=config.run.adapter_dir,
                out_dir=config.run.merged_dir,
                strength=config.merge.strength,
                max_kl=config.merge.max_kl,
                sequences=_held_out(config, source),
                suites=load_suites(config),
            )
        )

    with _open(config) as ledger:
        inputs = {
            "adapter": adapter,
            "base": base_fingerprint(source.dir),
            "merge": config.merge.model_dump(mode="json"),
        }
        is_gone = not config.run.merged_dir.is_dir()
        return ledger.stage("merge", inputs, work, force=force or is_gone)


def merge_adapter_dir(
    target: "Target", out_dir: Path, *, strength: float = 1.0, force: bool = False
) -> Mapping[str, Any]:
    """Merge an adapter that belongs to no run, or a run's into another place, and check it.

    Raises:
        LlmtuneError: there is no adapter, or `out_dir` exists and `force` is not given.
        CheckFailed: the merged model differs from base + adapter; `out_dir` is not made.
    """
    from llmtune.merging.config import MergeConfig

    if target.adapter_dir is None:
        raise LlmtuneError(f"{target.name}: has no adapter to merge")
    if out_dir.exists() and not force:
        raise LlmtuneError(f"{out_dir}: exists already; choose another --out, or give --force")
    from llmtune.stages.merge import MergeRequest, run_merge_stage

    knobs = target.config.merge if target.config else MergeConfig()
    return run_merge_stage(
        MergeRequest(
            model=target.model,
            source=resolve_base(target.model),
            adapter_dir=target.adapter_dir,
            out_dir=out_dir,
            strength=strength,
            max_kl=knobs.max_kl,
        )
    )


def evaluate(config: RunConfig, *, force: bool = False) -> "Scores":
    """Score base and tuned model on every suite, and the merged model on the target suites.

    The base is the same loaded model with its adapter switched off. Suites that are finished for
    the same model and recipe are read, not scored again.

    Returns:
        For each suite by name: n, metric, majority, the arms' means, and under `comparison` the
        difference of tuned and base with its interval.
    """
    from llmtune.evaluation.compare import Resampling
    from llmtune.evaluation.scores import read_scores

    suites = load_suites(config)
    source = resolve_base(config.model)
    adapter = _trained_adapter(config)

    def work() -> Mapping[str, Any]:
        from llmtune.stages.evaluate import run_evaluate_stage

        return run_evaluate_stage(config, suites)

    with _open(config) as ledger:
        inputs = {
            "adapter": adapter,
            "base": base_fingerprint(source.dir),
            "merge": ledger.manifest.stages.get("merge", {}).get("fingerprint"),
            "evaluate": config.evaluate.model_dump(mode="json"),
            "suites": {suite.name: suite.fingerprint for suite in suites},
        }
        ledger.stage("evaluate", inputs, work, force=force)
    chosen = config.evaluate
    return read_scores(
        config.run.evaluations_dir,
        [suite.name for suite in suites],
        Resampling(chosen.confidence, chosen.bootstrap_samples, chosen.seed),
    )


def report(run_dir: str | Path) -> "Report":
    """Build `report.json` and `report.html` from what the run left on disk."""
    from llmtune.reporting.transfer import build_report, write_report

    run = RunDir(Path(run_dir))
    built = build_report(run)
    write_report(built, run)
    return built


def load_suites(config: RunConfig) -> "list[Suite]":
    """Read the run's suites with all their items; what is wrong in them is found here."""
    from llmtune.evaluation.suite import load_suite

    return [
        load_suite(name, seed=config.evaluate.seed, limit=config.evaluate.limit)
        for name in config.evaluate.suites
    ]


def _held_out(config: RunConfig, source: BaseSource) -> list[list[int]]:
    """Return the evaluation rows up to the token before the last trained one.

    What a template writes behind an answer's end is never generated, so it is not compared.
    """
    tokenizer = load_tokenizer(source.dir, chat_template=config.model.chat_template)
    held_out = prepare_examples(config.data, tokenizer, split="evaluation", seed=config.seed)
    rows = []
    for index in range(len(held_out.examples)):
        example = held_out.examples[index]
        trained = [i for i, label in enumerate(example.labels) if label != IGNORE_INDEX]
        rows.append(list(example.input_ids[: trained[-1]]))
    return rows


def _prepare_data(config: RunConfig, source: BaseSource) -> dict[str, PreparedData]:
    tokenizer = load_tokenizer(source.dir, chat_template=config.model.chat_template)
    prepared = {
        "train": prepare_examples(config.data, tokenizer, split="train", seed=config.seed),
        "evaluation": prepare_examples(
            config.data, tokenizer, split="evaluation", seed=config.seed
        ),
    }
    for name, data in prepared.items():
        for line in data.report.lines():
            log.info("%s data: %s", name, line)
    return prepared


def _identity(
    config: RunConfig, source: BaseSource, data: Mapping[str, PreparedData]
) -> dict[str, str]:
    """Return the hashes of what decides the adapter: base, rows and order, and the knobs."""
    return {
        "base": base_fingerprint(source.dir),
        "data": hash_json({name: prepared.fingerprint for name, prepared in data.items()}),
        "config": hash_json(_deciding_sections(config)),
    }


def _deciding_sections(config: RunConfig) -> dict[str, Any]:
    values = config.model_dump(mode="json")
    return {
        section: {
            key: value
            for key, value in values[section].items()
            if key not in FREE_KEYS.get(section, ())
        }
        if isinstance(values[section], dict)
        else values[section]
        for section in TRAIN_SECTIONS
    }


def _open(config: RunConfig, *, force: bool = False) -> AbstractContextManager[Ledger]:
    return open_ledger(
        config.run,
        config.model_dump(mode="json"),
        deciding=_deciding_sections(config),
        force=force,
    )


def _trained_adapter(config: RunConfig) -> str:
    if not config.run.adapter_dir.is_dir():
        raise LlmtuneError(
            f"{config.run.path}: has no trained adapter yet; make it with: llmtune train CONFIG"
        )
    return adapter_fingerprint(config.run.adapter_dir)
