"""A GGUF file in llama.cpp, compared with the merged model it was made from and the live adapter.

The first comparison says whether the file is right: both sides hold the same weights but for the
rounding of the file's type. The second says what the user gets in the end: base + adapter against
merge and file together.
"""

import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from llmtune.checks.labels import (
    LabelAgreement,
    LabelQuestion,
    compare_labels,
    file_labels,
    first_token_questions,
    label_in_model,
)
from llmtune.checks.limits import (
    MERGED_ACCURACY,
    MERGED_KL,
    allowed_accuracy_change,
    allowed_kl,
)
from llmtune.checks.merged import load_merged
from llmtune.checks.parity import (
    SPARE_TOKENS,
    ParityQuestions,
    ParityRequest,
    build_questions,
    compare_answers,
    describe_parity,
)
from llmtune.checks.prompts import NUM_NEW_TOKENS
from llmtune.checks.provenance import MergeRecord, read_record
from llmtune.checks.reference import at_strength, comparison_dtype
from llmtune.checks.runtime import RuntimeAnswers, ask_runtime, require_runtime
from llmtune.evaluation.suite import load_suite
from llmtune.exporting.gguf_writer.read import read_file_type, read_source
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.resolve import resolve_base
from llmtune.runs.targets import Target
from llmtune.stages.memory import release_memory
from llmtune.stages.verify import (
    VerifySettings,
    adapter_problems,
    load_reference,
    strength_of,
    string_problems,
)

log = logging.getLogger("llmtune")

ROUNDING = 1e-9
"""What a difference of two ratios may be off by: exactly the limit is within it."""

LabelledSuites = dict[str, list[LabelQuestion]]


@dataclass(frozen=True)
class _Limits:
    """What a file is compared with, and by how much it may differ."""

    against: str
    max_kl: float
    max_accuracy_change: float


@dataclass(frozen=True)
class _Asked:
    """What llama.cpp was asked of the file, and what it answered."""

    request: ParityRequest
    tokenizer: PreTrainedTokenizerFast
    questions: ParityQuestions
    suites: LabelledSuites
    answers: RuntimeAnswers


def verify_file(path: Path, target: Target, settings: VerifySettings) -> dict[str, Any]:
    """Compare a GGUF file with the model it was made from, and with the adapter behind that.

    Returns:
        `type`, `problems`, and under `file` (against the merged or whole model) and `chain`
        (against base + adapter) each comparison with its limits; None where there is nothing to
        compare with: a plain model has no adapter, an adapter directory no merged model.

    Raises:
        LlmtuneError: llama.cpp is not installed or cannot load the file, or a model is missing.
    """
    type = read_file_type(path)
    require_runtime()
    model = _whole_model(target)
    record = read_record(model.directory) if model is not None else None
    source = model or resolve_base(target.model, allow_quantized=True)
    asked = _ask(path, source, target)
    problems = _origin_problems(path, model) + adapter_problems(record, target)
    limits = _limits(type, settings, "merged model" if target.adapter_dir else "model")
    file = chain = None
    if model is not None:
        file = _compare_with_model(asked, model.directory, limits)
        problems += _problems(file, settings)
        release_memory()
    if target.adapter_dir is not None:
        limits = _Limits(
            "live adapter",
            limits.max_kl + MERGED_KL,
            limits.max_accuracy_change + MERGED_ACCURACY,
        )
        chain = _compare_with_live(asked, target, record, source.directory, limits)
        problems += _problems(chain, settings)
    return {"type": type, "problems": problems, "file": file, "chain": chain}


def _whole_model(target: Target) -> Checkpoint | None:
    """Return the merged or only model of a target; None for an adapter that was not merged."""
    if target.merged_dir is not None:
        return Checkpoint.open(target.merged_dir, chat_template=target.model.chat_template)
    return resolve_base(target.model) if target.adapter_dir is None else None


def _limits(type: str, settings: VerifySettings, against: str) -> _Limits:
    max_kl, max_change = settings.max_kl, settings.max_accuracy_change
    return _Limits(
        against,
        allowed_kl(type) if max_kl is None else max_kl,
        allowed_accuracy_change(type) if max_change is None else max_change,
    )


