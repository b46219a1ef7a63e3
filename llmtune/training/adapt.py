"""From a base to a saved adapter: what comes before `train_adapter`, and what comes after it."""

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, get_args

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from llmtune.adapters.base import Adapter
from llmtune.adapters.inject import InjectionTable, inject_adapter
from llmtune.adapters.saved import save_adapter
from llmtune.adapters.starts import SampleRow
from llmtune.data.example import IGNORE_INDEX, Example, PreparedData
from llmtune.data.template import template_fingerprint
from llmtune.errors import LlmtuneError
from llmtune.io.environment import versions
from llmtune.io.fingerprint import JsonObject, hash_json
from llmtune.io.processes import ALONE, Processes
from llmtune.io.run_dir import RunDir
from llmtune.io.sizes import format_in
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.config import ModelConfig
from llmtune.models.fast_paths import switched_off
from llmtune.models.hardware import device_name, why_threads_wait
from llmtune.models.live import LiveModel
from llmtune.models.load import load_model
from llmtune.models.quantization.config import is_quantized
from llmtune.models.quantization.describe import QuantizationTable
from llmtune.models.template_date import template_date_of
from llmtune.scoring.batches import choose_token_budget, position_limit
from llmtune.scoring.generate import Decoding, generate_texts
from llmtune.training.protect.config import ProtectConfig
from llmtune.training.protect.prepare import PreparedProtection, prepare_protection
from llmtune.training.request import Technique, TrainRequest, TrainResult
from llmtune.training.rows import hash_epochs
from llmtune.training.sharding import borrowing, lend, shard_base
from llmtune.training.trainable import require_trainable

NUM_PROMPTS = 8
NUM_LOOKED_AT = 64
"""Rows among which those with the shortest answers are asked."""
MAX_NEW_TOKENS = 256
SLACK_TOKENS = 16
log = logging.getLogger("llmtune")
MILLION = 1e6


class StopCheck(TypedDict):
    """How many answers ended by themselves."""

    stopped: int
    asked: int
    max_new_tokens: int


@dataclass(frozen=True)
class TrainRows:
    """The prepared rows of a training."""

    train: PreparedData
    evaluation: PreparedData
    general: PreparedData | None = None
    """Rows of `protect.kl_to_base.source`, if it is a file."""


class TrainRecord(TypedDict):
    """What is recorded of a training beside `TrainResult`."""

    stop_check: StopCheck | None
    order_hash: str
    """Of which rows were seen in which order: a function of the data and the seed alone."""
    protect: dict[str, int] | None
    adapter_bytes: int
    injection: JsonObject
    quantization: dict[str, Any]
    device: str
    dtype: str
    attention: str


@dataclass(frozen=True)
class AdaptedBase:
    """A loaded base with a fresh adapter, ready for `train_adapter`."""

    request: TrainRequest
    loaded: LiveModel
    rows: TrainRows
    table: InjectionTable
    protection: PreparedProtection

    def save(self, result: TrainResult, config: Mapping[str, Any], batch_size: int) -> TrainRecord:
        """Save the trained adapter with what it belongs to, and check that its answers end.

        Args:
            result: of `train_adapter`.
            config: the whole config as JSON values, to be recorded in the adapter's manifest.
            batch_size: rows of an optimizer step.
        """
        loaded, directory = self.loaded, self.request.run.adapter_dir
        date = template_date_of(loaded.tokenizer)
        template = template_fingerprint(loaded.tokenizer).to_json()
        manifest: dict[str, Any] = {
            "base": loaded.source.as_record(),
            "template": {**template, **({} if date is None else {"date": date})},
            "data_fingerprint": self.rows.train.fingerprint,
            "stop_token_ids": list(loaded.stop_token_ids),
            "versions": versions(),
            "config": dict(config),
        }
        save_adapter(self.request.model, directory, manifest, tokenizer=loaded.tokenizer)
        return {
            "stop_check": self._check_stops(),
            "order_hash": self._order_hash(result.steps, batch_size),
            "protect": self.protection.describe(),
            "adapter_bytes": sum(f.stat().st_size for f in directory.rglob("*") if f.is_file()),
            "injection": self.table.to_dict(),
            "quantization": dataclasses.asdict(loaded.quantized),
            "device": str(loaded.device),
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "attention": loaded.attention,
        }

    def _check_stops(self) -> StopCheck | None:
        train, evaluation = self.rows.train.examples, self.rows.evaluation.examples
        asked: Sequence[Example] = evaluation if len(evaluation) else train
        request, loaded = self.request, self.loaded
        with ExitStack() as stack:
            if request.is_sharded:
                stack.enter_context(borrowing(request.model, request.processes))
            return check_stops(request.model, loaded.tokenizer, asked, loaded.stop_token_ids)

    def help_saving(self) -> None:
        """Lend this process's part of a sharded base to the first one, which checks the answers."""
        if self.request.is_sharded:
            lend(self.request.model, self.request.processes)

    def own_text_hash(self) -> str:
        """Return the hash of the rows that protection added or holds the model to."""
        request = self.protection.request
        rows = [*self.protection.replay, *(() if request is None else request.rows)]
        return hash_json([row.input_ids for row in rows])

    def _order_hash(self, steps: int, batch_size: int) -> str:
        num_rows = len(self.request.train)
        num_epochs = math.ceil(steps / math.ceil(num_rows / batch_size))
        epochs = hash_epochs(num_rows, self.request.seed, num_epochs)
        return hash_json({"mixture": self.rows.train.order_hash, "epochs": epochs})


