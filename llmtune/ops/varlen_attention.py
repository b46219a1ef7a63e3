"""Attention for a padding-free batch: samples laid end to end, each seeing only itself.

One function, five backends. `choose_varlen_backend` is the only place that decides, from the
device and what the model needs, so that a run can show what it uses; nothing falls back by itself.

Shape suffixes: H query heads, G key/value heads, T tokens of all samples, D head width,
S samples, L the longest sample.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llmtune.ops.tiled_attention import ScoreRule, tiled_attention

FLASH_DTYPES = (torch.float16, torch.bfloat16)
FLASH_CAPABILITY = (8, 0)
FLASH_MAX_HEAD_WIDTH = 256


def varlen_attention(  # noqa: PLR0913 - keyword-only options, like torch.nn.functional
    query_1HTD: Tensor,
    key_1GTD: Tensor,
    value_1GTD: Tensor,
    lengths: Sequence[int],
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    has_beginning: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Causal attention within each of the samples packed into one row.

    Padding that is part of the row must be given as a sample of its own.

    Args:
        query_1HTD: queries of all samples; any strides.
        key_1GTD: keys; G divides H, heads `g * H / G ..` of the query share key head g.
        value_1GTD: values, shaped like the keys, or of a smaller width.
        lengths: tokens of each sample in order, as Python ints; they add up to T.
        scale: factor on the scores before the soft cap, usually D ** -0.5.
        sliding_window: a token sees itself and the `sliding_window - 1` tokens before it.
        softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2).
        sinks_H: a score of each head beside those of the keys, for nothing (gpt-oss); frozen.
        has_beginning: the first sample is what all others begin with. They see it too, and the
            window counts their tokens behind it.
        backend: a name from `VARLEN_BACKENDS`; None asks `choose_varlen_backend`.

    Returns:
        `[1, H, T, width of a value]`, laid out so that `transpose(1, 2)` is contiguous.

    Raises:
        ValueError: if the lengths do not describe the batch, or if the backend cannot do what
            is asked (a soft cap outside tiled, flash_attn and flex; sinks outside tiled; a shared
            beginning outside `SHARING_BACKENDS`).
    """
    _check_arguments(query_1HTD, key_1GTD, lengths)
    if backend is None:
        backend = choose_varlen_backend(
            query_1HTD.device,
            dtype=query_1HTD.dtype,
            head_width=query_1HTD.shape[-1],
            has_softcap=softcap is not None,
            has_sinks=sinks_H is not None,
        )
    if has_beginning and backend not in SHARING_BACKENDS:
        raise ValueError(f"{backend} attention has no shared beginning")
    rule = ScoreRule(scale, sliding_window, softcap, has_beginning)
    if backend == "tiled":
        return tiled_attention(query_1HTD, key_1GTD, value_1GTD, tuple(lengths), rule, sinks_H)
    if sinks_H is not None:
        raise ValueError(f"{backend} has no attention sinks; use tiled")
    attend, width = VARLEN_BACKENDS[backend], value_1GTD.shape[-1]
    if width == key_1GTD.shape[-1]:
        return attend(query_1HTD, key_1GTD, value_1GTD, tuple(lengths), rule)
    padded_1GTD = F.pad(value_1GTD, (0, key_1GTD.shape[-1] - width))
    return attend(query_1HTD, key_1GTD, padded_1GTD, tuple(lengths), rule)[..., :width]


def choose_varlen_backend(
    device: torch.device | str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    head_width: int = 128,
    has_softcap: bool = False,
    has_sinks: bool = False,
) -> str:
    """Name of the fastest backend that computes this attention here.

    CPU: `tiled`. CUDA: `torch_varlen` where torch has it, else `flash_attn` where it is installed
    (the other way round with a soft cap, which only the latter knows), else `flex`, else
    `padded_sdpa`. The flash kernels need 16-bit inputs, a head width that is a multiple of 8 up to
    256 and an Ampere GPU or later. Only the CPU's choice rests on a measurement so far.
    """
    device = torch.device(device)
    if device.type == "cpu" or has_sinks:
        return "tiled"
    if device.type == "cuda":
        has_flash_kernels = (
            dtype in FLASH_DTYPES
            and head_width % 8 == 0
            and head_width <= FLASH_MAX_HEAD_WIDTH
            and torch.cuda.get_device_capability(device) >= FLASH_CAPABILITY
        )
        if has_flash_kernels and not has_softcap and find_spec("torch.nn.attention.varlen"):
            return "torch_varlen"
        if has_flash_kernels and find_spec("flash_attn"):
            return "flash_attn"
        if find_spec("triton"):
            return "flex"
    return "tiled" if has_softcap else "padded_sdpa"


