"""Packed batches: attention within each row, and the probe that shows neighbors stay apart."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from llmtune.data.example import IGNORE_INDEX, Example
from llmtune.errors import LlmtuneError
from llmtune.io.quiet import quieted
from llmtune.models.decoder import config_number, decoder_of
from llmtune.models.probing import ProbeFailedError, probing
from llmtune.ops.varlen_attention import choose_varlen_backend, varlen_attention
from llmtune.training.batch import move_to, pack_rows, pad_rows
from llmtune.training.loss import decoder_hidden
from llmtune.training.objectives.base import MicroBatch
from llmtune.training.rows import row_lengths

ATTENTION_NAME = "llmtune_varlen"
SILENCED = "transformers.modeling_utils"
"""Warns of a choice that cannot be set; that is checked here, and said by the caller."""
PROBE_TOKENS = 24
LONGEST_PROBE = 2048
"""Tokens of a row that is to be longer than a window; what a row that long would not show, the
masks that the model asks for say (see `mask_rule`)."""
REACH_WORDS = ("window", "chunk", "original_max_position")
"""In the names of config keys: after so many tokens something changes."""
# Largest accepted difference between a row packed and the same row alone, as a share of the hidden
# states' own size: rounding is far below, a lost mask, window or cap far above.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
# The share of a row's tokens that has to be within: where a model keeps some activations thousands
# of times larger than the rest, rounding alone can turn a single token's state around.
JUDGED_SHARE = 0.75

UNSUPPORTED_OPTIONS = ("dropout", "position_bias", "head_mask")

AppliedMask = tuple[int | None, tuple[int, ...]]
"""The sliding window, and the lengths of the rows."""


class PackingChoice(NamedTuple):
    """Whether rows are packed, and why or why not."""

    packed: bool
    reason: str


def choose_packing(
    model: PeftModel,
    wanted: Literal["auto", "on", "off"],
    examples: Sequence[Example],
    *,
    longest: int | None = None,
) -> PackingChoice:
    """Decide by a probe on the loaded model whether rows may share a batch without padding.

    The probe runs the very call that training uses on pieces of the first rows and asks three
    things: does anything flow from a neighbor (a gradient that is not exactly zero, a hidden
    state that changes with the neighbor), and does a packed row equal the row alone.

    Args:
        model: as it is trained.
        wanted: the user's `data.packing`.
        examples: rows to make probes of.
        longest: tokens of the longest row that is trained or evaluated; of `examples` by default.

    Raises:
        LlmtuneError: `wanted` is "on" and the model mixes packed rows.
    """
    if wanted == "off":
        return PackingChoice(False, "data.packing is off")
    if longest is None:
        longest = int(row_lengths(examples).max()) if len(examples) else 0
    reason = _find_obstacle(model, examples, longest)
    if reason is None:
        reason = f"the probe found no influence of neighbors ({backend_of(model)} attention)"
        return PackingChoice(True, reason)
    if wanted == "on":
        raise LlmtuneError(
            f"data.packing is on, but {type(model.get_base_model()).__name__} cannot be packed: "
            f"{reason}. Set data.packing to auto or off: rows are then padded."
        )
    return PackingChoice(False, reason)


@contextlib.contextmanager
def packed_attention(model: PeftModel) -> Iterator[bool]:
    """Run the model's attention row by row inside; yields False if the model does not allow it.

    The implementation that was chosen before is put back on leaving.
    """
    base: PreTrainedModel = model.get_base_model()
    previous = base.config._attn_implementation
    with quieted(SILENCED):
        base.set_attn_implementation(ATTENTION_NAME)
    try:
        yield base.config._attn_implementation == ATTENTION_NAME
    finally:
        with quieted(SILENCED):
            base.set_attn_implementation(previous)


def varlen_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend within each packed row; the signature is transformers' `AttentionInterface`.

    Args:
        module: the attention layer, asked only for `is_causal`.
        query: [1, heads, T, head_dim].
        key: [1, kv_heads, T, head_dim].
        value: like `key`.
        attention_mask: None, or what `describe_mask` made.
        options: `row_lengths` (required), `shares_beginning`, `scaling`, `sliding_window`,
            `softcap`, `s_aux` (sinks); `attention_calls` is a list that every call is added to.

    Returns:
        [1, T, heads, head_dim] and no attention weights.

    Raises:
        ProbeFailedError: the layer asks for something that packed attention does not have.
    """
    lengths = options.get("row_lengths")
    if lengths is None:
        raise ProbeFailedError("its attention layers do not receive the row lengths")
    unknown = [name for name in UNSUPPORTED_OPTIONS if is_given(options.get(name))]
    if unknown or not getattr(module, "is_causal", True):
        raise ProbeFailedError(f"its attention uses {', '.join(unknown) or 'no causal order'}")
    if key.shape[2] != sum(lengths):
        raise ProbeFailedError("its attention reads more than the rows' own tokens")
    sinks = options.get("s_aux")
    if sinks is not None and sinks.requires_grad:
        raise ProbeFailedError("its attention sinks are trained")
    if (calls := options.get("attention_calls")) is not None:
        calls.append(module)
    window, shares = options.get("sliding_window"), options.get("shares_beginning", False)
    if attention_mask is not None:
        rule = mask_rule(attention_mask)
        window, lengths = rule.apply(tuple(lengths), query.device, shares_beginning=shares)
    scale = options.get("scaling")
    attended = varlen_attention(
        # Rotary embeddings may leave the queries in float32 under autocast.
        query.to(value.dtype),
        key.to(value.dtype),
        value,
        lengths,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        sliding_window=window,
        softcap=options.get("softcap"),
        sinks_H=sinks,
        has_beginning=shares,
    )
    return attended.transpose(1, 2), None


