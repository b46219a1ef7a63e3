"""A linear probe on the frozen base: what a classifier gets without any fine-tuning."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from llmtune.evaluation.diagnosis.base import (
    Alternative,
    Diagnosis,
    Diagnostic,
    Extent,
    Given,
    Planned,
)
from llmtune.evaluation.diagnosis.probe_fit import (
    FittedProbe,
    LabelledPrompts,
    ProbeCell,
    cross_validate,
    fit_probe,
    fold,
    label_prompts,
)
from llmtune.evaluation.diagnosis.shown import (
    Block,
    Facts,
    Paragraph,
    Section,
    Table,
)
from llmtune.evaluation.results import ArmResult, ItemScore
from llmtune.io.fingerprint import hash_json

if TYPE_CHECKING:
    from llmtune.evaluation.diagnosis.subject import DiagnosisSettings, Subject
    from llmtune.evaluation.tasks.base import Suite, SuiteItem

PROBE_ARM = "probe"


@dataclass(frozen=True, kw_only=True)
class ProbeResult(Diagnostic):
    """The probe's choice by cross-validation on the train rows; `refused` says why there is none.

    `majority` is what the commonest label among the train rows would score; `answered` names the
    suites that it was scored on, as the arm `probe`.
    """

    FILE_NAME: ClassVar[str] = "probe.json"
    table: tuple[ProbeCell, ...]
    chosen: ProbeCell | None
    labels: tuple[str, ...]
    majority: float | None
    train_rows: int
    refused: str | None = None
    answered: tuple[str, ...] = ()


class Probe(Diagnosis[ProbeResult]):
    """A linear probe on the base's states, also as an arm on suites of fixed choices."""

    name = "probe"
    what = "linear probe"
    help = "A linear probe on the frozen base's states"
    extent: ClassVar[Extent] = "full"
    alternative = Alternative(
        arm=PROBE_ARM,
        label="Linear probe on the base",
        words="a linear probe",
        verdict="USE-PROBE",
        meaning="A linear probe on the frozen base is as good as the tuned model, within the "
        "stated margin.",
        reason="A probe leaves the base as it is, so nothing else can break, and it costs one "
        "forward pass: use it.",
        to_do="Use the classifier with the base as it is.",
    )
    result = ProbeResult

    def plan(self, given: Given) -> Planned[ProbeResult]:
        """Plan to fit the probe and to answer suites with it."""
        return plan_probe(given.subject, given.diagnosis_settings, given.keep)

    def answered(self, found: ProbeResult) -> tuple[str, ...]:
        """Return the suites that the probe was scored on."""
        return found.answered

    def refusal(self, found: ProbeResult) -> str | None:
        """Return why there is no probe."""
        return found.refused

    def is_missing(self, found: ProbeResult | None, arms: set[str], *, has_choices: bool) -> bool:
        """Return whether choices are asked for and no probe answered."""
        return has_choices and PROBE_ARM not in arms

    def section(self, found: ProbeResult, facts: Facts) -> Section | None:
        """Show the chosen cell, and the table of cross-validated accuracies."""
        write, chosen = facts.write, found.chosen
        blocks: list[Block] = []
        if found.refused:
            blocks.append(Paragraph(f"No probe was fitted: {found.refused}."))
        if chosen:
            most = (
                f", where the most frequent label would score {write.share(found.majority)}"
                if found.majority is not None
                else ""
            )
            text = (
                f"Layer {chosen.layer}, {chosen.pooling} states, C = {write.number(chosen.C)}, "
                f"chosen by cross-validation on {write.count(found.train_rows)} training rows: "
                f"{write.share(chosen.cv_accuracy)} there{most}."
            )
            blocks.append(Paragraph(text))
        if found.table:
            rows = tuple(
                (str(c.layer), c.pooling, write.number(c.C), write.share(c.cv_accuracy))
                for c in found.table
            )
            head = ("Layer", "Pooling", "C", "Cross-validated")
            blocks.append(Table(rows, head, summary="Every layer", has_row_names=False))
        return Section("The linear probe", tuple(blocks))