def adapt_base(  # noqa: PLR0913 - a section of the config each
    source: Checkpoint,
    model: ModelConfig,
    adapter: Adapter,
    protect: ProtectConfig,
    rows: TrainRows,
    *,
    packing: Literal["auto", "on", "off"],
    run: RunDir,
    seed: int,
    identity: Mapping[str, str],
    processes: Processes = ALONE,
    shard: bool = False,
) -> AdaptedBase:
    """Load and quantize the base, let it write its own text if asked, and inject the adapter.

    Args:
        source: the base's checkpoint.
        model: how it is loaded.
        adapter: what is injected.
        protect: what keeps the adapted model near its base.
        rows: what it is trained on.
        packing: whether rows may share a batch without padding.
        run: the run's directory.
        seed: decides the adapter's start, the order of the rows, and dropout.
        identity: hashes of base, data and config: in every checkpoint, and compared on resume.
        processes: those that train it together.
        shard: cut the base over them, if they are many; they are connected then.
    """
    _require_seen(adapter.token_rows, rows.train.examples)
    is_sharded = shard and processes.are_many
    loaded = load_model(model, source, stays_mapped=is_sharded)
    if adapter.token_rows and not _is_tied(loaded.model):
        _require_graded(adapter.token_rows, rows.train.examples)
    _log_lines(_describe_loaded(loaded))
    waiting = why_threads_wait(loaded.device)
    if waiting is not None:
        log.warning("%s", waiting)
    protection = prepare_protection(
        protect,
        loaded,
        num_rows=len(rows.train.examples),
        general=None if rows.general is None else rows.general.examples,
        seed=seed,
        own_text_path=run.own_text_path,
    )
    torch.manual_seed(seed)
    injected = inject_adapter(
        loaded.model,
        adapter,
        base_fingerprint=loaded.fingerprint,
        rows=_sample(rows.train.examples, adapter.num_sampled),
    )
    _log_lines(_describe_injected(injected.table))
    off = dict(_switched_off(loaded, protect, packing))
    if is_sharded:
        if processes.is_first:  # while it sees the weights that a layer reads
            require_trainable(injected.model, rows.train.examples[0].input_ids)
        processes.meet()
        table = shard_base(injected.model, loaded.device, processes)
        log.info("%s", table.describe(processes.world_size))
        off["fused_blocks"] = "the base is sharded"
    else:
        require_trainable(injected.model, rows.train.examples[0].input_ids)
    request = TrainRequest(
        model=injected.model,
        tokenizer=loaded.tokenizer,
        train=protection.join(rows.train.examples),
        evaluation=rows.evaluation.examples,
        run=run,
        seed=seed,
        identity=identity,
        packing=packing,
        quiet=not log.isEnabledFor(logging.INFO),
        protection=protection.request,
        without=frozenset(off),
        reasons=off,
        processes=processes,
        is_sharded=is_sharded,
    )
    return AdaptedBase(request, loaded, rows, injected.table, protection)


def _switched_off(
    loaded: LiveModel, protect: ProtectConfig, packing: Literal["auto", "on", "off"]
) -> Mapping[Technique, str]:
    """Return what a test of this machine found wrong or slow, and say it.

    Raises:
        LlmtuneError: the config demands one of those.
    """
    off = switched_off(
        str(loaded.dtype).removeprefix("torch."),
        device_name(loaded.device),
        is_quantized=is_quantized(loaded.quantized.method),
    )
    if protect.kl_to_base is not None and "kl_to_base" in off:
        raise LlmtuneError(f"kl_to_base is {off['kl_to_base']}: set protect.kl_to_base=null")
    if packing == "on" and "packing" in off:
        raise LlmtuneError(f"packing is {off['packing']}: set data.packing=off")
    techniques: tuple[Technique, ...] = get_args(Technique)
    found = {path: off[path] for path in techniques if path in off}
    for path, reason in found.items():
        log.warning("%s is %s", path, reason)
    return found


