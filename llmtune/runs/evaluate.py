"""The evaluate stage: the main arms on the run's suites, and the diagnoses.

Beside it, the scores of any target on suites or on tasks of lm-evaluation-harness.
"""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from socket import gethostname
from typing import TYPE_CHECKING, Any, TypedDict

from pydantic import ValidationError

from llmtune.adapters.manifest import has_strengths
from llmtune.config import RunConfig
from llmtune.data.config import DataConfig
from llmtune.errors import LlmtuneError
from llmtune.evaluation.config import EvaluateConfig
from llmtune.evaluation.diagnosis.base import EXTENTS, Extent
from llmtune.evaluation.diagnosis.config import DIAGNOSES
from llmtune.evaluation.results import arm_result_path
from llmtune.evaluation.suite import load_suites
from llmtune.evaluation.tasks.base import Suite
from llmtune.io.fingerprint import JsonObject, JsonValue, hash_file
from llmtune.io.manifest import EvaluateRecord, Manifest, StageRecord, read_manifest
from llmtune.io.processes import LEND_TIMEOUT, Processes, joined_processes
from llmtune.models.config import ModelConfig
from llmtune.models.resolve import Loadable
from llmtune.runs.merge import MergeStage
from llmtune.runs.stage import Stage
from llmtune.runs.targets import resolve_target

if TYPE_CHECKING:
    from torch.nn import Parameter

    from llmtune.evaluation.diagnosis.subject import TrainedSteps
    from llmtune.evaluation.scores import Scores
    from llmtune.evaluation.session import EvaluationRequest
    from llmtune.models.checkpoint import Checkpoint
    from llmtune.models.live import LiveModel

log = logging.getLogger("llmtune")

LENT = "each of {} processes has a part of every layer, and the first one scores"


