"""How far the train texts lie from the evaluation rows, from general text and other domains."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from llmtune.evaluation.diagnosis.distances import kernel_discrepancy, proxy_a_distance
from llmtune.evaluation.diagnosis.plan import Diagnosis, refuse
from llmtune.evaluation.diagnosis.results import PairShift, ShiftResult, TextSet
from llmtune.evaluation.diagnosis.states import quarter_layers, read_states
from llmtune.evaluation.diagnosis.subject import (
    DiagnosisSettings,
    hash_ids,
    model_inputs,
    pick,
)
from llmtune.evaluation.scored_model import ScoredModel
from llmtune.io.fingerprint import hash_json
from llmtune.scoring.perplexity import encode_passage

MAX_TEXTS = 300
MAX_GENERAL_TEXTS = 100
MAX_TOKENS = 128
MIN_TEXTS = 10
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
TRAIN = "train"
GENERAL = "general"


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
        return float(self.losses.sum() / np.log(2) / self.encoded.num_bytes)


def plan_shift(
    scored: ScoredModel, texts: Mapping[str, Sequence[str]], settings: DiagnosisSettings
) -> Diagnosis[ShiftResult]:
    """Plan to compare the train texts with every other set of texts, under the base alone.

    Texts are plain, without any chat template, which would tell sets apart by itself. At most 300
    of each set (100 general ones) and their first 128 tokens are read; a set of fewer than 10 is
    left out. Every pair `train-<set>`: the gap of the base's loss, in nats a token and in bits a
    byte (train minus the other); proxy A-distance and MMD of the mean-pooled states of the middle
    layer.

    Args:
        texts: `train` first, then `evaluation`, `general` and suites by name.
    """
    encoded = {}
    for name, given in texts.items():
        limit = MAX_GENERAL_TEXTS if name == GENERAL else MAX_TEXTS
        kept = _encode(scored, pick([t for t in given if t.strip()], limit, settings.seed))
        if len(kept.sequences) >= MIN_TEXTS:
            encoded[name] = kept
    if TRAIN not in encoded or len(encoded) < 2:
        return refuse(ShiftResult, f"needs {MIN_TEXTS} train texts and as many of another set")
    inputs = model_inputs(scored, with_adapter=False) | {
        "items": hash_json({name: hash_ids(each.sequences) for name, each in encoded.items()}),
    }
    tokens = sum(len(ids) for each in encoded.values() for ids in each.sequences)
    measure = partial(_measure, scored, encoded, settings, inputs)
    return Diagnosis(ShiftResult, inputs, tokens, measure)


def _measure(
    scored: ScoredModel,
    encoded: Mapping[str, _Encoded],
    settings: DiagnosisSettings,
    inputs: Mapping[str, str],
) -> ShiftResult:
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


def _encode(scored: ScoredModel, texts: Sequence[str]) -> _Encoded:
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


def _middle(scored: ScoredModel) -> int:
    quarters = quarter_layers(scored.model)
    return quarters[(len(quarters) - 1) // 2]


def _describe(read: _Read) -> TextSet:
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