def is_given(option: object) -> bool:
    """Whether an attention option says anything; a tensor does."""
    return isinstance(option, Tensor) or bool(option)


@dataclass(frozen=True)
class MaskRule:
    """Which keys of its row a token sees: the last `size` of them, or those of its own chunk."""

    size: int
    is_seen: Callable[[Any, Any, Any, Any], Any]
    """transformers' mask function, of batch, head, query and key."""
    _applied: dict[tuple[tuple[int, ...], bool], AppliedMask] = field(default_factory=dict)
    """All layers of a pass share the mask; on a GPU each question waits for what is computed."""

    def apply(
        self, lengths: tuple[int, ...], device: torch.device, *, shares_beginning: bool = False
    ) -> AppliedMask:
        """Return the sliding window, and the rows: those of chunks are cut at them.

        Of rows that share their beginning, the longest directly follows it.

        Raises:
            ProbeFailedError: the mask is neither a window nor chunks, or rows that share their
                beginning have chunks.
        """
        asked = lengths, shares_beginning
        if asked not in self._applied:
            self._applied[asked] = self._apply(lengths, device, shares_beginning=shares_beginning)
        return self._applied[asked]

    def _apply(
        self, lengths: tuple[int, ...], device: torch.device, *, shares_beginning: bool
    ) -> AppliedMask:
        rows = (sum(lengths[:2]),) if shares_beginning else lengths
        if max(rows) <= self.size:
            return None, lengths
        start = sum(rows[: rows.index(max(rows))])
        batch, query = (torch.tensor(one, device=device) for one in (0, start + self.size))
        seen = [
            bool(self.is_seen(batch, batch, query, query - distance))
            for distance in (self.size, self.size - 1, 0)
        ]
        if seen == [False, True, True]:
            return self.size, lengths
        if seen == [False, False, True] and not shares_beginning:
            size = self.size
            cut = [min(size, row - at) for row in lengths for at in range(0, row, size)]
            return None, tuple(cut)
        raise ProbeFailedError("its attention masks more than later tokens and a window")


def describe_mask(**wanted: Any) -> Tensor | None:
    """Build no mask, but say which one the model asked for.

    Args:
        wanted: what transformers gives a mask function: `local_size` is the window or chunk of
            masks that have one, `use_vmap` marks a rule that the model brings itself.

    Returns:
        None for what is causal and nothing else; otherwise four dimensions, as transformers
        expects of a mask, with the rule as an attribute. Rows are known by their lengths.
    """
    if wanted.get("use_vmap"):
        raise ProbeFailedError("its attention has a mask of its own")
    if wanted.get("local_size") is None:
        return None
    mark = torch.empty(1, 1, 1, 1, dtype=torch.bool)
    mark.rule = MaskRule(wanted["local_size"], wanted["mask_function"])
    return mark


def mask_rule(mask: Tensor) -> MaskRule:
    """Return what `describe_mask` noted.

    Raises:
        ProbeFailedError: the mask is a different one.
    """
    rule = getattr(mask, "rule", None)
    if not isinstance(rule, MaskRule):
        raise ProbeFailedError("its attention layers receive a mask of the model's own")
    return rule


AttentionInterface.register(ATTENTION_NAME, varlen_attention_forward)
AttentionMaskInterface.register(ATTENTION_NAME, describe_mask)


def backend_of(model: PeftModel) -> str:
    """Return the name of the attention that packed rows of this model run with."""
    embedding = model.get_input_embeddings().weight
    config = model.get_base_model().config.get_text_config()
    heads = config_number(config, "num_attention_heads")
    return choose_varlen_backend(
        embedding.device,
        dtype=embedding.dtype,
        head_width=config_number(config, "head_dim") or config.hidden_size // (heads or 1),
        has_softcap=getattr(config, "attn_logit_softcapping", None) is not None,
        has_sinks=any(name.endswith("sinks") for name, _ in model.named_parameters()),
    )


def _find_obstacle(model: PeftModel, examples: Sequence[Example], longest: int) -> str | None:
    """Return why the model's rows cannot be packed, or None."""
    decoder = decoder_of(model.get_base_model())
    parameters = inspect.signature(decoder.forward).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return "its forward method takes no row lengths"
    was_training = model.training
    try:
        with probing():
            return _probe(model, examples, longest)
    except ProbeFailedError as error:
        return str(error)
    finally:
        model.train(was_training)


