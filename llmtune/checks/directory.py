"""A model directory, reloaded with stock transformers and compared with base and adapter."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmtune.checks.merge_result import VerifyResult
from llmtune.checks.merged import verify_merge
from llmtune.checks.prompts import NUM_NEW_TOKENS, build_prompts
from llmtune.checks.provenance import adapter_in, exported_adapter, read_record, strength_of
from llmtune.checks.reference import (
    Reference,
    adapter_problems,
    comparison_dtype,
    is_dequantized,
    load_reference,
)
from llmtune.checks.tricky_strings import TRICKY_STRINGS
from llmtune.checks.verification import (
    MERGED_KL,
    Tolerances,
    allowed_kl,
    format_line,
    format_prompts,
    format_strings,
)
from llmtune.data.open_prompts import OPEN_PROMPTS
from llmtune.data.render import render_question
from llmtune.io.fingerprint import JsonObject
from llmtune.models.checkpoint import Checkpoint
from llmtune.scoring.generate import Decoding
from llmtune.scoring.live import as_arm

log = logging.getLogger("llmtune")


@dataclass(frozen=True)
class DirectoryComparison:
    """How far a model directory is from the live base and adapter."""

    type: str | None
    """The quantization that it is stored in, if any."""
    problems: tuple[str, ...]
    max_kl: float
    strength: float
    live_is_quantized: bool
    check: VerifyResult
    num_prompts: int
    num_same_prompts: int
    num_strings: int
    num_same_strings: int
    stop_token_ids: tuple[int, ...]

    def to_dict(self) -> JsonObject:
        """Return the comparison as JSON."""
        return {
            "type": self.type,
            "problems": list(self.problems),
            "max_kl": self.max_kl,
            "strength": self.strength,
            "live_is_quantized": self.live_is_quantized,
            **asdict(self.check),
            "num_prompts": self.num_prompts,
            "num_same_prompts": self.num_same_prompts,
            "num_strings": self.num_strings,
            "num_same_strings": self.num_same_strings,
            "stop_token_ids": list(self.stop_token_ids),
        }

    def lines(self, subject: str) -> Iterator[str]:
        """Yield each comparison with its limit, for the terminal."""
        check = self.check
        base = "dequantized base" if self.live_is_quantized else "base"
        at = "" if self.strength == 1 else f" at strength {self.strength:g}"
        yield subject
        yield f"the model from disk against the live {base} + adapter{at}, both in {check.dtype}"
        yield format_line("KL", f"{check.kl:.2g} nats/token", f"at most {self.max_kl:g}")
        yield format_line("top-1 agreement", f"{check.top1_agreement:.2%}", "shown, not judged")
        answers = f"{check.num_same_texts} of {check.num_open_prompts}"
        yield format_line("greedy answers the same", answers, "shown, not judged")
        yield format_prompts(self.num_same_prompts, self.num_prompts)
        yield format_strings(self.num_same_strings, self.num_strings)


def check_directory(
    directory: Path, reference: Reference, tolerances: Tolerances
) -> DirectoryComparison:
    """Compare a merged or 4-bit model directory with the base and adapter that it came from.

    Compared are logits, greedy answers and the tokens that end them, chat prompts, and the tokens
    of 200 tricky strings.

    Raises:
        LlmtuneError: the directory or the reference cannot be live.
    """
    saved = Checkpoint.open(directory)
    type = _stored_type(saved.config)
    record = read_record(directory)
    problems = adapter_problems(adapter_in(record) or exported_adapter(directory), reference)
    dtype = comparison_dtype(saved, device=reference.model.device)
    live = load_reference(reference, record, dtype)
    tokenizer = saved.tokenizer
    with as_arm(live, strength=strength_of(record)):
        check = verify_merge(
            live.model,
            directory,
            build_prompts(live.tokenizer, reference.held_out),
            decoding=Decoding(NUM_NEW_TOKENS, live.stop_token_ids),
            dtype=live.dtype,
            trust_remote_code=reference.model.trust_remote_code,
        )
    log.info("verify: %s", check.summary())
    max_kl = tolerances.max_kl if tolerances.max_kl is not None else _bound(type, reference)
    if not check.kl <= max_kl:
        problems.append(f"KL {check.kl:.4f} nats per token, the limit is {max_kl:g}")
    elif problem := check.find_problem(max_kl):
        problems.append(problem)
    odd = [text for text in TRICKY_STRINGS if tokenizer.encode(text) != live.tokenizer.encode(text)]
    problems += tolerances.string_problems(len(odd), len(TRICKY_STRINGS), odd)
    stops = saved.stop_token_ids
    if not set(stops) >= set(live.stop_token_ids):
        problems.append(f"answers end with {stops}, expected {live.stop_token_ids}")
    different = sum(
        render_question(tokenizer, text) != render_question(live.tokenizer, text)
        for text in OPEN_PROMPTS
    )
    if different:
        problems.append(
            f"{different} of {len(OPEN_PROMPTS)} chat prompts are tokenized differently"
        )
    return DirectoryComparison(
        type=type,
        problems=tuple(problems),
        max_kl=max_kl,
        strength=strength_of(record),
        live_is_quantized=is_dequantized(record),
        check=check,
        num_prompts=len(OPEN_PROMPTS),
        num_same_prompts=len(OPEN_PROMPTS) - different,
        num_strings=len(TRICKY_STRINGS),
        num_same_strings=len(TRICKY_STRINGS) - len(odd),
        stop_token_ids=stops,
    )


def _stored_type(config: Mapping[str, Any]) -> str | None:
    """Return the name of the quantization that a checkpoint is stored in."""
    stored = config.get("quantization_config")
    if not stored:
        return None
    return str(stored.get("bnb_4bit_quant_type" if stored.get("load_in_4bit") else "quant_method"))


def _bound(type: str | None, reference: Reference) -> float:
    if type is None:
        return reference.max_kl
    return allowed_kl(type) + (MERGED_KL if reference.adapter_dir else 0.0)
