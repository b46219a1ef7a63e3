"""Before the adapter is attached: the text that the base writes itself, and what it computes."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerFast

from llmtune.data.example import Example
from llmtune.data.open_prompts import OPEN_PROMPTS, OPENERS
from llmtune.data.render import render_messages
from llmtune.errors import LlmtuneError
from llmtune.io.cached import cache_dir
from llmtune.io.fingerprint import code_fingerprint, hash_json
from llmtune.io.kept_json import read_kept, write_kept
from llmtune.io.progress import progress_bar
from llmtune.io.run_dir import atomic_write_json
from llmtune.models.live import LiveModel
from llmtune.scoring.batches import choose_token_budget
from llmtune.scoring.generate import Decoding, generate_texts
from llmtune.scoring.live import facts_of, runs_own_code
from llmtune.training.protect.config import (
    KEPT_ROWS,
    OWN_TEXT,
    KlToBaseConfig,
    ProtectConfig,
)
from llmtune.training.protect.penalties import ProtectionRequest, probe_base

log = logging.getLogger("llmtune")

OWN_TEXT_SOURCE = "the base's own text"
TEMPERATURE = 1.0
WRITING_ROOMS = ("training/protect", "scoring", "data", "adapters", "models", "ops")
REPLAY_TOKENS = 128
"""Tokens of a row that the base writes to be trained on."""


@dataclass(frozen=True)
class PreparedProtection:
    """The penalties' request, and rows to add to the training data; either may be empty."""

    request: ProtectionRequest | None = None
    replay: tuple[Example, ...] = ()
    num_held: int = 0

    def join(self, examples: Sequence[Example]) -> Sequence[Example]:
        """Return the training rows with the replayed ones behind them, as a source of their own."""
        if not self.replay:
            return examples
        rows = list(examples)
        source = max(row.source_index for row in rows) + 1
        return [*rows, *(replace(row, source_index=source) for row in self.replay)]

    def describe(self) -> dict[str, int] | None:
        """Return what the manifest records; None if nothing is protected."""
        if self.request is None:
            return None
        return {"replayed_rows": len(self.replay), "rows_held_to_base": self.num_held}


def prepare_protection(
    protect: ProtectConfig,
    loaded: LiveModel,
    *,
    num_rows: int,
    general: Sequence[Example] | None,
    seed: int,
    own_text_path: Path,
) -> PreparedProtection:
    """Write the base's own text if it is asked for, and record what the base computes.

    Args:
        protect: what to protect with.
        loaded: the base, without an adapter.
        num_rows: training rows, to which the replayed ones are added.
        general: the rows of `protect.kl_to_base.source`, if it is a file.
        seed: decides what the base writes.
        own_text_path: JSON file that keeps what the base wrote.

    Raises:
        LlmtuneError: the file to hold the model to has no row of two tokens.
    """
    if not protect.is_on:
        return PreparedProtection()
    replay: tuple[Example, ...] = ()
    if protect.replay is not None and protect.replay.source == OWN_TEXT:
        count = rows_for_share(num_rows, protect.replay.share)
        replay = _write(loaded, seed, num_rows=count, num_tokens=REPLAY_TOKENS)
    held: tuple[Example, ...] = ()
    if protect.kl_to_base is not None:
        held = _rows_to_hold(protect.kl_to_base, general, loaded, seed)
    if protect.needs_own_text:
        _keep(own_text_path, loaded, {"replay": replay, "kl_to_base": held})
    probe = probe_base(loaded.model, held[0]) if held else None
    return PreparedProtection(ProtectionRequest(protect, held, probe), replay, len(held))


def _rows_to_hold(
    penalty: KlToBaseConfig, general: Sequence[Example] | None, loaded: LiveModel, seed: int
) -> tuple[Example, ...]:
    if general is None:
        return _write(loaded, seed, num_rows=KEPT_ROWS, num_tokens=penalty.max_length)
    cut = (row.input_ids[: penalty.max_length] for row in general)
    rows = [as_example(ids, "protect", line) for line, ids in enumerate(cut, 1) if len(ids) > 1]
    if not rows:
        raise LlmtuneError("protect.kl_to_base.source: has no row of at least two tokens")
    return tuple(rows)