def _probe(model: PeftModel, examples: Sequence[Example], longest: int) -> str | None:
    """Measure the influence of a neighbor; return what is wrong, or None."""
    device = model.get_input_embeddings().weight.device
    left, right, other = make_probe_rows(examples, PROBE_TOKENS)
    model.eval()
    alone = run_probe(model, pad_rows([right], pad_token_id=0), device)[0]
    with packed_attention(model) as is_applied:
        if not is_applied:
            return "its attention does not go through transformers' AttentionInterface"
        packed = run_probe(model, pack_rows([left, right]), device)[0, PROBE_TOKENS:]
        changed = run_probe(model, pack_rows([other, right]), device)[0, PROBE_TOKENS:]
        model.train()
        gradient = _neighbor_gradient(model, pack_rows([left, right]), device)
    if gradient != 0.0:
        return f"a gradient of {gradient:.2g} flows from a row to its neighbor"
    tolerated = TOLERANCES.get(alone.dtype, 1e-4)
    influence = (packed - changed).abs().max().item()
    if not influence <= tolerated * alone.abs().max().item():
        return f"a row changes by {influence:.2g} with its neighbor"
    difference = relative_difference(packed, alone)
    if not difference <= tolerated:
        return f"a packed row differs by {difference:.1%} from the row alone"
    return _probe_long(model, examples, longest)


def _probe_long(model: PeftModel, examples: Sequence[Example], longest: int) -> str | None:
    """Compare a row that is longer than windows and chunks; None if none of the rows is."""
    reached = [reach for reach in find_reaches(model) if reach < longest]
    length = min(2 * max(reached, default=0), longest, LONGEST_PROBE)
    if length <= PROBE_TOKENS:
        return None
    device = model.get_input_embeddings().weight.device
    left, _, _ = make_probe_rows(examples, PROBE_TOKENS)
    long, _, _ = make_probe_rows(examples, length)
    model.eval()
    alone = run_probe(model, pad_rows([long], pad_token_id=0), device)[0]
    with packed_attention(model):
        packed = run_probe(model, pack_rows([left, long]), device)[0, PROBE_TOKENS:]
    difference = max(
        relative_difference(packed[start:], alone[start:])
        for start in (0, *(reach for reach in reached if reach < length))
    )
    if not difference <= TOLERANCES.get(alone.dtype, 1e-4):
        return f"a packed row of {length} tokens differs by {difference:.1%} from the row alone"
    return None


def find_reaches(model: PeftModel, words: Sequence[str] = REACH_WORDS) -> list[int]:
    """Return the lengths in the config after which something changes: windows and chunks."""
    values = model.get_base_model().config.get_text_config().to_dict()
    sections = [values, *(value for value in values.values() if isinstance(value, dict))]
    return sorted(
        {
            value
            for section in sections
            for key, value in section.items()
            if isinstance(value, int) and value > 1 and any(word in key for word in words)
        }
    )


def relative_difference(packed_TD: Tensor, alone_TD: Tensor) -> float:
    """Return how far a row's hidden states are from those of the row alone.

    Of each token ||packed - alone|| / ||alone||, and of those the one that `JUDGED_SHARE` of the
    tokens do not pass; not a number where a state is not.
    """
    alone_TD = alone_TD.float()
    errors_T = (packed_TD.float() - alone_TD).norm(dim=-1) / alone_TD.norm(dim=-1)
    return float(torch.quantile(errors_T, JUDGED_SHARE))


def make_probe_rows(examples: Sequence[Example], length: int) -> tuple[Example, Example, Example]:
    """Return two neighbors and a third row as long as the first, made of real tokens."""
    tokens: list[int] = []
    for example in examples:
        tokens += example.input_ids
        if len(tokens) >= 3 * length:
            break
    while len(tokens) < 3 * length:
        tokens += tokens
    rows = [tokens[start : start + length] for start in (0, length, 2 * length)]
    if rows[2] == rows[0]:
        rows[2] = rows[0][::-1] if rows[0] != rows[0][::-1] else [rows[0][0] ^ 1] * length
    first, second, third = map(make_probe_row, rows)
    return first, second, third


def make_probe_row(ids: list[int]) -> Example:
    """Return token ids as a row of which the last one is trained."""
    return Example(ids, [*[IGNORE_INDEX] * (len(ids) - 1), ids[-1]], "trial", 1)


def run_probe(model: PeftModel, micro_batch: MicroBatch, device: torch.device) -> Tensor:
    """Return the last hidden states [rows, T, width] of the very call that training uses."""
    with torch.no_grad():
        return decoder_hidden(model, move_to(micro_batch, device))


def _neighbor_gradient(model: PeftModel, micro_batch: MicroBatch, device: torch.device) -> float:
    """Return the largest gradient that the second row's hidden states send to the first row."""
    embedded: list[Tensor] = []

    def catch(_module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    handle = model.get_input_embeddings().register_forward_hook(catch)
    try:
        with torch.enable_grad():
            hidden = decoder_hidden(model, move_to(micro_batch, device))
            second = hidden[0, PROBE_TOKENS:].float()
            (gradient,) = torch.autograd.grad((second * second).sum(), embedded[0])
    finally:
        handle.remove()
    return float(gradient[0, :PROBE_TOKENS].abs().max())