def _sample(examples: Sequence[Example], wanted: int) -> list[SampleRow]:
    """Return rows at equal distances, so that every source has its share."""
    wanted = min(wanted, len(examples))
    chosen = (examples[index * len(examples) // wanted] for index in range(wanted))
    return [
        SampleRow(row.input_ids, [label != IGNORE_INDEX for label in row.labels]) for row in chosen
    ]


def _require_seen(token_rows: Sequence[int], examples: Sequence[Example]) -> None:
    """Refuse rows of the embedding that nothing would train."""
    unseen = set(token_rows)
    for example in examples if unseen else ():
        unseen.difference_update(example.input_ids)
        if not unseen:
            return
    if unseen:
        raise LlmtuneError(
            f"adapter.trainable_tokens: no training row holds the token {min(unseen)}, so its row "
            "of the embedding would stay as it is; leave it out"
        )


def _is_tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _require_graded(token_rows: Sequence[int], examples: Sequence[Example]) -> None:
    """Refuse rows of the embedding that no trained token comes after.

    A row that is the head's too learns wherever the token could have been written; else only what
    follows the token says how it should be read.
    """
    unread = set(token_rows)
    for example in examples:
        labels = example.labels
        last = max((i for i, label in enumerate(labels) if label != IGNORE_INDEX), default=0)
        unread.difference_update(example.input_ids[:last])
        if not unread:
            return
    raise LlmtuneError(
        f"adapter.trainable_tokens: no trained token comes after the token {min(unread)} in any "
        "training row, and this base's head is not its embedding, so its row of the embedding "
        "would stay as it is. To train the model to write it, train the head: "
        "adapter.modules_to_save=[lm_head]"
    )


def _log_lines(lines: Iterator[str]) -> None:
    for line in lines:
        log.info("%s", line)


def _describe_loaded(loaded: LiveModel) -> Iterator[str]:
    """Yield device, precision, attention, and what was quantized and what was not."""
    dtype = str(loaded.dtype).removeprefix("torch.")
    yield f"base: {loaded.source.origin} on {loaded.device}, {dtype}, attention {loaded.attention}"
    if is_quantized(loaded.quantized.method):
        yield from _describe_quantized(loaded.quantized)
    yield from loaded.notices


def _describe_quantized(table: QuantizationTable) -> Iterator[str]:
    """Yield one line for each group of like-named weights, largest memory first."""
    yield (
        f"quantized: {table.quantized_ratio:.1%} of {table.num_parameters / MILLION:.1f} million "
        f"weights to {table.method}, {format_in(table.bytes, 'MiB')} in all"
    )
    for row in table.rows:
        yield (
            f"  {row.kind:<9} {row.count:>4} x {row.pattern}, "
            f"{row.num_parameters / MILLION:.1f} million, {format_in(row.bytes, 'MiB')}"
        )


def _describe_injected(table: InjectionTable) -> Iterator[str]:
    """Yield what got an adapter of which rank, and the trainable share."""
    yield (
        f"adapter: {table.method}, {table.trainable_parameters:,} trainable parameters, "
        f"{table.trainable_ratio:.2%} of the base; "
        f"{table.adapted_ratio:.0%} of the linear layers' weights are adapted"
    )
    for row in table.rows:
        settings = "".join(f"{name} {value:g}, " for name, value in row.settings.items())
        yield f"  {row.count:>4} x {row.pattern}, {settings}{row.num_parameters:,} parameters"
    yield from (f"  whole: {name}" for name in table.saved_modules)
    yield from table.notices


def check_stops(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    examples: Sequence[Example],
    stop_ids: tuple[int, ...],
) -> StopCheck | None:
    """Ask the prompts of a few rows, greedily, and count the answers that end by themselves.

    A prompt is a row up to its last trained turn. An answer may be twice as long as the longest
    one of those rows, and no longer than `MAX_NEW_TOKENS` in all.

    Returns:
        `stopped`, `asked` and `max_new_tokens`; None if no row has a prompt (plain text).
    """
    asked = _choose(examples, position_limit(model))
    if not asked:
        return None
    max_new_tokens = _allowed(asked[-1][0])
    answers = generate_texts(
        model,
        tokenizer,
        [prompt for _, prompt in asked],
        Decoding(max_new_tokens, stop_ids),
        token_budget=choose_token_budget(model),
    )
    stopped = sum(answer.stopped for answer in answers)
    log.log(
        logging.WARNING if 2 * stopped < len(asked) else logging.INFO,
        "stop check: %d of %d answers ended by themselves within %d tokens",
        stopped,
        len(asked),
        max_new_tokens,
    )
    return {"stopped": stopped, "asked": len(asked), "max_new_tokens": max_new_tokens}


def _allowed(answer_length: int) -> int:
    return min(2 * answer_length + SLACK_TOKENS, MAX_NEW_TOKENS)


def _choose(examples: Sequence[Example], max_positions: int | None) -> list[tuple[int, list[int]]]:
    """Return (length of the answer, prompt) of the rows with the shortest answers, those first."""
    found: list[tuple[int, list[int]]] = []
    for index in range(min(NUM_LOOKED_AT, len(examples))):
        example = examples[index]
        trained = [label != IGNORE_INDEX for label in example.labels]
        end = len(trained) - trained[::-1].index(True)
        start = next((i + 1 for i in range(end - 1, -1, -1) if not trained[i]), 0)
        length = end - start
        room = max_positions is None or start + _allowed(length) <= max_positions
        if start and room:
            found.append((length, example.input_ids[:start]))
    found.sort(key=lambda one: one[0])
    chosen = found[:NUM_PROMPTS]
    longest = _allowed(chosen[-1][0]) if chosen else 0
    return [
        one for one in chosen if max_positions is None or len(one[1]) + longest <= max_positions
    ]