def attend_torch_varlen(
    query_1HTD: Tensor,
    key_1GTD: Tensor,
    value_1GTD: Tensor,
    lengths: tuple[int, ...],
    rule: ScoreRule,
) -> Tensor:
    """`torch.nn.attention.varlen`, whose signature differs between torch 2.10, 2.11 and 2.12."""
    from torch.nn.attention.varlen import varlen_attn

    _refuse_softcap("torch_varlen", rule)
    parameters = inspect.signature(varlen_attn).parameters
    options: dict[str, object] = {}
    if "window_size" in parameters:
        options["window_size"] = _flash_window(rule)
    elif rule.sliding_window is not None:
        raise ValueError("this torch's varlen_attn has no sliding window; update torch or use flex")
    else:
        options["is_causal"] = True
    if "scale" in parameters:
        options["scale"] = rule.scale
    else:  # it then multiplies by D ** -0.5 itself
        query_1HTD = query_1HTD * (rule.scale * query_1HTD.shape[-1] ** 0.5)
    if "enable_gqa" in parameters:
        options["enable_gqa"] = key_1GTD.shape[1] != query_1HTD.shape[1]
    else:
        key_1GTD, value_1GTD = _repeat_heads(query_1HTD, key_1GTD, value_1GTD)

    def kernel(query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, bounds: Tensor) -> Tensor:
        longest = max(lengths)
        return varlen_attn(
            query_THD, key_TGD, value_TGD, bounds, bounds, longest, longest, **options
        )

    return _run_flash(kernel, (query_1HTD, key_1GTD, value_1GTD), lengths)


def attend_flash_attn(
    query_1HTD: Tensor,
    key_1GTD: Tensor,
    value_1GTD: Tensor,
    lengths: tuple[int, ...],
    rule: ScoreRule,
) -> Tensor:
    """The flash-attn package, the only flash kernel here that knows a soft cap."""
    from flash_attn import flash_attn_varlen_func

    def kernel(query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, bounds: Tensor) -> Tensor:
        return flash_attn_varlen_func(
            query_THD,
            key_TGD,
            value_TGD,
            cu_seqlens_q=bounds,
            cu_seqlens_k=bounds,
            max_seqlen_q=max(lengths),
            max_seqlen_k=max(lengths),
            softmax_scale=rule.scale,
            causal=True,
            window_size=_flash_window(rule),
            softcap=rule.softcap or 0.0,
        )

    return _run_flash(kernel, (query_1HTD, key_1GTD, value_1GTD), lengths)


def _run_flash(
    kernel: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    heads: tuple[Tensor, Tensor, Tensor],
    lengths: tuple[int, ...],
) -> Tensor:
    """Call a flash kernel in its layout, tokens first, with the bounds of the samples."""
    query_THD, key_TGD, value_TGD = (one_1HTD[0].transpose(0, 1) for one_1HTD in heads)
    bounds = _cumulative_lengths(lengths, query_THD.device)
    return kernel(query_THD, key_TGD, value_TGD, bounds).transpose(0, 1)[None]


def _flash_window(rule: ScoreRule) -> tuple[int, int]:
    """Return the tokens that a token sees (before itself, after itself); -1 is all."""
    return -1 if rule.sliding_window is None else rule.sliding_window - 1, 0


def attend_flex(
    query_1HTD: Tensor,
    key_1GTD: Tensor,
    value_1GTD: Tensor,
    lengths: tuple[int, ...],
    rule: ScoreRule,
) -> Tensor:
    """`flex_attention` under a block mask of the samples; compiled except on a CPU."""
    flex_attention = _load_flex_attention(is_compiled=query_1HTD.device.type != "cpu")
    output_1HTD = flex_attention(
        query_1HTD,
        key_1GTD,
        value_1GTD,
        score_mod=None if rule.softcap is None else _softcap_score(rule.softcap),
        block_mask=_flex_block_mask(lengths, rule, query_1HTD.device),
        scale=rule.scale,
        enable_gqa=key_1GTD.shape[1] != query_1HTD.shape[1],
    )
    return output_1HTD.transpose(1, 2).contiguous().transpose(1, 2)