class EvaluateStage(Stage[EvaluateRecord]):
    """Score the arms on the suites and measure what `evaluate.extent` asks for beside them.

    What an earlier call measured to a larger extent on the same inputs stays part of the run.
    """

    name = "evaluate"

    @cached_property
    def suites(self) -> list[Suite]:
        """The run's suites with all their items."""
        return load_suites(self.config.evaluate)

    def check(self) -> None:
        """Read the suites and the user's files, and require the models that are to be scored."""
        config = self.config
        check_evaluation_files(config.evaluate, self.suites)
        self.source  # noqa: B018 (raises if the base cannot be found)
        self.check_models()
        check_item_lengths(self.source, self.suites)

    def check_models(self) -> None:
        """Require the models that are to be scored besides the base."""
        config = self.config
        self.adapter  # noqa: B018 (raises without an adapter)
        if "merged" in config.evaluate.arms:
            problem = MergeStage(config, opened=self.source).why_unusable(read_manifest(config.run))
            if problem is not None:
                raise LlmtuneError(
                    f"{problem}, or leave it out with evaluate.arms='[original, base, tuned]'"
                )

    def inputs(self, manifest: Manifest) -> JsonObject:
        """Return what decides the scores: models, suites, files, knobs and the extent."""
        knobs = self.config.evaluate
        files = [*knobs.prompts.values(), *knobs.predictions.values()]
        inputs: dict[str, JsonValue] = {
            **self.models(manifest),
            "evaluate": knobs.measuring_knobs(),
            "suites": {suite.name: suite.fingerprint for suite in self.suites},
            "files": {str(path): hash_file(path) for path in files},
        }
        record = manifest.record(self.name)
        return inputs | {"extent": self._kept_extent(record, inputs)}

    def models(self, manifest: Manifest) -> dict[str, str | None]:
        """Return the fingerprints of the models that are scored."""
        return {
            "adapter": self.adapter,
            "base": self.source.fingerprint,
            "merge": manifest.record("merge").get("fingerprint"),
        }

    def _kept_extent(self, record: StageRecord, inputs: JsonObject) -> Extent:
        """Return the larger of the extent asked for and the one measured on equal inputs."""
        asked = self.config.evaluate.extent
        known = self.complete(record.get("inputs") or {})
        measured = known.get("extent")
        is_same = record.get("finished") and all(known.get(key) == inputs[key] for key in inputs)
        if measured not in EXTENTS or not is_same:
            return asked
        return max(asked, measured, key=EXTENTS.index)

    def complete(self, inputs: Mapping[str, Any]) -> JsonObject:
        """Return recorded inputs with the knobs that came later, as defaults."""
        try:
            knobs = EvaluateConfig(**inputs["evaluate"]).measuring_knobs()
        except (KeyError, TypeError, ValidationError):
            return inputs  # of a version whose knobs are no longer there: other inputs
        return {**inputs, "evaluate": knobs}

    def outputs(self, record: StageRecord) -> Iterator[Path]:
        """Yield the results of every arm and diagnosis."""
        run, knobs = self.config.run, self._knobs(record.get("inputs") or {})
        made = record.get("result") or {}
        left_out = made.get("left_out", {})
        for suite in self.suites:
            arms = {arm for arm in knobs.arms if arm not in left_out}
            for arm in arms | set(made.get("suites", {}).get(suite.name, {})):
                yield arm_result_path(run.evaluations_dir, suite.name, arm)
        for diagnosis in DIAGNOSES:
            is_made = diagnosis.is_evaluated and knobs.measures(diagnosis.name)
            if is_made and diagnosis.name not in left_out:
                yield run.diagnostics_dir / diagnosis.result.FILE_NAME

    def run(self, inputs: JsonObject) -> EvaluateRecord:
        """Measure what is missing; what is finished for the same model and recipe is read."""
        from llmtune.evaluation.evaluate import evaluate_run

        seconds = read_manifest(self.config.run).trained.get("seconds")
        request, processes = self.request(inputs), joined_processes()
        if not processes.are_many:
            return evaluate_run(request, seconds)
        with processes.ordering(self._order()), self._shared(request, processes) as shared:
            return evaluate_run(shared, seconds)

    @contextmanager
    def _shared(
        self, request: "EvaluationRequest", processes: Processes
    ) -> Iterator["EvaluationRequest"]:
        """Let the others score a share of the items, or lend their parts of a sharded base."""
        if self.config.train.shard == "none":
            from llmtune.evaluation.sharing import ItemSharing

            sharing = ItemSharing(processes)
            yield dataclasses.replace(request, sharing=sharing)
            sharing.end()
            return
        from llmtune.evaluation.lending import Borrowing

        with self._connected(processes):
            borrowing = Borrowing(processes, partial(self._load_part, processes))
            log.info("evaluate: %s", LENT.format(processes.world_size))
            yield dataclasses.replace(request, load=borrowing.load, num_parts=processes.world_size)
            borrowing.end()

    @contextmanager
    def _connected(self, processes: Processes) -> Iterator[None]:
        from llmtune.models.hardware import choose_device

        device = choose_device(self.config.model.device)
        with processes.connected(device.type, LEND_TIMEOUT), processes.watching():
            yield

    def _load_part(self, processes: Processes, arm: str) -> "LiveModel":
        """Load a model of which every process has a part of each layer."""
        from llmtune.scoring.live import load_target
        from llmtune.training.sharding import shard_base

        def cut(live: "LiveModel", base: "Sequence[Parameter]") -> None:
            model: Any = live.model.requires_grad_(False)
            shard_base(model, live.device, processes, base)

        return load_target(self._target(self.config.model), arm, cut)

    def _order(self) -> "EvaluateOrder":
        return {
            "stage": self.name,
            "config": self.config.model_dump(mode="json"),
            "date": self.source.template_date,
            "suites": {suite.name: suite.fingerprint for suite in self.suites},
        }

    def follow(self, order: "EvaluateOrder", processes: Processes) -> None:
        """Score this process's share of the items of every arm.

        Raises:
            LlmtuneError: this process has other items or models than the first one.
        """
        from llmtune.evaluation.prompt_file import read_prompt_file
        from llmtune.evaluation.session import TUNED, dequantize_once
        from llmtune.evaluation.sharing import help_scoring, other_model
        from llmtune.scoring.live import load_target

        if self.config.train.shard == "full":
            from llmtune.evaluation.lending import lend_parts

            with self._connected(processes):
                lend_parts(processes, partial(self._load_part, processes))
            return
        config = self.config
        written = {TUNED: config.run.adapter_dir, "merged": config.run.merged_dir}
        if {suite.name: suite.fingerprint for suite in self.suites} != order["suites"]:
            raise LlmtuneError(
                f"on {gethostname()} the suites differ from what the first process has (compared "
                "by content): all machines need the same files"
            )

        def load(name: str, dtype: str) -> "LiveModel":
            if name in written and not written[name].is_dir():
                raise other_model(name)
            model = config.model.model_copy(update={"dtype": dtype})
            live = load_target(self._target(model), name)
            if name == TUNED:
                dequantize_once(live)
            return live

        prompts = {
            name: read_prompt_file(name, path) for name, path in config.evaluate.prompts.items()
        }
        help_scoring(processes, self.suites, prompts, load)

    def request(self, inputs: Mapping[str, Any]) -> "EvaluationRequest":
        """Return what is evaluated."""
        from llmtune.evaluation.session import EvaluationRequest
        from llmtune.scoring.live import load_target

        config = self.config
        run = config.run
        target = self._target(config.model)
        return EvaluationRequest(
            knobs=self._knobs(inputs),
            run=run,
            base=self.source,
            suites=tuple(self.suites),
            data=config.data,
            mixed_data=config.mixed_data,
            trained=trained_steps(config),
            load=lambda arm: load_target(target, arm),
            force=self.force,
            why_no_strength=_why_no_strength(target.adapter_dir),
            keeps_base=config.evaluate.reuse_base and not config.model.trust_remote_code,
        )

    def _target(self, model: ModelConfig) -> Loadable:
        run = self.config.run
        return Loadable(
            str(run.path),
            model,
            run.adapter_dir if run.adapter_dir.is_dir() else None,
            run.merged_dir,
            template_date=self.source.template_date,
            opened=self.source,
            keeps_quantized=False,
        )

    def _knobs(self, inputs: Mapping[str, Any]) -> EvaluateConfig:
        """Return the config's section to the extent that these inputs name."""
        knobs = self.config.evaluate
        return knobs.model_copy(update={"extent": inputs.get("extent", knobs.extent)})

    def scores(self) -> "Scores":
        """Read the arms' scores, with the difference of the compared two and its interval."""
        from llmtune.evaluation.scores import read_scores
        from llmtune.evaluation.stats import Resampling

        knobs = self.config.evaluate
        return read_scores(
            self.config.run.evaluations_dir,
            [suite.name for suite in self.suites],
            Resampling(knobs.confidence, knobs.bootstrap_samples, knobs.seed),
            arms=knobs.arms,
        )


