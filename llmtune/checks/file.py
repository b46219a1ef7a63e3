"""A GGUF file in llama.cpp, compared with the merged model it was made from and the live adapter.

The first comparison says whether the file is right: both sides hold the same weights but for the
rounding of the file's type. The second says what the user gets in the end: base + adapter against
merge and file together.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

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
from llmtune.checks.merged import load_merged
from llmtune.checks.parity import (
    SPARE_TOKENS,
    ParityQuestions,
    ParityRequest,
    ParityResult,
    build_questions,
    compare_answers,
    describe_parity,
)
from llmtune.checks.prompts import NUM_NEW_TOKENS
from llmtune.checks.provenance import MergeRecord, adapter_in, read_record, strength_of
from llmtune.checks.reference import (
    Reference,
    adapter_problems,
    comparison_dtype,
    load_reference,
)
from llmtune.checks.runtime import RuntimeAnswers, ask_runtime, require_runtime
from llmtune.checks.verification import (
    MERGED_ACCURACY,
    MERGED_KL,
    Tolerances,
    allowed_accuracy_change,
    allowed_kl,
    format_line,
    format_prompts,
    format_strings,
)
from llmtune.evaluation.tasks.base import Suite
from llmtune.io.fingerprint import JsonObject
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.hardware import release_memory
from llmtune.scoring.live import as_arm

log = logging.getLogger("llmtune")

ROUNDING = 1e-9
"""What a difference of two ratios may be off by: exactly the limit is within it."""
TITLES = {
    "merged model": "the file in llama.cpp against the merged model it was made from: is the file "
    "right?",
    "model": "the file in llama.cpp against the model: is the file right?",
    "live adapter": "the file in llama.cpp against base + adapter: do merge and file together "
    "answer as what was trained?",
}

LabelledSuites = dict[str, list[LabelQuestion]]


@dataclass(frozen=True)
class ModelFile:
    """A GGUF file, and what it says of itself."""

    path: Path
    type: str
    """The type of most of its numbers."""
    source: str | None
    """The fingerprint of the weights it was made from, if it records one."""
    adapter: str | None = None
    """The fingerprint of the adapter in them, if it records one."""


@dataclass(frozen=True)
class Limits:
    """What a file is compared with, and by how much it may differ."""

    against: str
    max_kl: float
    max_accuracy_change: float


@dataclass(frozen=True)
class ModelComparison:
    """How far a file in llama.cpp is from one model in transformers."""

    limits: Limits
    parity: ParityResult
    labels: tuple[LabelAgreement, ...]

    def to_dict(self) -> JsonObject:
        """Return the comparison as JSON, its limits among it."""
        return {
            "against": self.limits.against,
            "max_kl": self.limits.max_kl,
            "max_accuracy_change": self.limits.max_accuracy_change,
            **self.parity.to_dict(),
            "labels": [one.to_dict() for one in self.labels],
        }

    def problems(self, tolerances: Tolerances) -> list[str]:
        """Say what is beyond its limit."""
        parity, name, found = self.parity, self.limits.against, []
        if not parity.kl <= self.limits.max_kl:
            found.append(
                f"KL to the {name} {parity.kl:.4f} nats per token, the limit is "
                f"{self.limits.max_kl:g}"
            )
        allowed = self.limits.max_accuracy_change
        for one in self.labels:
            # one item more or less says nothing on a small suite
            if one.difference > allowed + ROUNDING and one.difference * one.n > 1:
                found.append(
                    f"accuracy on {one.suite} is {100 * one.file_accuracy:.1f} % in llama.cpp "
                    f"and {100 * one.model_accuracy:.1f} % of the {name} (the limit is "
                    f"{100 * allowed:g} points)"
                )
        different = parity.num_prompts - parity.num_same_prompts
        if different:
            found.append(
                f"{different} of {parity.num_prompts} chat prompts are tokenized differently"
            )
        num_odd = parity.num_strings - parity.num_same_strings
        return found + tolerances.string_problems(num_odd, parity.num_strings, parity.odd_strings)

    def lines(self) -> Iterator[str]:
        """Yield each number with its limit, for the terminal."""
        parity, limits = self.parity, self.limits
        yield TITLES[limits.against]
        yield format_prompts(parity.num_same_prompts, parity.num_prompts)
        yield format_line(
            "KL after a prompt", f"{parity.kl:.2g} nats", f"at most {limits.max_kl:g}"
        )
        for one in self.labels:
            yield format_line(
                f"label accuracy, {one.suite}",
                f"{100 * one.file_accuracy:.1f} % (model {100 * one.model_accuracy:.1f} %), "
                f"{one.num_same} of {one.n} labels the same",
                f"at most {100 * limits.max_accuracy_change:g} points apart",
            )
        yield format_line("greedy answers the same", _format_answers(parity), "shown, not judged")
        yield format_strings(parity.num_same_strings, parity.num_strings)


@dataclass(frozen=True)
class FileComparison:
    """How far a file is from the model it was made from, and from base + adapter behind that."""

    type: str
    problems: tuple[str, ...]
    file: ModelComparison | None
    """Against the merged or whole model; None if there is none: of an adapter directory."""
    chain: ModelComparison | None
    """Against base + adapter; None if there is no adapter."""

    def to_dict(self) -> JsonObject:
        """Return both comparisons as JSON."""
        return {
            "type": self.type,
            "problems": list(self.problems),
            "file": None if self.file is None else self.file.to_dict(),
            "chain": None if self.chain is None else self.chain.to_dict(),
        }

    def lines(self, subject: str) -> Iterator[str]:
        """Yield each comparison with its limits, for the terminal."""
        yield f"{subject} ({self.type})"
        for compared in (self.file, self.chain):
            if compared is not None:
                yield from compared.lines()


@dataclass(frozen=True)
class _Asked:
    """What llama.cpp was asked of the file, and what it answered."""

    request: ParityRequest
    tokenizer: PreTrainedTokenizerFast
    questions: ParityQuestions
    suites: LabelledSuites
    answers: RuntimeAnswers


def check_file(file: ModelFile, reference: Reference, tolerances: Tolerances) -> FileComparison:
    """Compare a GGUF file with the model it was made from, and with the adapter behind that.

    Raises:
        LlmtuneError: llama.cpp is not installed or cannot load the file, or a model is missing.
    """
    require_runtime()
    model = _whole_model(reference)
    record = read_record(model.directory) if model is not None else None
    source = model or reference.base
    asked = _ask(file.path, source, reference)
    problems = [
        *_origin_problems(file, model),
        *adapter_problems(file.adapter or adapter_in(record), reference),
    ]
    limits = _choose_limits(
        file.type, tolerances, "merged model" if reference.adapter_dir else "model"
    )
    against_model = against_live = None
    if model is not None:
        against_model = _compare_with_model(
            asked, model, limits, trust_remote_code=reference.model.trust_remote_code
        )
        problems += against_model.problems(tolerances)
        release_memory()
    if reference.adapter_dir is not None:
        limits = Limits(
            "live adapter",
            limits.max_kl + MERGED_KL,
            limits.max_accuracy_change + MERGED_ACCURACY,
        )
        against_live = _compare_with_live(asked, reference, record, source, limits)
        problems += against_live.problems(tolerances)
    return FileComparison(file.type, tuple(problems), against_model, against_live)


def _whole_model(reference: Reference) -> Checkpoint | None:
    """Return the merged or only model of a reference; None for an adapter that was not merged."""
    if reference.merged_dir is not None or reference.merged_problem is not None:
        return reference.merged
    return reference.dense_base if reference.adapter_dir is None else None


def _choose_limits(type: str, tolerances: Tolerances, against: str) -> Limits:
    max_kl, max_change = tolerances.max_kl, tolerances.max_accuracy_change
    return Limits(
        against,
        allowed_kl(type) if max_kl is None else max_kl,
        allowed_accuracy_change(type) if max_change is None else max_change,
    )


def _ask(path: Path, source: Checkpoint, reference: Reference) -> _Asked:
    """Ask llama.cpp everything at once: the file is loaded once."""
    tokenizer = source.tokenizer
    request = ParityRequest(
        path, source.stop_token_ids, NUM_NEW_TOKENS, num_threads=torch.get_num_threads()
    )
    questions = build_questions(tokenizer, request)
    held_out = reference.held_out
    suites = _build_label_questions(held_out.suites if held_out else (), tokenizer)
    labelled = [question for some in suites.values() for question in some]
    longest = max((len(question.prompt_ids) for question in labelled), default=0)
    runtime = replace(
        questions.runtime,
        candidates=[(list(one.prompt_ids), list(one.first_ids)) for one in labelled],
        context_length=max(questions.runtime.context_length, longest + SPARE_TOKENS),
    )
    return _Asked(request, tokenizer, questions, suites, ask_runtime(path, runtime))


def _build_label_questions(
    suites: tuple[Suite, ...], tokenizer: PreTrainedTokenizerFast
) -> LabelledSuites:
    """Return the items of the target suites whose choices differ in their first token."""
    found = {}
    for suite in suites:
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


def _origin_problems(file: ModelFile, model: Checkpoint | None) -> list[str]:
    """Say if the file records that it was made from other weights than the model's."""
    if file.source is None or model is None or file.source == model.fingerprint:
        return []
    return [f"it was made from other weights than those in {model.directory}; export it again"]


