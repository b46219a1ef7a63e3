"""Reload an exported model or file from disk, and compare it with what it was made from."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmtune.adapters.saved import load_adapter
from llmtune.data.prepare import prepare_examples
from llmtune.data.render import render_question
from llmtune.data.template import require_trained_template
from llmtune.errors import CheckFailed, LlmtuneError
from llmtune.evaluation.requests import build_choice_requests
from llmtune.evaluation.suite import load_suite
from llmtune.exporting.gguf.read import read_file_type
from llmtune.exporting.labels import LabelAgreement, compare_labels, first_token_questions
from llmtune.exporting.parity import ParityRequest, compare_with_runtime
from llmtune.exporting.runtime import require_runtime
from llmtune.exporting.tricky_strings import TRICKY_STRINGS
from llmtune.merging.config import MergeConfig
from llmtune.merging.provenance import merged_base
from llmtune.merging.verify import VerifyPrompts, verify_merge
from llmtune.models.checkpoint import read_generation_config, read_model_config
from llmtune.models.load import LoadedModel, load_model
from llmtune.models.resolve import resolve_base
from llmtune.models.tokenizer import load_tokenizer
from llmtune.models.turns import stop_token_ids
from llmtune.open_prompts import OPEN_PROMPTS
from llmtune.scoring.generate import Decoding
from llmtune.stages.export import allowed_kl, comparison_dtype, describe_parity
from llmtune.stages.merge import describe_check, reference_model
from llmtune.targets import Target, resolve_target

log = logging.getLogger("llmtune")

NUM_ROWS = 20
NUM_NEW_TOKENS = 32
GGUF_SUFFIX = ".gguf"
MERGED_KL = 0.05
"""Nats that a file may differ more from base + adapter than from the merged model: a merge rounds
too. SmolLM2-135M in bfloat16 is 0.022 from its adapter at an answer's first token."""
QUANTIZED_TYPE = "nf4"
MAX_LABELLED = 100
"""Items of a suite that are labelled in llama.cpp: about a second each on one core."""
ACCURACY_CHANGE = {"f32": 0.01, "f16": 0.01, "bf16": 0.02, "q8_0": 0.03}
ACCURACY_CHANGE_SMALL = 0.10
"""Fractions of 1; the merge into 16 bits is part of the change where a run is compared with."""


@dataclass(frozen=True)
class VerifySettings:
    """What is still called the same."""

    max_kl: float | None = None
    """Largest KL in nats per token; None is the bound of the file's type."""
    max_odd_strings: int = 0
    """How many of the 200 tricky strings may be tokenized differently."""
    max_accuracy_change: float | None = None
    """Largest change of a target suite's label accuracy in a GGUF file, as a fraction of 1; None
    is the bound of the file's type."""


@dataclass(frozen=True)
class _Reference:
    """The model that was exported: base + adapter, or a whole model."""

    model: nn.Module
    loaded: LoadedModel
    target: Target


def verify_target(
    subject: Path, against: str, overrides: Sequence[str], settings: VerifySettings
) -> dict[str, Any]:
    """Compare a model directory or a GGUF file, read from disk, with the run it came from.

    A directory is loaded with stock transformers, a file in llama.cpp in a process of its own.
    Compared are logits or distributions, greedy answers and where they stop, chat prompts, and
    the tokens of 200 tricky strings.

    Args:
        subject: a merged or 4-bit model directory, or a GGUF file.
        against: a run, its config, an adapter, or a model.
        overrides: `key.path=value` of the run's config.
        settings: the thresholds.

    Returns:
        The comparison as JSON values, with `subject`, `against`, `max_kl` and `problems: []`.

    Raises:
        LlmtuneError: `subject` or `against` cannot be loaded.
        CheckFailed: they differ by more than allowed; the message says in what.
    """
    is_file = subject.suffix == GGUF_SUFFIX
    if not subject.exists():
        raise LlmtuneError(f"{subject}: does not exist; expected a directory or a .gguf file")
    if is_file:
        require_runtime()
    type = read_file_type(subject) if is_file else _directory_type(subject)
    target = resolve_target(against, overrides)
    merged_dir = target.merged_dir if is_file else subject
    is_dequantized = merged_dir is not None and merged_base(merged_dir) == "dequantized"
    reference = _load_reference(target, is_quantized=is_dequantized)
    max_kl = settings.max_kl or _bound(type, reference.target)
    if is_file:
        result, problems = _compare_file(subject, reference, settings)
        labels = _compare_labels(subject, reference)
        allowed = settings.max_accuracy_change
        if allowed is None:
            allowed = ACCURACY_CHANGE.get(type or "", ACCURACY_CHANGE_SMALL)
        problems += _label_problems(labels, allowed)
        result["labels"] = [one.to_dict() for one in labels]
    else:
        result, problems = _compare_directory(subject, reference, settings)
    if not result["kl"] <= max_kl:
        problems.insert(0, f"KL {result['kl']:.4f} nats per token, allowed are {max_kl:g}")
    if problems:
        raise CheckFailed(f"{subject} is not what {against} is: " + "; ".join(problems))
    return {
        "subject": str(subject),
        "against": against,
        "type": type,
        "max_kl": max_kl,
        "problems": problems,
        **result,
    }


def _directory_type(directory: Path) -> str | None:
    quantization = read_model_config(directory).get("quantization_config")
    return QUANTIZED_TYPE if quantization else None


def _bound(type: str | None, target: Target) -> float:
    if type is not None:
        return allowed_kl(type) + (MERGED_KL if target.adapter_dir else 0.0)
    return (target.config.merge if target.config else MergeConfig()).max_kl