def attend_padded_sdpa(
    query_1HTD: Tensor,
    key_1GTD: Tensor,
    value_1GTD: Tensor,
    lengths: tuple[int, ...],
    rule: ScoreRule,
) -> Tensor:
    """Samples padded to one length for `scaled_dot_product_attention`.

    Padding follows each sample, so causality alone hides it and the flash kernels stay usable.
    """
    _refuse_softcap("padded_sdpa", rule)
    query_SHLD, key_SGLD, value_SGLD = (
        pad_sequence(heads[0].transpose(0, 1).split(lengths), batch_first=True).transpose(1, 2)
        for heads in (query_1HTD, key_1GTD, value_1GTD)
    )
    longest = query_SHLD.shape[2]
    is_seen_LL = None
    if rule.sliding_window is not None and rule.sliding_window < longest:
        position = torch.arange(longest, device=query_1HTD.device)
        distance_LL = position[:, None] - position
        is_seen_LL = (distance_LL >= 0) & (distance_LL < rule.sliding_window)
    output_SHLD = F.scaled_dot_product_attention(
        query_SHLD,
        key_SGLD,
        value_SGLD,
        attn_mask=is_seen_LL,
        is_causal=is_seen_LL is None,
        scale=rule.scale,
        enable_gqa=key_1GTD.shape[1] != query_1HTD.shape[1],
    )
    output_SLHD = output_SHLD.transpose(1, 2)
    output_THD = torch.cat([rows[:n] for rows, n in zip(output_SLHD, lengths, strict=True)])
    return output_THD.transpose(0, 1)[None]


VARLEN_BACKENDS: dict[str, Callable[..., Tensor]] = {
    "tiled": tiled_attention,
    "torch_varlen": attend_torch_varlen,
    "flash_attn": attend_flash_attn,
    "flex": attend_flex,
    "padded_sdpa": attend_padded_sdpa,
}

SHARING_BACKENDS = ("tiled", "flex")
"""Those in which the samples of a batch can share their beginning."""


@lru_cache(maxsize=8)  # every layer of a batch shares one copy to the device
def _cumulative_lengths(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    bounds = F.pad(torch.tensor(lengths).cumsum(0, dtype=torch.int32), (1, 0))
    return bounds.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else bounds


@cache
def _load_flex_attention(*, is_compiled: bool) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    attend: Callable[..., Tensor] = flex_attention
    return torch.compile(attend, dynamic=True) if is_compiled else attend


@lru_cache(maxsize=8)
def _flex_block_mask(lengths: tuple[int, ...], rule: ScoreRule, device: torch.device) -> object:
    from torch.nn.attention.flex_attention import create_block_mask

    counts = torch.tensor(lengths)
    sample_T = torch.repeat_interleave(torch.arange(len(lengths)), counts).to(device)
    position_T = torch.cat([torch.arange(length) for length in lengths]).to(device)
    if rule.has_beginning:
        position_T[lengths[0] :] += lengths[0]

    def is_seen(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = sample_T[query] == sample_T[key]
        if rule.has_beginning:
            seen = seen | (sample_T[key] == 0)
        seen = seen & (query >= key)
        if rule.sliding_window is None:
            return seen
        return seen & (position_T[query] - position_T[key] < rule.sliding_window)

    num_tokens = len(sample_T)
    return create_block_mask(is_seen, None, None, num_tokens, num_tokens, device=device)


@cache
def _softcap_score(softcap: float) -> Callable[..., Tensor]:
    def cap(score: Tensor, _batch: Tensor, _head: Tensor, _query: Tensor, _key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


def _repeat_heads(query_1HTD: Tensor, *shared: Tensor) -> tuple[Tensor, ...]:
    num_repeats = query_1HTD.shape[1] // shared[0].shape[1]
    return tuple(heads.repeat_interleave(num_repeats, dim=1) for heads in shared)


def _refuse_softcap(backend: str, rule: ScoreRule) -> None:
    if rule.softcap is not None:
        raise ValueError(f"{backend} has no soft cap; use tiled, flash_attn or flex")


def _check_arguments(query_1HTD: Tensor, key_1GTD: Tensor, lengths: Sequence[int]) -> None:
    batch, num_heads, num_tokens, _ = query_1HTD.shape
    if batch != 1 or sum(lengths) != num_tokens or min(lengths, default=1) < 1:
        raise ValueError(
            f"expected one packed row and positive lengths that add up to its tokens, got queries "
            f"of shape {tuple(query_1HTD.shape)} and lengths adding up to {sum(lengths)}"
        )
    if num_heads % key_1GTD.shape[1]:
        raise ValueError(f"{num_heads} query heads do not divide into {key_1GTD.shape[1]} groups")