def _compare_with_model(
    asked: _Asked, source: Checkpoint, limits: Limits, *, trust_remote_code: bool
) -> ModelComparison:
    dtype = getattr(torch, comparison_dtype(source, num_models=1))
    model = load_merged(
        source.directory, dtype=dtype, device="cpu", trust_remote_code=trust_remote_code
    )
    return _compare(asked, model, limits)


def _compare_with_live(
    asked: _Asked,
    reference: Reference,
    record: MergeRecord | None,
    source: Checkpoint,
    limits: Limits,
) -> ModelComparison:
    dtype = comparison_dtype(source, num_models=1, device=reference.model.device)
    live = load_reference(reference, record, dtype)
    with as_arm(live, strength=strength_of(record)):
        return _compare(asked, live.model, limits)


def _compare(asked: _Asked, model: nn.Module, limits: Limits) -> ModelComparison:
    """Ask one model what the file was asked."""
    parity = compare_answers(
        model, asked.tokenizer, asked.request, (asked.questions, asked.answers)
    )
    labels = _compare_labels(model, asked)
    log.info("verify: against the %s: %s", limits.against, describe_parity(parity))
    return ModelComparison(limits, parity, tuple(labels))


def _compare_labels(model: nn.Module, asked: _Asked) -> list[LabelAgreement]:
    given = file_labels(asked.answers)
    found = []
    for suite, questions in asked.suites.items():
        theirs, given = given[: len(questions)], given[len(questions) :]
        ours = label_in_model(model, questions)
        found.append(compare_labels(suite, questions, ours, theirs))
    return found


def _format_answers(parity: ParityResult) -> str:
    text = f"{parity.num_same_answers} of {parity.num_prompts}"
    margins = sorted(one.margin for one in parity.differences)
    if margins:
        text += f"; the others diverge where the top token led by {margins[0]:.3f}"
        text += f" to {margins[-1]:.3f} nats" if len(margins) > 1 else " nats"
    return text