def plan_probe(
    subject: Subject, settings: DiagnosisSettings, keep: Callable[[ArmResult], None]
) -> Planned[ProbeResult]:
    """Plan to fit L2 logistic regression on frozen states of train prompts, and to answer suites.

    The labels are the trained answers that are among the suites' fixed choices. Layer (a quarter,
    half, three quarters, all), pooling (mean, last token) and C are chosen by stratified 5-fold
    cross-validation on at most 1,000 of the rows that training has seen; states are standardised
    with the train rows' statistics. Kumar et al. 2022 (arXiv:2202.10054) compare such probes with
    fine-tuning. If the task is not classification, the result's `refused` says why.

    Args:
        keep: is given the scores on every target and transfer suite of fixed choices, as an arm.
    """
    from llmtune.evaluation.diagnosis.states import count_state_tokens
    from llmtune.evaluation.diagnosis.subject import fixed_choice_suites, hash_ids, model_inputs
    from llmtune.evaluation.requests import encode_prompts

    suites = fixed_choice_suites(subject.suites)
    found = label_prompts(subject, suites, settings)
    inputs = model_inputs(subject.scored, with_adapter=False) | {
        "rows": found if isinstance(found, str) else hash_ids(found.prompts),
        "items": hash_json({suite.name: suite.items_fingerprint for suite in suites}),
    }
    if isinstance(found, str):
        return Planned(ProbeResult, inputs, 0, partial(_refusal, inputs, found))
    answerable = [suite for suite in suites if len(_answerable(suite, found.labels)) >= 2]
    asked = {s.name: encode_prompts(subject.scored.tokenizer, s) for s in answerable}
    tokens = sum(map(count_state_tokens, (found.prompts, *asked.values())))

    def measure() -> ProbeResult:
        result, probe = _fit(subject, settings, found, inputs)
        for suite in answerable:
            keep(_answer_suite(subject, suite, probe, settings))
        return replace(result, answered=tuple(suite.name for suite in answerable))

    return Planned(ProbeResult, inputs, tokens, measure)


def _fit(
    subject: Subject,
    settings: DiagnosisSettings,
    found: LabelledPrompts,
    inputs: Mapping[str, str],
) -> tuple[ProbeResult, FittedProbe]:
    import numpy as np

    from llmtune.evaluation.diagnosis.states import quarter_layers, read_states

    started = time.perf_counter()
    scored = subject.scored
    layers = quarter_layers(scored.model)
    states = read_states(
        scored.model,
        found.prompts,
        layers,
        token_budget=settings.budget(scored),
        on_progress=settings.report("probe, train rows", len(found.prompts)),
    )
    table = cross_validate(states, found.classes, layers, seed=settings.seed)
    probe = fit_probe(states, found, max(table, key=lambda cell: cell.cv_accuracy))
    result = ProbeResult(
        inputs=inputs,
        seconds=time.perf_counter() - started,
        table=tuple(table),
        chosen=probe.cell,
        labels=found.labels,
        majority=float(np.bincount(found.classes).max() / len(found.classes)),
        train_rows=len(found.classes),
    )
    return result, probe


def _answerable(suite: Suite, labels: Sequence[str]) -> list[str]:
    return [choice for choice in suite.config.fixed_choices if fold(choice) in labels]


def _answer_suite(
    subject: Subject, suite: Suite, probe: FittedProbe, settings: DiagnosisSettings
) -> ArmResult:
    from llmtune.evaluation.diagnosis.states import read_states
    from llmtune.evaluation.requests import encode_prompts
    from llmtune.evaluation.run import build_recipe, summarize_items

    started = time.perf_counter()
    about = asdict(probe.cell) | {"train_rows": probe.train_rows}
    scored = replace(subject.scored, identity=replace(subject.scored.identity, adapter=None))
    states = read_states(
        scored.model,
        encode_prompts(scored.tokenizer, suite),
        (probe.cell.layer,),
        token_budget=settings.budget(scored),
        on_progress=settings.report(f"probe, {suite.name}", len(suite.items)),
    )
    choices = _answerable(suite, probe.labels)
    columns = [probe.labels.index(fold(choice)) for choice in choices]
    probabilities = probe.predict(states)[:, columns]
    probabilities /= probabilities.sum(1, keepdims=True)
    items = tuple(
        _score_item(suite, item, dict(zip(choices, row.tolist(), strict=True)))
        for item, row in zip(suite.items, probabilities, strict=True)
    )
    return summarize_items(
        suite,
        PROBE_ARM,
        items,
        recipe={**build_recipe(scored, suite), "probe": asdict(probe.cell)},
        model=scored.identity.as_dict(),
        seconds=time.perf_counter() - started,
        about=about,
    )


def _score_item(suite: Suite, item: SuiteItem, probabilities: dict[str, float]) -> ItemScore:
    prediction = max(probabilities, key=lambda choice: probabilities[choice])
    answer = item.choices[item.answer]
    is_probability = suite.config.metric == "answer_probability"
    return ItemScore(
        id=item.id,
        score=probabilities.get(answer, 0.0) if is_probability else float(prediction == answer),
        prediction=prediction,
        answer=answer,
        cluster=item.cluster,
        slices=dict(item.slices),
        details={"probabilities": probabilities},
    )


def _refusal(inputs: Mapping[str, str], why: str) -> ProbeResult:
    return ProbeResult(
        inputs=inputs, table=(), chosen=None, labels=(), majority=None, train_rows=0, refused=why
    )