def _keep(path: Path, loaded: LiveModel, rows: Mapping[str, Sequence[Example]]) -> None:
    """Leave what the base wrote in the run directory, to be looked at."""
    texts = {
        name: [loaded.tokenizer.decode(row.input_ids) for row in some if row.source != "protect"]
        for name, some in rows.items()
    }
    atomic_write_json(path, texts)


def _write(loaded: LiveModel, seed: int, *, num_rows: int, num_tokens: int) -> tuple[Example, ...]:
    """Return rows that the base writes, or wrote for an earlier run that asked for the same."""
    asked = {
        "model": hash_json(facts_of(loaded, loaded.identity)),
        "rows": [seed, num_rows, num_tokens],
        "code": code_fingerprint(WRITING_ROOMS),
    }
    path = cache_dir() / "own_text" / f"{hash_json(asked)[:32]}.json"
    is_kept = not runs_own_code(loaded.model)
    written = read_kept(path) if is_kept else None
    if written is not None:
        log.info("protect: the %d rows that the base wrote for an earlier run", num_rows)
    else:
        log.info("protect: the base writes %d rows of its own", num_rows)
        rows = write_own_text(
            loaded.model,
            loaded.tokenizer,
            num_rows=num_rows,
            num_tokens=num_tokens,
            seed=seed,
        )
        written = [list(row.input_ids) for row in rows]
        if is_kept:
            write_kept(path, written, "what the base wrote is")
    rows = [as_example(ids, OWN_TEXT_SOURCE, line) for line, ids in enumerate(written, start=1)]
    return tuple(row for row in rows if len(row.input_ids) > 1)


def write_own_text(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    *,
    num_rows: int,
    num_tokens: int,
    seed: int,
) -> list[Example]:
    """Sample rows from the model: prose from short openers, and answers where it is a chat model.

    Every token of a row is trained or compared, its opener included. The rows are a function of
    the model and the seed.

    Args:
        num_tokens: length of each row, its opener included; a row may end earlier by itself.
    """
    openers = _openers(tokenizer)
    prompts = [openers[row % len(openers)] for row in range(num_rows)]
    longest = max(map(len, prompts))
    decoding = Decoding(
        max_new_tokens=max(num_tokens - longest, num_tokens // 2),
        stop_token_ids=tuple({tokenizer.eos_token_id} - {None}),
        temperature=TEMPERATURE,
        seed=seed,
    )
    with progress_bar("protect", num_rows, unit="rows") as bar:
        written = generate_texts(
            model,
            tokenizer,
            prompts,
            decoding,
            token_budget=choose_token_budget(model),
            on_progress=bar.update,
        )
    rows = [[*prompt, *text.token_ids] for prompt, text in zip(prompts, written, strict=True)]
    return [as_example(ids, OWN_TEXT_SOURCE, line) for line, ids in enumerate(rows, start=1)]


def as_example(ids: Sequence[int], source: str, line: int) -> Example:
    """Return token ids as a row of which every token counts."""
    return Example(list(ids), list(ids), source, line)


def rows_for_share(num_rows: int, share: float) -> int:
    """Return how many rows make up `share` of all when added to `num_rows` others."""
    return math.ceil(num_rows * share / (1 - share))


def _openers(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Return short beginnings of rows: prose, alternating with questions if there is a template."""
    lead = tokenizer("", add_special_tokens=True)["input_ids"]
    prose = [[*lead, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in OPENERS]
    if not tokenizer.chat_template:
        return prose
    chat = [
        render_messages(
            tokenizer, [{"role": "user", "content": question}], add_generation_prompt=True
        )
        for question in OPEN_PROMPTS
    ]
    pairs = zip(prose, chat, strict=False)
    return [list(ids) for pair in pairs for ids in pair]
