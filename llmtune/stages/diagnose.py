"""The diagnoses of a run as measures of its evaluation: one file each in `diagnostics/`."""

import contextlib
import logging
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import TypeVar

from llmtune.adapters.strength import adapter_strength
from llmtune.data.prepare import prepare_examples
from llmtune.errors import LlmtuneError
from llmtune.evaluation.diagnosis import divergence, memorisation, probe, shift, stops
from llmtune.evaluation.diagnosis.contamination import measure_contamination
from llmtune.evaluation.diagnosis.results import (
    ContaminationResult,
    Diagnostic,
    DivergenceResult,
    MemorisationResult,
    ProbeResult,
    ShiftResult,
    StopsResult,
    read_diagnostic,
    write_diagnostic,
)
from llmtune.evaluation.diagnosis.rows import read_row_texts
from llmtune.evaluation.diagnosis.subject import (
    DiagnosisSettings,
    Subject,
    asking_suites,
    fixed_choice_suites,
    general_sequences,
    general_texts,
    target_prompts,
)
from llmtune.evaluation.items import SuiteItem
from llmtune.evaluation.results import ArmResult, arm_result_path, read_arm_result
from llmtune.evaluation.run import Progress
from llmtune.manifest import read_manifest
from llmtune.stages.measures import Evaluation, Plan, Work
from llmtune.training.batch import EpochSampler

log = logging.getLogger("llmtune")

DiagnosticT = TypeVar("DiagnosticT", bound=Diagnostic)


def plan_divergence(evaluation: Evaluation) -> list[Work]:
    """KL and changed first choices on general text and on the task's prompts."""
    strengths = evaluation.config.evaluate.measured_strengths
    model = evaluation.live.model

    def measure(known: DivergenceResult | None) -> DivergenceResult:
        variants = {each: partial(adapter_strength, model, each) for each in strengths}
        subject, settings = evaluation_subject(evaluation), diagnosis_settings(evaluation)
        return divergence.diagnose_divergence(subject, settings, strengths=variants, known=known)

    texts = [
        *general_sequences(
            evaluation_subject(evaluation),
            limit=divergence.GENERAL_TEXTS,
            max_tokens=divergence.GENERAL_TOKENS,
            seed=evaluation.config.evaluate.seed,
        ),
        *_prompts(evaluation, divergence.TARGET_PROMPTS),
    ]
    passes = 2 + len(strengths)
    return _plan(evaluation, DivergenceResult, passes * sum(map(len, texts)), measure)


def plan_stops(evaluation: Evaluation) -> list[Work]:
    """Whether base and tuned model still end their answers."""
    prompts = _prompts(evaluation, stops.MAX_PROMPTS)
    if not prompts:
        evaluation.leave_out("stops", "neither a target suite nor a row has a prompt to answer")
        return []
    tokens = 2 * sum(len(ids) + stops.MAX_NEW_TOKENS for ids in prompts)
    return _plan(
        evaluation,
        StopsResult,
        tokens,
        lambda known: stops.diagnose_stops(
            evaluation_subject(evaluation), diagnosis_settings(evaluation), known=known
        ),
    )


def plan_contamination(evaluation: Evaluation) -> list[Work]:
    """Train rows among the suites' items; no model is asked."""

    def measure(_: ContaminationResult | None) -> ContaminationResult:
        rows = read_row_texts(evaluation.config.data, "train")
        return measure_contamination(rows, evaluation.suites)

    return _plan(evaluation, ContaminationResult, 0, measure)


def plan_probe(evaluation: Evaluation) -> list[Work]:
    """A linear probe on the base's states, also as an arm on suites of fixed choices."""
    run = evaluation.config.run
    suites = fixed_choice_suites(evaluation.suites)
    if not suites:
        evaluation.leave_out("probe", "no target or transfer suite has fixed choices")
        return []
    known_arms: dict[str, ArmResult] = {}
    for suite in suites:
        with contextlib.suppress(LlmtuneError):
            path = arm_result_path(run.evaluations_dir, suite.name, probe.PROBE_ARM)
            known_arms[suite.name] = read_arm_result(path)

    def measure(known: ProbeResult | None) -> ProbeResult:
        outcome = probe.diagnose_probe(
            evaluation_subject(evaluation),
            diagnosis_settings(evaluation),
            known=known,
            known_arms=known_arms,
        )
        for result in outcome.arms.values():
            evaluation.keep(result)
        return outcome.result

    rows = evaluation_subject(evaluation)
    seen = min(len(rows.trained), probe.MAX_ROWS)
    tokens = sum(len(rows.train[place].input_ids) for place in islice(rows.trained, seen))
    asked = sum(len(ids) for suite in suites for ids in evaluation.prompts_of(suite))
    return _plan(evaluation, ProbeResult, tokens + asked, measure)