def _ask(path: Path, source: Checkpoint, target: Target) -> _Asked:
    """Ask llama.cpp everything at once: the file is loaded once."""
    tokenizer = source.tokenizer
    request = ParityRequest(
        path, source.stop_token_ids, NUM_NEW_TOKENS, num_threads=torch.get_num_threads()
    )
    questions = build_questions(tokenizer, request)
    suites = _label_questions(target, tokenizer)
    labelled = [question for some in suites.values() for question in some]
    longest = max((len(question.prompt_ids) for question in labelled), default=0)
    runtime = replace(
        questions.runtime,
        candidates=[(list(one.prompt_ids), list(one.first_ids)) for one in labelled],
        context_length=max(questions.runtime.context_length, longest + SPARE_TOKENS),
    )
    return _Asked(request, tokenizer, questions, suites, ask_runtime(path, runtime))


def _label_questions(target: Target, tokenizer: PreTrainedTokenizerFast) -> LabelledSuites:
    """Return the items of the run's target suites whose choices differ in their first token."""
    if target.config is None:
        return {}
    knobs = target.config.evaluate
    found = {}
    for name in knobs.suites:
        suite = load_suite(name, seed=knobs.seed, limit=knobs.limit)
        if suite.role != "target":
            continue
        requests = suite.config.choice_requests(tokenizer, suite)
        questions = first_token_questions(
            [request.prompt_ids for request in requests],
            [request.choice_ids for request in requests],
            [item.answer for item in suite.items],
        )
        if questions:
            found[suite.name] = questions
    return found


def _origin_problems(path: Path, model: Checkpoint | None) -> list[str]:
    """Say if the file records that it was made from other weights than the model's."""
    source = read_source(path)
    if source is None or model is None or source == model.fingerprint:
        return []
    return [f"it was made from other weights than those in {model.directory}; export it again"]


def _compare_with_model(asked: _Asked, model_dir: Path, limits: _Limits) -> dict[str, Any]:
    dtype = getattr(torch, comparison_dtype(model_dir, num_models=1))
    return _compare(asked, load_merged(model_dir, dtype=dtype, device="cpu"), limits)


def _compare_with_live(
    asked: _Asked, target: Target, record: MergeRecord | None, source: Path, limits: _Limits
) -> dict[str, Any]:
    dtype = comparison_dtype(source, num_models=1, device=target.model.device)
    live = load_reference(target, record, dtype)
    with at_strength(live, strength_of(record)):
        return _compare(asked, live.model, limits)


def _compare(asked: _Asked, model: nn.Module, limits: _Limits) -> dict[str, Any]:
    """Ask one model what the file was asked; return the comparison and its limits."""
    parity = compare_answers(
        model, asked.tokenizer, asked.request, (asked.questions, asked.answers)
    )
    labels = _compare_labels(model, asked)
    log.info("verify: against the %s: %s", limits.against, describe_parity(parity))
    return {
        **asdict(limits),
        **parity.to_dict(),
        "labels": [one.to_dict() for one in labels],
    }


def _compare_labels(model: nn.Module, asked: _Asked) -> list[LabelAgreement]:
    given = file_labels(asked.answers)
    found = []
    for suite, questions in asked.suites.items():
        theirs, given = given[: len(questions)], given[len(questions) :]
        ours = label_in_model(model, questions)
        found.append(compare_labels(suite, questions, ours, theirs))
    return found


def _problems(compared: dict[str, Any], settings: VerifySettings) -> list[str]:
    name, found = compared["against"], []
    if not compared["kl"] <= compared["max_kl"]:
        found.append(
            f"KL to the {name} {compared['kl']:.4f} nats per token, allowed are "
            f"{compared['max_kl']:g}"
        )
    for one in compared["labels"]:
        change = abs(one["file_accuracy"] - one["model_accuracy"])
        allowed = compared["max_accuracy_change"] + ROUNDING
        # a change of one item is no sign of anything on a small suite
        if change > allowed and change * one["n"] > 1:
            found.append(
                f"accuracy on {one['suite']} is {100 * one['file_accuracy']:.1f} % in llama.cpp "
                f"and {100 * one['model_accuracy']:.1f} % of the {name} (allowed are "
                f"{100 * compared['max_accuracy_change']:g} points)"
            )
    different = compared["num_prompts"] - compared["num_same_prompts"]
    if different:
        found.append(
            f"{different} of {compared['num_prompts']} chat prompts become other token ids"
        )
    num_odd = compared["num_strings"] - compared["num_same_strings"]
    return found + string_problems(num_odd, compared["odd_strings"], settings)