def _load_reference(target: Target, *, is_quantized: bool) -> _Reference:
    """Load what was exported: quantized where the adapter was merged into the dequantized base."""
    source = resolve_base(target.model)
    dtype = comparison_dtype(source.dir)
    loaded = load_model(reference_model(target.model, dtype, is_quantized=is_quantized), source)
    if target.adapter_dir is None:
        return _Reference(loaded.model, loaded, target)
    require_trained_template(loaded.tokenizer, target.adapter_dir)
    model = load_adapter(loaded.model, target.adapter_dir, base_fingerprint=loaded.fingerprint)
    return _Reference(model, loaded, target)


def _compare_file(
    path: Path, reference: _Reference, settings: VerifySettings
) -> tuple[dict[str, Any], list[str]]:
    loaded = reference.loaded
    request = ParityRequest(
        path, loaded.stop_token_ids, NUM_NEW_TOKENS, num_threads=torch.get_num_threads()
    )
    parity = compare_with_runtime(reference.model, loaded.tokenizer, request)
    log.info("verify: %s", describe_parity(parity))
    problems = []
    if parity.num_same_prompts < parity.num_prompts:
        different = parity.num_prompts - parity.num_same_prompts
        problems.append(f"{different} of {parity.num_prompts} chat prompts become other token ids")
    problems += _string_problems(
        parity.num_strings - parity.num_same_strings, parity.odd_strings, settings
    )
    return parity.to_dict(), problems


def _compare_labels(path: Path, reference: _Reference) -> list[LabelAgreement]:
    """Label the items of the run's target suites with fixed choices, in llama.cpp and here."""
    config, tokenizer = reference.target.config, reference.loaded.tokenizer
    if config is None:
        return []
    found = []
    knobs = config.evaluate
    for name in knobs.suites:
        suite = load_suite(name, seed=knobs.seed, limit=knobs.limit)
        if suite.role != "target" or suite.task != "choice":
            continue
        requests = build_choice_requests(tokenizer, suite)
        questions = first_token_questions(
            [request.prompt_ids for request in requests],
            [request.choice_ids for request in requests],
            [item.answer for item in suite.items],
        )
        if questions:
            asked = questions[:MAX_LABELLED]
            agreement = compare_labels(suite.name, reference.model, path, asked)
            log.info(
                "verify: %s: accuracy %.1f %% in llama.cpp, %.1f %% here, %d of %d labels the same",
                suite.name,
                100 * agreement.file_accuracy,
                100 * agreement.model_accuracy,
                agreement.num_same,
                agreement.n,
            )
            found.append(agreement)
    return found


def _label_problems(labels: Sequence[LabelAgreement], allowed: float) -> list[str]:
    return [
        f"accuracy on {one.suite} is {100 * one.file_accuracy:.1f} % in llama.cpp and "
        f"{100 * one.model_accuracy:.1f} % here (allowed are {100 * allowed:g} points)"
        for one in labels
        # a change of one item is no sign of anything on a small suite
        if one.difference > allowed and one.difference * one.n > 1
    ]


def _compare_directory(
    directory: Path, reference: _Reference, settings: VerifySettings
) -> tuple[dict[str, Any], list[str]]:
    loaded = reference.loaded
    tokenizer = load_tokenizer(directory)
    check = verify_merge(
        reference.model,
        directory,
        _prompts(reference),
        decoding=Decoding(NUM_NEW_TOKENS, loaded.stop_token_ids),
        dtype=loaded.dtype,
    )
    log.info("verify: %s", describe_check(check))
    odd = [
        text for text in TRICKY_STRINGS if tokenizer.encode(text) != loaded.tokenizer.encode(text)
    ]
    stops = stop_token_ids(tokenizer, read_generation_config(directory))
    problems = _string_problems(len(odd), odd, settings)
    if not set(stops) >= set(loaded.stop_token_ids):
        problems.append(f"answers end with {stops}, expected {loaded.stop_token_ids}")
    different = sum(
        render_question(tokenizer, text) != render_question(loaded.tokenizer, text)
        for text in OPEN_PROMPTS
    )
    if different:
        problems.append(f"{different} of {len(OPEN_PROMPTS)} chat prompts become other token ids")
    values = {
        **check.to_dict(),
        "num_strings": len(TRICKY_STRINGS),
        "num_same_strings": len(TRICKY_STRINGS) - len(odd),
        "stop_token_ids": list(stops),
    }
    return values, problems


def _string_problems(num_odd: int, odd: Sequence[str], settings: VerifySettings) -> list[str]:
    if num_odd <= settings.max_odd_strings:
        return []
    return [
        f"{num_odd} of {len(TRICKY_STRINGS)} tricky strings become other tokens, such as "
        f"{odd[0]!r} (allowed are {settings.max_odd_strings})"
    ]


def _prompts(reference: _Reference) -> VerifyPrompts:
    tokenizer, config = reference.loaded.tokenizer, reference.target.config
    questions = tuple(tuple(render_question(tokenizer, question)) for question in OPEN_PROMPTS)
    rows: tuple[tuple[int, ...], ...] = ()
    if config is not None:
        held_out = prepare_examples(config.data, tokenizer, split="evaluation", seed=config.seed)
        count = min(NUM_ROWS, len(held_out.examples))
        rows = tuple(tuple(held_out.examples[i].input_ids) for i in range(count))
    return VerifyPrompts(sequences=rows or questions, open_prompts=questions)
