"""How far the train texts lie from the evaluation rows, from general text and other domains."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from llmtune.evaluation.diagnosis.base import (
    Diagnosis,
    Diagnostic,
    Extent,
    Given,
    Interval,
    Planned,
    refuse,
)
from llmtune.evaluation.diagnosis.shown import (
    Cell,
    Facts,
    Paragraph,
    Section,
    Table,
)
from llmtune.io.fingerprint import hash_json

if TYPE_CHECKING:
    import numpy as np

    from llmtune.evaluation.diagnosis.rows import RowTexts
    from llmtune.evaluation.diagnosis.subject import DiagnosisSettings
    from llmtune.evaluation.tasks.base import Suite
    from llmtune.models.live import LiveModel

MAX_TEXTS = 300
MAX_GENERAL_TEXTS = 100
MAX_TOKENS = 128
MIN_TEXTS = 10
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
TRAIN: Literal["train"] = "train"
EVALUATION: Literal["evaluation"] = "evaluation"
GENERAL = "general"


@dataclass(frozen=True)
class TextSet:
    """One side of a shift: how the base finds these texts. Quantiles are 5, 25, 50, 75, 95 %."""

    num_texts: int
    nats_per_token: float
    bits_per_byte: float
    tokens_per_word: float
    length_quantiles: tuple[float, float, float, float, float]


@dataclass(frozen=True)
class PairShift:
    """The second set against the first: `ppl_gap` is first minus second.

    `pad` is the proxy A-distance (0 the same, 2 always distinguished), `pad_null` the 95 % quantile
    of the same number for two halves of one set. `mmd` is squared and unbiased: it may be negative.
    """

    ppl_gap_nats: float
    ppl_gap_bits_per_byte: float
    pad: float
    pad_interval: Interval
    pad_null: float
    mmd: float
    mmd_p: float
    num_first: int
    num_second: int


@dataclass(frozen=True, kw_only=True)
class ShiftResult(Diagnostic):
    """How far apart the sets of texts lie; pairs are named `train-evaluation`, `train-general`."""

    FILE_NAME: ClassVar[str] = "shift.json"
    sets: dict[str, TextSet]
    pairs: dict[str, PairShift]
    layer: int


class Shift(Diagnosis[ShiftResult]):
    """How far the train texts lie from evaluation, general text and other domains."""

    name = "shift"
    what = "domain shift"
    help = "How far train, evaluation and general text lie"
    extent: ClassVar[Extent] = "full"
    result = ShiftResult

    def plan(self, given: Given) -> Planned[ShiftResult]:
        """Plan to compare the sets of texts under the base."""
        from llmtune.evaluation.diagnosis.rows import read_row_texts

        train = read_row_texts(given.data, TRAIN)
        evaluation = read_row_texts(given.data, EVALUATION)
        texts = shift_texts(train, evaluation, given.suites)
        return plan_shift(given.scored, texts, given.diagnosis_settings)

    def section(self, found: ShiftResult, facts: Facts) -> Section | None:
        """Show every pair of sets, and the sets."""
        write = facts.write
        pairs = tuple(
            (
                name.replace("-", " – "),
                write.nats(pair.ppl_gap_nats),
                write.nats(pair.ppl_gap_bits_per_byte),
                Cell(
                    f"{pair.pad:.2f}", f"[{pair.pad_interval[0]:.2f}, {pair.pad_interval[1]:.2f}]"
                ),
                f"{pair.pad_null:.2f}",
                write.number(pair.mmd, 3),
                write.p(pair.mmd_p),
            )
            for name, pair in found.pairs.items()
        )
        sets = tuple(
            (
                name,
                write.count(each.num_texts),
                write.nats(each.nats_per_token),
                write.nats(each.bits_per_byte),
                f"{each.tokens_per_word:.2f}",
                f"{write.count(each.length_quantiles[0])} to "
                f"{write.count(each.length_quantiles[4])}",
            )
            for name, each in found.sets.items()
        )
        note = (
            f"Of the base alone, layer {found.layer}. A proxy A-distance of 0 means that a linear "
            "classifier cannot tell the sets apart, 2 that it always can."
        )
        return Section(
            "How far apart are the texts?",
            (
                Table(pairs, PAIR_HEAD),
                Paragraph(note, is_note=True),
                Table(sets, SET_HEAD, summary="The sets of texts"),
            ),
        )


PAIR_HEAD = (
    "Pair",
    "Perplexity gap, nats/token",
    "bits/byte",
    "Proxy A-distance",
    "of halves of one set",
    "MMD²",
    "p",
)
SET_HEAD = ("Set", "Texts", "nats/token", "bits/byte", "tokens/word", "Length, 5 to 95 %")


@dataclass(frozen=True)
class _Encoded:
    """Texts as token ids (cut at 128), with bytes and words of what was kept."""

    sequences: list[list[int]]
    num_bytes: int
    num_words: int


@dataclass(frozen=True)
class _Read:
    """What the base makes of a set: losses [N] in nats, states [N, H]."""

    encoded: _Encoded
    losses: np.ndarray
    states: np.ndarray

    @property
    def nats_per_token(self) -> float:
        tokens = sum(len(ids) - 1 for ids in self.encoded.sequences)
        return float(self.losses.sum() / tokens)

    @property
    def bits_per_byte(self) -> float:
        return float(self.losses.sum() / math.log(2) / self.encoded.num_bytes)


def shift_texts(
    train: Sequence[RowTexts], evaluation: Sequence[RowTexts], suites: Sequence[Suite]
) -> dict[str, list[str]]:
    """Return the sets of plain texts between which a shift is measured.

    Without what all rows of a source (all prompts of a suite) begin and end with, and without
    passages of fewer than five words where a row has longer ones: a label behind every sentence
    would tell any two sets apart. Transfer suites stand under their names.
    """
    from llmtune.evaluation.diagnosis.rows import find_frame
    from llmtune.evaluation.diagnosis.subject import asking_suites, general_texts

    sets = {
        TRAIN: [_domain_text(row) for row in train],
        EVALUATION: [_domain_text(row) for row in evaluation],
        GENERAL: general_texts(suites),
    }
    for suite in asking_suites(suites, ("transfer",)):
        prompts = [item.prompt for item in suite.items]
        frame = find_frame(prompts)
        sets[suite.name] = [frame.own_words(prompt) for prompt in prompts]
    return {name: texts for name, texts in sets.items() if texts}


def _domain_text(row: RowTexts) -> str:
    from llmtune.evaluation.diagnosis.rows import MIN_OWN_WORDS

    telling = [text for text in row.own if len(text.split()) >= MIN_OWN_WORDS]
    return "\n".join(telling or row.passages)


def plan_shift(
    scored: LiveModel, texts: Mapping[str, Sequence[str]], settings: DiagnosisSettings
) -> Planned[ShiftResult]:
    """Plan to compare the train texts with every other set of texts, under the base alone.

    Texts are plain, without any chat template, which would tell sets apart by itself. At most 300
    of each set (100 general ones) and their first 128 tokens are read; a set of fewer than 10 is
    left out. Every pair `train-<set>`: the gap of the base's loss, in nats a token and in bits a
    byte (train minus the other); proxy A-distance and MMD of the mean-pooled states of the middle
    layer.

    Args:
        texts: `train` first, then `evaluation`, `general` and suites by name.
    """
    from llmtune.evaluation.diagnosis.subject import hash_ids, model_inputs, pick

    encoded = {}
    for name, given in texts.items():
        limit = MAX_GENERAL_TEXTS if name == GENERAL else MAX_TEXTS
        kept = _encode(scored, pick([t for t in given if t.strip()], limit, settings.seed))
        if len(kept.sequences) >= MIN_TEXTS:
            encoded[name] = kept
    if TRAIN not in encoded or len(encoded) < 2:
        return refuse(ShiftResult, f"needs {MIN_TEXTS} train texts and as many of a different set")
    inputs = model_inputs(scored, with_adapter=False) | {
        "items": hash_json({name: hash_ids(each.sequences) for name, each in encoded.items()}),
    }
    tokens = sum(len(ids) for each in encoded.values() for ids in each.sequences)
    measure = partial(_measure, scored, encoded, settings, inputs)
    return Planned(ShiftResult, inputs, tokens, measure)


def _measure(
    scored: LiveModel,
    encoded: Mapping[str, _Encoded],
    settings: DiagnosisSettings,
    inputs: Mapping[str, str],
) -> ShiftResult:
    from llmtune.evaluation.diagnosis.states import read_states

    started = time.perf_counter()
    layer = _middle(scored)
    read = {}
    for name, each in encoded.items():
        states = read_states(
            scored.model,
            each.sequences,
            (layer,),
            token_budget=settings.budget(scored),
            with_losses=True,
            on_progress=settings.report(f"shift, {name}", len(each.sequences)),
        )
        assert states.losses is not None
        read[name] = _Read(each, states.losses, states.mean[layer])
    others = [name for name in read if name != TRAIN]
    pairs = {f"{TRAIN}-{name}": _compare(read[TRAIN], read[name], settings) for name in others}
    return ShiftResult(
        inputs=inputs,
        seconds=time.perf_counter() - started,
        sets={name: _describe(each) for name, each in read.items()},
        pairs=pairs,
        layer=layer,
    )


def _encode(scored: LiveModel, texts: Sequence[str]) -> _Encoded:
    from llmtune.scoring.requests import encode_passage

    sequences, num_bytes, num_words = [], 0, 0
    for text in texts:
        ids = list(encode_passage(scored.tokenizer, text).token_ids)
        if len(ids) > MAX_TOKENS:
            text = scored.tokenizer.decode(ids[:MAX_TOKENS], skip_special_tokens=True)
        passage = encode_passage(scored.tokenizer, text)
        kept = list(passage.token_ids)[:MAX_TOKENS]
        if len(kept) > 1:
            sequences.append(kept)
            num_bytes += passage.num_bytes
            num_words += len(text.split())
    return _Encoded(sequences, num_bytes, num_words)


def _middle(scored: LiveModel) -> int:
    from llmtune.evaluation.diagnosis.states import quarter_layers

    quarters = quarter_layers(scored.model)
    return quarters[(len(quarters) - 1) // 2]


def _describe(read: _Read) -> TextSet:
    import numpy as np

    lengths = [len(ids) for ids in read.encoded.sequences]
    quantiles = np.quantile(lengths, QUANTILES).tolist()
    return TextSet(
        num_texts=len(lengths),
        nats_per_token=read.nats_per_token,
        bits_per_byte=read.bits_per_byte,
        tokens_per_word=sum(lengths) / max(1, read.encoded.num_words),
        length_quantiles=tuple(quantiles),
    )


def _compare(first: _Read, second: _Read, settings: DiagnosisSettings) -> PairShift:
    from llmtune.evaluation.diagnosis.distances import kernel_discrepancy, proxy_a_distance

    separation = proxy_a_distance(
        first.states, second.states, seed=settings.seed, confidence=settings.confidence
    )
    discrepancy = kernel_discrepancy(first.states, second.states, seed=settings.seed)
    return PairShift(
        ppl_gap_nats=first.nats_per_token - second.nats_per_token,
        ppl_gap_bits_per_byte=first.bits_per_byte - second.bits_per_byte,
        pad=separation.pad,
        pad_interval=separation.interval,
        pad_null=separation.null,
        mmd=discrepancy.mmd,
        mmd_p=discrepancy.p_value,
        num_first=len(first.states),
        num_second=len(second.states),
    )
