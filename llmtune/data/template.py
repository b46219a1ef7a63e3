"""The identity of a chat template: recorded with an adapter, compared by every later command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.adapters.manifest import COPY_AGAIN, MANIFEST_NAME, read_adapter_manifest
from llmtune.data.render import encode_plain
from llmtune.errors import LlmtuneError
from llmtune.io.fingerprint import JsonObject, hash_json
from llmtune.models.chat_template import TEMPLATE_ERRORS, apply_chat_template
from llmtune.models.template_date import fix_template_date, prints_date

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GOLDEN_MESSAGES = [
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "It is 5."},
    {"role": "user", "content": "Sind Sie sicher? 確か？\n\n  - yes\n  - no"},
]
GOLDEN_DATE = date(2025, 1, 1)
"""What templates print as today's date in the golden prompt, which must not change by itself."""


@dataclass(frozen=True)
class TemplateIdentity:
    """What must be equal for two commands to render the same prompt."""

    template_hash: str
    """SHA-256 of the template's text and the special tokens it can print."""
    golden_prompt_ids: tuple[int, ...]
    """The ids of one fixed chat with its generation prompt: the template and tokenizer at work."""

    def to_json(self) -> JsonObject:
        """Return the identity as JSON values."""
        return {
            "template_hash": self.template_hash,
            "golden_prompt_ids": list(self.golden_prompt_ids),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TemplateIdentity:
        """Read what `to_json` wrote.

        Raises:
            LlmtuneError: it is something else.
        """
        try:
            return cls(str(value["template_hash"]), tuple(value["golden_prompt_ids"]))
        except (KeyError, TypeError) as error:
            raise LlmtuneError(
                f"{MANIFEST_NAME} of the adapter: its template is not recorded as llmtune does "
                f"({type(error).__name__}: {error}). {COPY_AGAIN}"
            ) from None


def template_fingerprint(tokenizer: PreTrainedTokenizerFast) -> TemplateIdentity:
    """Return the identity of a tokenizer's chat template, for the adapter's manifest.

    Without a template the golden prompt is the plain text, so the tokenizer is still compared.
    """
    special = {"bos": str(tokenizer.bos_token), "eos": str(tokenizer.eos_token)}
    template = tokenizer.chat_template or ""
    if template:
        try:
            ids = apply_chat_template(
                tokenizer,
                GOLDEN_MESSAGES,
                add_generation_prompt=True,
                tokenize=True,
                date=GOLDEN_DATE,
            )
        except TEMPLATE_ERRORS as error:
            raise LlmtuneError(
                f"the chat template cannot render a plain two-turn chat: {error}"
            ) from error
    else:
        ids = encode_plain(tokenizer, "\n".join(turn["content"] for turn in GOLDEN_MESSAGES))
    return TemplateIdentity(
        template_hash=hash_json({"template": template, "special": special}),
        golden_prompt_ids=tuple(ids),
    )


def require_same_template(
    tokenizer: PreTrainedTokenizerFast, identity: TemplateIdentity, *, is_of_the_day: bool = False
) -> None:
    """Refuse a tokenizer that would render a different prompt than the one of training.

    Args:
        tokenizer: as it is now.
        identity: as it was in training.
        is_of_the_day: the recorded golden prompt holds the day it was recorded on, so that only
            the template itself can be compared.

    Raises:
        LlmtuneError: what differs: the template's text, or the ids it leads to.
    """
    now = template_fingerprint(tokenizer)
    if now == identity:
        return
    if now.template_hash == identity.template_hash and is_of_the_day:
        return
    what = "chat template or special tokens have"
    if now.template_hash == identity.template_hash:
        what = "tokenization has"
    raise LlmtuneError(
        f"the tokenizer's {what} changed since this adapter was trained (template "
        f"{identity.template_hash[:12]}, now {now.template_hash[:12]}; the golden prompt is "
        f"{'the same' if now.golden_prompt_ids == identity.golden_prompt_ids else 'different'}). "
        "The model would see prompts it was not trained on: use the tokenizer files saved with "
        "the adapter"
    )


def require_trained_template(tokenizer: PreTrainedTokenizerFast, adapter_dir: Path) -> None:
    """Refuse a tokenizer that renders a different prompt than the adapter in `adapter_dir` learned.

    If the template prints the date, it prints the one of the training from now on. An adapter that
    llmtune did not write records no template, so there is nothing to compare.

    Raises:
        LlmtuneError: what differs.
    """
    if not (adapter_dir / MANIFEST_NAME).is_file():
        return
    recorded = read_adapter_manifest(adapter_dir).get("template")
    if recorded is None:
        return
    day = recorded.get("date")
    if day is not None:
        fix_template_date(tokenizer, day)
    require_same_template(
        tokenizer,
        TemplateIdentity.from_json(recorded),
        is_of_the_day=day is None and prints_date(tokenizer),
    )