class EvaluateOrder(TypedDict):
    """What the first process tells the others of an evaluation, as JSON values."""

    stage: str
    config: JsonObject
    date: str | None
    suites: dict[str, str]


def _why_no_strength(adapter_dir: Path | None) -> str | None:
    """Return why an adapter cannot be weakened; None if it can, or there is none."""
    if adapter_dir is None or has_strengths(adapter_dir):
        return None
    return "the adapter holds biases, single token rows or a changed base, which have no strength"


def suite_names(knobs: EvaluateConfig) -> list[str]:
    """Return the names of the suites, for what refers to them."""
    return [suite.name for suite in load_suites(knobs)]


def check_evaluation_files(knobs: EvaluateConfig, suites: Sequence[Suite]) -> None:
    """Read the user's prompt and prediction files, and hold them and endpoints against the suites.

    Raises:
        LlmtuneError: one is missing or cannot serve.
    """
    from llmtune.evaluation.few_shot import takes_demonstrations
    from llmtune.evaluation.predictions import read_predictions
    from llmtune.evaluation.prompt_file import read_prompt_file

    for name, path in knobs.prompts.items():
        prompt = read_prompt_file(name, path)
        for suite in filter(takes_demonstrations, suites):
            prompt.ask(suite)
    for name, path in knobs.predictions.items():
        predictions = read_predictions(name, path)
        predictions.texts_by_suite([suite for suite in suites if suite.asks])
    if knobs.endpoints:
        from llmtune.evaluation.endpoints import check_endpoint

        twice = sorted(knobs.endpoints.keys() & knobs.predictions.keys())
        if twice:
            raise LlmtuneError(
                f"evaluate.endpoints.{twice[0]}: evaluate.predictions has that name too; rename one"
            )
        for name, config in knobs.endpoints.items():
            check_endpoint(name, config, suites)
    for diagnosis in DIAGNOSES:
        diagnosis.check(knobs, suites)


