"""Comparing a merged directory, loaded from disk, with the live adapter model it came from."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from llmtune.checks.merge_result import GreedyDivergence, LabelDifference, VerifyResult
from llmtune.checks.modules import ComparedModules, compare_modules
from llmtune.checks.prompts import ComparedPrompts
from llmtune.data.example import IGNORE_INDEX
from llmtune.errors import LlmtuneError
from llmtune.io.json_files import blamed_on, read_json_object
from llmtune.io.progress import progress_bar
from llmtune.io.safetensors import CheckpointIndex
from llmtune.models.checkpoint import CONFIG_NAME
from llmtune.models.quantization.describe import keep_differentiable
from llmtune.models.quiet import quiet_loading
from llmtune.models.skeleton import require_known_code
from llmtune.scoring.batches import (
    adapter_disabled,
    batch_by_length,
    choose_token_budget,
    has_adapter,
    inference,
    length_switch,
    model_device,
    pad_rows,
    rows_budget,
    run_forward,
)
from llmtune.scoring.causal import sees_later_tokens
from llmtune.scoring.divergence import compare_distributions
from llmtune.scoring.generate import Decoding, Generation, generate_texts
from llmtune.scoring.likelihood import score_continuations
from llmtune.scoring.prefix import NO_PREFIX, SharedPrefix, common_prefix, share_prefix
from llmtune.scoring.requests import ContinuationRequest

MERGE_AGAIN = "merge again"
HELD_AT_ONCE = 4
"""Tensors of logits that a batch holds: of three models, and a copy."""
MAX_MEAN_LOSS = 100.0  # nats; keeps the perplexity of a broken model a number


def verify_merge(
    live: nn.Module,
    merged_dir: Path,
    prompts: ComparedPrompts,
    *,
    decoding: Decoding,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> VerifyResult:
    """Load `merged_dir` with stock transformers and compare it with the live adapter model.

    Args:
        live: the adapter model (or any causal LM) in the dtype it is to be compared in.
        merged_dir: the merged directory, with its tokenizer.
        prompts: token ids within the vocabulary.
        decoding: how many tokens of the open prompts' answers, and what stops them; greedy.
        dtype: what the merged model is computed in; None is its own on disk.
        trust_remote_code: whether the merged model may run the Python code that it came with.

    Raises:
        LlmtuneError: the merged directory cannot be loaded, or its vocabulary differs.
    """
    assert decoding.temperature == 0, "answers are compared greedily"
    merged = load_merged(
        merged_dir,
        dtype=dtype,
        device=model_device(live),
        trust_remote_code=trust_remote_code,
    )
    with blamed_on(merged_dir / "tokenizer.json", "transformers", advice=MERGE_AGAIN):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(merged_dir), local_files_only=True)
    compared = _compare_sequences(live, merged, prompts.sequences)
    label_differences = _compare_labels(live, merged, prompts.labels)
    if prompts.sequences and sees_later_tokens(live, prompts.sequences[0]):
        prompts = replace(prompts, open_prompts=())  # it cannot write from left to right
    divergences = _compare_answers(live, merged, tokenizer, prompts.open_prompts, decoding)
    stored_dtype = _stored_dtype(merged_dir)
    modules = ComparedModules()
    if stored_dtype is not None:
        modules = compare_modules(live, merged, prompts.sequences, stored_dtype=stored_dtype)
    return VerifyResult(
        dtype=_name(next(merged.parameters()).dtype),
        num_tokens=compared.num_tokens,
        max_logit_difference=compared.largest,
        kl=compared.kl / max(1, compared.num_tokens),
        top1_agreement=compared.num_agreeing / compared.num_tokens if compared.num_tokens else 1.0,
        live_perplexity=compared.perplexity(compared.live_loss),
        merged_perplexity=compared.perplexity(compared.merged_loss),
        num_labels=len(prompts.labels),
        num_same_labels=len(prompts.labels) - len(label_differences),
        label_differences=tuple(label_differences),
        num_open_prompts=len(prompts.open_prompts),
        num_same_texts=len(prompts.open_prompts) - len(divergences),
        divergences=tuple(divergences),
        wrong_modules=modules.wrong,
        bypassed_modules=modules.bypassed,
        base_kl=compared.base_kl / max(1, compared.num_tokens) if has_adapter(live) else None,
        stored_dtype=None if stored_dtype is None else _name(stored_dtype),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _stored_dtype(merged_dir: Path) -> torch.dtype | None:
    """Return the coarsest of the types in which a directory's weights are rounded.

    None if they are quantized.
    """
    index = CheckpointIndex.open(merged_dir)
    names = {entry.dtype for entry in index.tensors.values()}
    if "U8" in names:
        return None
    for name, dtype in (("BF16", torch.bfloat16), ("F16", torch.float16)):
        if name in names:
            return dtype
    return torch.float32


def load_merged(
    merged_dir: Path,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load a merged directory with stock transformers, from local files only.

    Quantized layers compute as those of a live model do, so that only what was saved can differ.

    Raises:
        LlmtuneError: transformers cannot load it, or leaves some of its weights uninitialised.
    """
    config = read_json_object(merged_dir / CONFIG_NAME)
    require_known_code(str(merged_dir), config, trust_remote_code=trust_remote_code)
    with blamed_on(merged_dir, "transformers", advice=MERGE_AGAIN), quiet_loading():
        model, info = AutoModelForCausalLM.from_pretrained(
            merged_dir,
            dtype=dtype or "auto",
            local_files_only=True,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
        )
    problems = {kind: info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if problems["unexpected_keys"] and "text_config" in config:
        del problems["unexpected_keys"]  # the parts for images of a model whose text was loaded
    if any(problems.values()):
        raise LlmtuneError(
            f"{merged_dir} does not fit its config: "
            + "; ".join(
                f"{kind}: {sorted(map(str, keys))[:4]}" for kind, keys in problems.items() if keys
            )
        )
    keep_differentiable(model)
    return model.to(device).eval()


class _Logits(NamedTuple):
    """Logits [P, V] of the same positions, in the models' dtype; `base` if there is an adapter."""

    live: torch.Tensor
    merged: torch.Tensor
    base: torch.Tensor | None = None


@dataclass
class _Compared:
    """Sums over every position of the sequences; losses are in nats, over all but the first."""

    largest: float = 0.0
    kl: float = 0.0
    base_kl: float = 0.0
    num_agreeing: int = 0
    num_tokens: int = 0
    live_loss: float = 0.0
    merged_loss: float = 0.0
    num_predicted: int = 0

    def perplexity(self, loss: float) -> float:
        return math.exp(min(loss / max(1, self.num_predicted), MAX_MEAN_LOSS))

    def add_positions(self, logits: _Logits, times: int = 1) -> None:
        """Add positions that `times` of the sequences have."""
        live, merged, base = logits
        if live.shape != merged.shape:
            raise LlmtuneError(
                f"the merged model has {merged.shape[-1]} tokens in its vocabulary and "
                f"the adapter model {live.shape[-1]}; their bases differ"
            )
        self.largest = max(self.largest, (live.float() - merged.float()).abs().max().item())
        kl, flipped = compare_distributions(live, merged)
        self.kl += times * float(kl.sum())
        self.num_agreeing += times * (len(live) - int(flipped.sum()))
        self.num_tokens += times * len(live)
        if base is not None:
            self.base_kl += times * float(compare_distributions(live, base)[0].sum())

    def add_losses(self, logits: _Logits, targets: Sequence[int], times: int = 1) -> None:
        """Add the loss of each position's next token; IGNORE_INDEX where there is none."""
        self.live_loss += times * _loss(logits.live, targets)
        self.merged_loss += times * _loss(logits.merged, targets)
        self.num_predicted += times * sum(token != IGNORE_INDEX for token in targets)


@dataclass
class _Reader:
    """One of the models, and what it has run of the beginning that all sequences share."""

    model: nn.Module
    is_base: bool = False
    """Whether its adapter is switched off."""
    prefix: SharedPrefix = NO_PREFIX

    def share(self, sequences: Sequence[Sequence[int]]) -> None:
        """Run the shared beginning, where that is exact."""
        prompts = [tuple(ids) for ids in sequences]
        with self._switched():
            self.prefix = share_prefix(self.model, prompts, longest_answer=0, keep_logits=True)

    @property
    def shared_logits(self) -> torch.Tensor:
        """The logits of the shared beginning, [P, V]."""
        assert self.prefix.logits is not None, "asked for when it was run"
        return self.prefix.logits

    def read(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return the logits of every position of rows that follow the shared beginning, [P, V]."""
        known, device = self.prefix.length, model_device(self.model)
        batch = pad_rows(rows, device, left=False, known=known)
        cache = self.prefix.for_rows(len(rows), device)
        with self._switched():
            logits = run_forward(self.model, batch, cache=cache).logits
        return logits[batch.attention_mask[:, known:].bool()]

    def _switched(self) -> AbstractContextManager[None]:
        return adapter_disabled(self.model) if self.is_base else nullcontext()


def _compare_sequences(
    live: nn.Module, merged: nn.Module, sequences: Sequence[Sequence[int]]
) -> _Compared:
    total = _Compared()
    place = model_device(merged)
    budget = max(1, rows_budget(merged, choose_token_budget(merged)) // HELD_AT_ONCE)
    readers = [_Reader(live), _Reader(merged)]
    if has_adapter(live):
        readers.append(_Reader(live, is_base=True))
    num, shown = len(sequences), progress_bar("check", len(sequences), unit="texts")
    with inference(live), inference(merged), shown as bar:
        known = _share(readers, sequences, budget)
        if known:
            first, targets = sequences[0], [ids[known] for ids in sequences]
            start = _Logits(*(each.shared_logits.to(place) for each in readers))
            last = _Logits(*(each[-1:].expand(num, -1) for each in start[:2]))
            total.add_positions(start, num)
            total.add_losses(start, [*first[1:known], IGNORE_INDEX], num)
            total.add_losses(last, targets)
        for batch in batch_by_length([len(ids) - known for ids in sequences], budget):
            rows = [sequences[index][known:] for index in batch]
            logits = _Logits(*(each.read(rows).to(place) for each in readers))
            total.add_positions(logits)
            total.add_losses(logits, [id for ids in rows for id in (*ids[1:], IGNORE_INDEX)])
            bar.advance(len(rows))
    return total


def _share(readers: Sequence[_Reader], sequences: Sequence[Sequence[int]], most: int) -> int:
    """Run what all sequences begin with once a model, and return how many tokens that is.

    Nothing if the logits of its positions are more than are held at once.
    """
    if not sequences or common_prefix([tuple(ids) for ids in sequences]) > most:
        return 0
    for each in readers:
        each.share(sequences)
    if len({each.prefix.length for each in readers}) > 1:
        for each in readers:
            each.prefix = NO_PREFIX
    return readers[0].prefix.length


def _loss(logits: torch.Tensor, targets: Sequence[int]) -> float:
    """Return the summed negative log-likelihood of the targets, in nats."""
    loss = nn.functional.cross_entropy(
        logits.float(),
        torch.tensor(targets, device=logits.device),
        ignore_index=IGNORE_INDEX,
        reduction="sum",
    )
    return float(loss)


def _compare_labels(
    live: nn.Module, merged: nn.Module, requests: Sequence[ContinuationRequest]
) -> list[LabelDifference]:
    rankings = []
    for model in (live, merged):
        scores = score_continuations(model, requests, token_budget=choose_token_budget(model))
        rankings.append([_rank([one.log_likelihood for one in choices]) for choices in scores])
    return [
        LabelDifference(place, one[0], other[0], one[1], other[1])
        for place, (one, other) in enumerate(zip(*rankings, strict=True))
        if one[0] != other[0]
    ]


def _rank(log_likelihoods: Sequence[float]) -> tuple[int, float]:
    """Return the likeliest choice and its lead over the next best."""
    best = max(range(len(log_likelihoods)), key=log_likelihoods.__getitem__)
    others = [value for place, value in enumerate(log_likelihoods) if place != best]
    return best, log_likelihoods[best] - max(others)


def _compare_answers(
    live: nn.Module,
    merged: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
) -> list[GreedyDivergence]:
    answers: list[list[Generation]] = []
    for model in (live, merged):
        budget = choose_token_budget(model)
        answers.append(generate_texts(model, tokenizer, prompts, decoding, token_budget=budget))
    parted = [
        (place, position, one, other)
        for place, (one, other) in enumerate(zip(*answers, strict=True))
        if (position := _first_difference(one, other)) is not None
    ]
    shared = [[*prompts[place], *one.token_ids[:position]] for place, position, one, _ in parted]
    return [
        GreedyDivergence(
            prompt=place,
            position=position,
            live_token=_token_at(one, position),
            merged_token=_token_at(other, position),
            live_margin=live_margin,
            merged_margin=merged_margin,
            live_text=one.text,
            merged_text=other.text,
        )
        for (place, position, one, other), live_margin, merged_margin in zip(
            parted, _margins(live, shared), _margins(merged, shared), strict=True
        )
    ]


def _first_difference(one: Generation, other: Generation) -> int | None:
    if (one.token_ids, one.stopped) == (other.token_ids, other.stopped):
        return None
    pairs = zip(one.token_ids, other.token_ids, strict=False)
    shorter = min(len(one.token_ids), len(other.token_ids))
    return next((place for place, (a, b) in enumerate(pairs) if a != b), shorter)


def _token_at(answer: Generation, position: int) -> int | None:
    return answer.token_ids[position] if position < len(answer.token_ids) else None


def _margins(model: nn.Module, rows: Sequence[Sequence[int]]) -> list[float]:
    """Return by how much the likeliest token after each row leads, as logits."""
    margins = [0.0] * len(rows)
    lengths, budget = [len(ids) for ids in rows], choose_token_budget(model)
    with inference(model):
        for batch in batch_by_length(lengths, budget, switch=length_switch(model)):
            padded = pad_rows([rows[place] for place in batch], model_device(model), left=True)
            logits = run_forward(model, padded, logits_to_keep=1).logits[:, -1].float()
            for place, (first, second) in zip(batch, logits.topk(2).values.tolist(), strict=True):
                margins[place] = first - second
    return margins