def plan_shift(evaluation: Evaluation) -> list[Work]:
    """How far train, evaluation, general and suite texts lie from each other."""
    data = evaluation.config.data
    texts = {
        shift.TRAIN: [row.content for row in read_row_texts(data, "train")],
        "evaluation": [row.content for row in read_row_texts(data, "evaluation")],
        shift.GENERAL: general_texts(evaluation.suites),
    } | {
        suite.name: [_whole_text(item) for item in suite.items]
        for suite in asking_suites(evaluation.suites, ("target", "transfer"))
    }
    longest = [
        shift.MAX_GENERAL_TEXTS if name == shift.GENERAL else shift.MAX_TEXTS for name in texts
    ]
    tokens = sum(
        _text_tokens(evaluation, given[:limit])
        for given, limit in zip(texts.values(), longest, strict=True)
    )
    return _plan(
        evaluation,
        ShiftResult,
        tokens,
        lambda known: shift.diagnose_shift(
            evaluation.live.scored, texts, diagnosis_settings(evaluation), known=known
        ),
    )


def plan_memorisation(evaluation: Evaluation) -> list[Work]:
    """Whether the rows that were trained on are told from rows that were not."""
    subject = evaluation_subject(evaluation)
    seen, held_out = len(subject.trained), len(subject.held_out)
    if min(seen, held_out) < memorisation.MIN_ROWS:
        evaluation.leave_out(
            "memorisation",
            f"{seen} trained and {held_out} held-out rows; it needs {memorisation.MIN_ROWS} of "
            "each: give data.evaluation or data.evaluation_share",
        )
        return []
    places = list(islice(subject.trained, memorisation.MAX_ROWS))
    rows = [subject.train[place] for place in places]
    rows += [subject.held_out[i] for i in range(min(held_out, memorisation.MAX_ROWS))]
    return _plan(
        evaluation,
        MemorisationResult,
        2 * sum(len(row.input_ids) for row in rows),
        lambda known: memorisation.diagnose_memorisation(
            subject, diagnosis_settings(evaluation), known=known
        ),
    )


def evaluation_subject(evaluation: Evaluation) -> Subject:
    """Return the loaded model with its rows, prepared once."""
    if evaluation.subject is None:
        config, tokenizer = evaluation.config, evaluation.live.loaded.tokenizer
        train, held_out = (
            prepare_examples(config.data, tokenizer, split=split, seed=config.seed).examples
            for split in ("train", "evaluation")
        )
        record = read_manifest(config.run).stages.get("train", {}).get("result") or {}
        evaluation.subject = Subject(
            scored=evaluation.live.scored,
            suites=evaluation.suites,
            train=train,
            trained=seen_rows(
                len(train), config.seed, record.get("steps", 0) * config.train.batch_size
            ),
            held_out=held_out,
        )
    return evaluation.subject


def seen_rows(num_rows: int, seed: int, num_trained: int) -> tuple[int, ...]:
    """Return the places of the rows that training has seen, in the order of the first epoch."""
    if num_trained >= num_rows:
        return tuple(range(num_rows))
    return tuple(islice(EpochSampler(num_rows, seed), num_trained))


def diagnosis_settings(evaluation: Evaluation) -> DiagnosisSettings:
    """Return how diagnoses are made, with progress to the same log as the arms."""
    knobs, report = evaluation.config.evaluate, evaluation.settings.on_progress

    def advance(what: str, done: int, total: int) -> None:
        if report is not None:
            report(Progress(what, "diagnosis", done, total))

    budget = None if knobs.token_budget == "auto" else knobs.token_budget
    return DiagnosisSettings(budget, knobs.seed, knobs.confidence, advance)


def _plan(
    evaluation: Evaluation,
    kind: type[DiagnosticT],
    tokens: int,
    measure: Callable[[DiagnosticT | None], DiagnosticT],
) -> list[Work]:
    """Return the work of one diagnosis; none where its file is of the same inputs."""
    directory = evaluation.config.run.diagnostics_dir
    known = None
    if not evaluation.force:
        with contextlib.suppress(LlmtuneError):  # a file of another version is made again
            known = read_diagnostic(kind, directory)

    def run() -> None:
        write_diagnostic(measure(known), directory)

    identity = evaluation.live.identity
    is_current = known is not None and known.is_of(base=identity.base, adapter=identity.adapter)
    return [Work(0 if is_current else tokens, run)]


def _prompts(evaluation: Evaluation, limit: int) -> list[tuple[int, ...]]:
    subject = evaluation_subject(evaluation)
    return target_prompts(subject, limit=limit, seed=evaluation.config.evaluate.seed)


def _whole_text(item: SuiteItem) -> str:
    answer = item.choices[item.answer] if item.choices else item.references[0]
    return f"{item.prompt}\n{answer}"


def _text_tokens(evaluation: Evaluation, texts: list[str]) -> int:
    encoded = evaluation.live.loaded.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return sum(min(len(ids), shift.MAX_TOKENS) for ids in encoded)


def _only_if_wanted(name: str, plan: Plan) -> Plan:
    def planned(evaluation: Evaluation) -> list[Work]:
        return plan(evaluation) if evaluation.config.evaluate.measures(name) else []

    return planned


DIAGNOSES: dict[str, Plan] = {
    name: _only_if_wanted(name, plan)
    for name, plan in {
        "divergence": plan_divergence,
        "stops": plan_stops,
        "contamination": plan_contamination,
        "probe": plan_probe,
        "shift": plan_shift,
        "memorisation": plan_memorisation,
    }.items()
}