def check_item_lengths(base: "Checkpoint", suites: Sequence[Suite]) -> None:
    """Refuse items that the model has too few positions for, or that hold control tokens.

    Raises:
        LlmtuneError: names them by file and line.
    """
    if not suites:
        return
    from llmtune.evaluation.lengths import refuse_unfit_items

    refuse_unfit_items(base.tokenizer, suites, base.num_positions)


def warn_of_leaks(knobs: EvaluateConfig, data: DataConfig, suites: Sequence[Suite]) -> None:
    """Log what the diagnoses that will be made can say before anything is trained."""
    for diagnosis in DIAGNOSES:
        if diagnosis.extent is not None and knobs.measures(diagnosis.name):
            for warning in diagnosis.foresee(data, suites):
                log.warning("%s", warning)


def trained_steps(config: RunConfig) -> "TrainedSteps":
    """Return how much the run trained, by its manifest, and on which rows."""
    from llmtune.evaluation.diagnosis.subject import TrainedSteps

    trained = read_manifest(config.run).trained
    return TrainedSteps(
        trained.get("steps", 0),
        config.train.batch_size,
        config.seed,
        num_sources=len(config.data.train),
        num_added=(trained.get("protect") or {}).get("replayed_rows", 0),
    )


def score(
    name: str, overrides: Sequence[str], suites: Sequence[str], *, rescored: bool = False
) -> "Scores":
    """Score a target's arms on `suites`; nothing is kept, a run's own results stay as they are.

    If the target is a run, its `evaluate` section says how items are chosen and intervals made;
    with `rescored` the answers that it keeps are scored, and no model is loaded.

    Raises:
        LlmtuneError: a suite or the target cannot be read, or they do not fit each other.
    """
    from llmtune.serving.score import rescore_kept, score_target

    target = resolve_target(name, overrides)
    if rescored:
        if target.results_dir is None:
            raise LlmtuneError(f"{name}: keeps no answers; --rescore is for a run")
        return rescore_kept(target.results_dir, suites, target.evaluate)
    return score_target(target, suites, target.evaluate)


def score_lm_eval(  # noqa: PLR0913 (one argument an option of the harness)
    name: str,
    overrides: Sequence[str],
    tasks: tuple[str, ...],
    *,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    chat_template: bool = False,
    batch_size: int = 8,
    arms: Sequence[str] = (),
) -> "Scores":
    """Run tasks of lm-evaluation-harness on a target; a run keeps them, its next report shows them.

    Args:
        arms: base, tuned, merged; empty is base and tuned, or the model alone.

    Raises:
        LlmtuneError: the harness is not installed, the target has no such arm, or a task cannot
            be run.
    """
    from llmtune.evaluation.lm_eval import LmEvalSettings
    from llmtune.serving import score as serving

    target = resolve_target(name, overrides)
    settings = LmEvalSettings(tasks, include_path, num_fewshot, limit, chat_template, batch_size)
    results_dir = target.results_dir
    return serving.score_lm_eval(
        target, settings, target.evaluate, arms=arms, results_dir=results_dir
    )
