"""Reload an exported model or file from disk, and compare it with what it was made from."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.adapters.manifest import adapter_fingerprint, has_strengths
from llmtune.checks.limits import MERGED_KL, allowed_kl
from llmtune.checks.merged import verify_merge
from llmtune.checks.prompts import NUM_NEW_TOKENS, HeldOut, build_prompts
from llmtune.checks.provenance import MergeRecord, read_record
from llmtune.checks.reference import (
    LiveModel,
    at_strength,
    comparison_dtype,
    load_live,
)
from llmtune.checks.tricky_strings import TRICKY_STRINGS
from llmtune.data.open_prompts import OPEN_PROMPTS
from llmtune.data.render import render_question
from llmtune.data.template import require_trained_template
from llmtune.errors import CheckFailed, LlmtuneError
from llmtune.merging.config import MergeConfig
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.resolve import resolve_base
from llmtune.runs.targets import Target, resolve_target
from llmtune.scoring.generate import Decoding

log = logging.getLogger("llmtune")

GGUF_SUFFIX = ".gguf"
QUANTIZED_TYPE = "nf4"


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


def verify_target(
    subject: Path, against: str, overrides: Sequence[str], settings: VerifySettings
) -> dict[str, Any]:
    """Compare a model directory or a GGUF file, read from disk, with the run it came from.

    A directory is loaded with stock transformers; see `stages.verify_file` for a file. Compared
    are logits or distributions, greedy answers and where they stop, chat prompts, and the tokens
    of 200 tricky strings.

    Args:
        subject: a merged or 4-bit model directory, or a GGUF file.
        against: a run, its config, an adapter, or a model.
        overrides: `key.path=value` of the run's config.
        settings: the thresholds.

    Returns:
        The comparison as JSON values, with `subject`, `against`, `type` and `problems`: what
        differs by more than allowed, one text each.

    Raises:
        LlmtuneError: `subject` or `against` cannot be loaded.
    """
    if not subject.exists():
        raise LlmtuneError(f"{subject}: does not exist; expected a directory or a .gguf file")
    target = resolve_target(against, overrides)
    if subject.suffix == GGUF_SUFFIX:
        from llmtune.stages.verify_file import verify_file

        result = verify_file(subject, target, settings)
    else:
        result = _verify_directory(subject, target, settings)
    return {"subject": str(subject), "against": against, **result}


def require_passed(result: Mapping[str, Any]) -> None:
    """Check the result of `verify_target`.

    Raises:
        CheckFailed: something differs by more than allowed; the message says what.
    """
    if result["problems"]:
        raise CheckFailed(
            f"{result['subject']} is not what {result['against']} is: "
            + "; ".join(result["problems"])
        )


def load_reference(target: Target, record: MergeRecord | None, dtype: str) -> LiveModel:
    """Load base and adapter: quantized where the adapter was merged into the dequantized base.

    Raises:
        LlmtuneError: the chat template is not the one the adapter was trained with; or what is
            verified was merged from several adapters, which are no one live model.
    """
    if record is not None and record.num_adapters > 1:
        raise LlmtuneError(
            f"{target.name}: what is to be verified was merged from {record.num_adapters} adapters "
            "and is no single one; it was compared when it was merged"
        )
    if strength_of(record) != 1 and target.adapter_dir and not has_strengths(target.adapter_dir):
        raise LlmtuneError(
            f"{target.name}: merged at strength {strength_of(record):g}, and an adapter with "
            "biases or single token rows has no live model of that strength to compare with"
        )
    is_quantized = record is not None and record.base == "dequantized"
    source = resolve_base(target.model, allow_quantized=True)
    live = load_live(
        target.model, source, target.adapter_dir, dtype=dtype, is_quantized=is_quantized
    )
    if target.adapter_dir is not None:
        require_trained_template(live.loaded.tokenizer, target.adapter_dir)
    return live


def adapter_problems(record: MergeRecord | None, target: Target) -> list[str]:
    """Say where a directory was merged from another adapter than the target's."""
    if record is None or target.adapter_dir is None:
        return []
    if record.adapter_hash == adapter_fingerprint(target.adapter_dir):
        return []
    return [f"it was merged from another adapter than {target.adapter_dir}; merge again"]


def string_problems(num_odd: int, odd: Sequence[str], settings: VerifySettings) -> list[str]:
    """Say how many of the tricky strings become other tokens, where these are too many."""
    if num_odd <= settings.max_odd_strings:
        return []
    return [
        f"{num_odd} of {len(TRICKY_STRINGS)} tricky strings become other tokens, such as "
        f"{odd[0]!r} (allowed are {settings.max_odd_strings})"
    ]


def strength_of(record: MergeRecord | None) -> float:
    """Return how much of the adapter is in what was merged."""
    return 1.0 if record is None else record.strength


def _verify_directory(directory: Path, target: Target, settings: VerifySettings) -> dict[str, Any]:
    saved = Checkpoint.open(directory)
    type = QUANTIZED_TYPE if saved.is_quantized else None
    record = read_record(directory)
    problems = adapter_problems(record, target)
    live = load_reference(target, record, comparison_dtype(directory, device=target.model.device))
    loaded, tokenizer = live.loaded, saved.tokenizer
    with at_strength(live, strength_of(record)):
        check = verify_merge(
            live.model,
            directory,
            build_prompts(loaded.tokenizer, _held_out(target)),
            decoding=Decoding(NUM_NEW_TOKENS, loaded.stop_token_ids),
            dtype=loaded.dtype,
        )
    log.info("verify: %s", check.summary())
    max_kl = settings.max_kl if settings.max_kl is not None else _bound(type, target)
    if not check.kl <= max_kl:
        problems.append(f"KL {check.kl:.4f} nats per token, allowed are {max_kl:g}")
    odd = [
        text for text in TRICKY_STRINGS if tokenizer.encode(text) != loaded.tokenizer.encode(text)
    ]
    problems += string_problems(len(odd), odd, settings)
    stops = saved.stop_token_ids
    if not set(stops) >= set(loaded.stop_token_ids):
        problems.append(f"answers end with {stops}, expected {loaded.stop_token_ids}")
    different = sum(
        render_question(tokenizer, text) != render_question(loaded.tokenizer, text)
        for text in OPEN_PROMPTS
    )
    if different:
        problems.append(f"{different} of {len(OPEN_PROMPTS)} chat prompts become other token ids")
    return {
        "type": type,
        "problems": problems,
        "max_kl": max_kl,
        "strength": strength_of(record),
        "live_is_quantized": live.is_quantized,
        **check.to_dict(),
        "num_prompts": len(OPEN_PROMPTS),
        "num_same_prompts": len(OPEN_PROMPTS) - different,
        "num_strings": len(TRICKY_STRINGS),
        "num_same_strings": len(TRICKY_STRINGS) - len(odd),
        "stop_token_ids": list(stops),
    }


def _bound(type: str | None, target: Target) -> float:
    if type is not None:
        return allowed_kl(type) + (MERGED_KL if target.adapter_dir else 0.0)
    return (target.config.merge if target.config else MergeConfig()).max_kl


def _held_out(target: Target) -> HeldOut | None:
    config = target.config
    return None if config is None else HeldOut(config.data, config.seed)
