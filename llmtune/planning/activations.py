"""What one token's activations take between forward and backward pass, from a model's shape.

Counted is what autograd keeps in llmtune's training step, by its own operations where they stand in
for the library's (`adapters/fused.py`, `training/fused/blocks.py`), else under transformers' eager
layers. b is the bytes of an element, W the hidden width, Q and K the widths of queries and keys, I
the feed-forward width:

    RMSNorm        b W + 4: input, and one float32 scale; the library's 4 (W + 1): a float32 copy
    LayerNorm      b (W + 2): input, mean and deviation; parallel blocks share the input
    attention      b (Q + 2 K) for the kernel, b Q for what the output projection reads
    feed-forward   b I each for gate and up; the library's also for activation and product; without
                   a gate input and product
    an expert      the same, and b W for its tokens gathered and b W for its output
    adapted input  b width, once where linears share it and are fused, else once a linear
    adapters       b rank: the thin products
    dropout        a mask an input: 4 bytes on a CPU, 1 on a GPU
    other methods  b out for every result of that width that is kept (`Adapter.KEPT_OUTPUTS`);
                   some b in several times (`Adapter.kept_inputs`) in place of the adapted input

A layer that is recomputed keeps its input, b W.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from llmtune.io.native_libraries import VARIABLES, read_capacity
from llmtune.planning.shape import ModelShape
from llmtune.training.memory.arithmetic import ActivationCost

KERNEL_BYTES = 580_000
"""Of one product: 0.52 to 0.58 MiB allocated for each of 100 new shapes, eight kinds of product
(torch 2.13, AVX-512 with bf16)."""
PLACES = 1000
"""Dropped kernels whose memory stays, as holes of the heap. Fitted to the quickstart's 60 steps
(some 3,000 sizes), whose peak was 2,719 MiB with 1,024 kernels kept and 2,313 with 256; runs of 600
sizes took as much with 256 as with 1,024."""
PRODUCTS_A_LINEAR = 8
"""Output and gradient of the input; of the adapter two forward and four backward."""
PRODUCTS_A_STACK = 5
"""Attention in 16 bits: probabilities times values, and four backward."""
TILE_TOKENS = 128
STACK_BYTES = 3 << 19
"""Attention computes tiles of short rows together up to these bytes of scores; those of a long row
count as one each (`ops/tiled_attention`)."""
FLOAT32 = 4
ROUTING_BYTES = 40
"""Of one token for one expert: its weight, its place, and their sorted copies."""
EAGER_GELUS = ("gelu_new", "gelu_fast")
"""Activations that transformers computes step by step: five tensors are kept instead of two."""


class KernelBytes(NamedTuple):
    """What kernels take after a number of micro-batches."""

    kept: int
    dropped: int
    """Of those that are no longer kept."""


@dataclass(frozen=True)
class Adapted:
    """Where the adapters are, and how they are computed."""

    ranks: Mapping[str, int]
    """{full name of the module or expert parameter: width of its thin product}."""
    is_fused: bool
    """llmtune's own LoRA linears; otherwise PEFT's (dropout, other methods)."""
    dropout_mask_bytes: int = 0
    """Of one input feature; 0 without dropout."""
    kept_outputs: int = 0
    """Results as wide as a layer's output that are kept."""
    kept_inputs: int = 0
    """Tensors as wide as a layer's input that are kept in its place; 0: the input itself."""
    dense_copies: int = 0
    """Float32 tables of a weight's size that a layer makes."""


def activation_cost(
    shape: ModelShape, adapted: Adapted, *, element_bytes: int, trained_ratio: float
) -> ActivationCost:
    """Return what a token costs; `trained_ratio` is the share of tokens that carry a label.

    Layers before the first adapted one keep nothing: no gradient passes through them.
    """
    by_layer = _by_layer(shape, adapted)
    first = min(by_layer, default=shape.layers)
    kept = sum(
        _layer_bytes(_Layer(shape, adapted, index, by_layer.get(index, {}), element_bytes))
        for index in range(first, shape.layers)
    )
    norm = _norm_bytes(shape, element_bytes)
    is_pre_norm = shape.family.head_norms != "width"
    kept -= norm if kept and is_pre_norm else 0  # no gradient reaches the embeddings
    return ActivationCost(
        layers=shape.layers,
        layer_bytes=kept / shape.layers,
        recomputed_layer_bytes=element_bytes * shape.width,
        other_bytes=norm + element_bytes * shape.width * trained_ratio,
    )


def merged_expert_bytes(shape: ModelShape, adapted: Adapted, element_bytes: int) -> int:
    """Return what PEFT keeps of adapted experts: a merged copy of all of them, used or not."""
    return element_bytes * sum(
        size[0] * size[1] * size[2]
        for name, size in shape.fused_experts.items()
        if name in adapted.ranks
    )


def _by_layer(shape: ModelShape, adapted: Adapted) -> dict[int, dict[str, int]]:
    prefix = f"{shape.family.layers}."
    layers: dict[int, dict[str, int]] = {}
    for name, rank in adapted.ranks.items():
        index, _, part = name.removeprefix(prefix).partition(".")
        layers.setdefault(int(index), {})[part] = rank
    return layers


def _norm_bytes(shape: ModelShape, element_bytes: int) -> float:
    if shape.family.has_layer_norm:
        return element_bytes * (shape.width + 2)
    return _rms_norm_bytes(shape, element_bytes, shape.width, 1)


def _rms_norm_bytes(shape: ModelShape, element_bytes: int, features: int, norms: int) -> float:
    """Return what RMSNorms keep of a token: `features` over all `norms` of them."""
    kept = element_bytes if shape.family.has_plain_norm else FLOAT32
    return kept * features + FLOAT32 * norms


@dataclass(frozen=True)
class _Layer:
    """One layer, and the ranks of its adapters by the linears' names inside it."""

    shape: ModelShape
    adapted: Adapted
    index: int
    ranks: Mapping[str, int]
    element_bytes: int

    @property
    def prefix(self) -> str:
        return f"{self.shape.family.layers}.{self.index}"

    def size(self, name: str) -> tuple[int, int] | None:
        """Return (out, in) of a linear; None if this layer has none of that name."""
        return self.shape.linear.get(f"{self.prefix}.{name}")


def _layer_bytes(layer: _Layer) -> float:
    shape, family, b = layer.shape, layer.shape.family, layer.element_bytes
    query, kv = shape.query_width, shape.kv_width
    norms = 1 if family.has_layer_norm else family.norms  # parallel blocks read one input
    kept = norms * _norm_bytes(shape, b) + b * (query + 2 * kv)
    if family.head_norms:
        num_norms = shape.heads + shape.kv_heads if family.head_norms == "head" else 2
        kept += _rms_norm_bytes(shape, b, query + kv, num_norms)
    if len(family.attention) == 2:
        kept += b * (query + kv)  # values are a view of the whole projection
    down = layer.size(family.feed_forward[-1])
    kept += _expert_bytes(layer) if down is None else b * _inner_elements(layer, down[1])
    for members, width in () if layer.adapted.kept_inputs else _adapted_inputs(layer):
        kept += b * width * (1 if _shares_inputs(layer) else len(members))
    return kept + _adapter_bytes(layer)


def _shares_inputs(layer: _Layer) -> bool:
    """Whether linears keep one input together; PEFT's 16-bit ones each keep a copy."""
    is_uncast = layer.element_bytes == FLOAT32 and not layer.adapted.dropout_mask_bytes
    return layer.adapted.is_fused or is_uncast


def _adapted_inputs(layer: _Layer) -> list[tuple[list[str], int]]:
    """Return the adapted linears that read one input, and its width."""
    family = layer.shape.family
    *projections, out = family.attention
    *feed_in, down = family.feed_forward
    is_parallel = family.has_layer_norm and family.norms == 1
    groups = [projections + feed_in] if is_parallel else [projections, feed_in]
    groups += [[out]] if _has_fused_mlp(layer) else [[out], [down]]
    found = [[name for name in names if name in layer.ranks] for names in groups]
    return [(names, (layer.size(names[0]) or (0, 0))[1]) for names in found if names]


def _has_fused_mlp(layer: _Layer) -> bool:
    """Whether llmtune's gated feed-forward block replaces the library's."""
    family = layer.shape.family
    return (
        layer.adapted.is_fused
        and len(family.feed_forward) == len(("gate", "up", "down"))
        and layer.shape.activation == "silu"
        and family.feed_forward[-1] in layer.ranks
    )


def _inner_elements(layer: _Layer, width: int) -> int:
    """Return the elements of a feed-forward block that are kept beside adapted inputs."""
    shape = layer.shape
    if _has_fused_mlp(layer):
        return 2 * width
    if shape.family.is_gated:
        return 3 * width
    return (4 if shape.activation in EAGER_GELUS else 1) * width


def _expert_bytes(layer: _Layer) -> float:
    shape = layer.shape
    inner, width = shape.feed_forward, shape.width
    is_adapted = any(name.startswith(shape.family.experts) for name in layer.ranks)
    elements = 4 * inner + 2 * width if is_adapted else 3 * inner + width
    return shape.active_experts * (layer.element_bytes * elements + ROUTING_BYTES)


def _adapter_bytes(layer: _Layer) -> float:
    """Return what the adapters of linears keep beside their inputs."""
    b, adapted = layer.element_bytes, layer.adapted
    kept = 0.0
    for name, rank in layer.ranks.items():
        size = layer.size(name)
        if size is not None:
            num_out, num_in = size
            kept += b * rank + adapted.dropout_mask_bytes * num_in
            kept += b * (adapted.kept_outputs * num_out + adapted.kept_inputs * num_in)
    return kept


def kernel_bytes(
    num_sizes: int, *, micro_batches: int | None, num_lengths: int | None
) -> KernelBytes:
    """Return what the kernels of so many micro-batches take, each with `num_sizes` products.

    `micro_batches` None is a long run. Rows of one length bring the same sizes again.
    """
    capacity = read_capacity()
    compiled = capacity + PLACES
    if micro_batches is not None:
        compiled = (1 if num_lengths == 1 else micro_batches) * num_sizes
    return KernelBytes(
        kept=min(compiled, capacity) * KERNEL_BYTES,
        dropped=min(max(compiled - capacity, 0), PLACES) * KERNEL_BYTES,
    )


def count_sizes(shape: ModelShape, tokens: int, *, longest: int) -> int:
    """Return how many different products a micro-batch has at most; its layers share them."""
    stacked = 1
    if longest <= TILE_TOKENS:
        stacked = max(1, STACK_BYTES // (shape.heads * TILE_TOKENS**2 * FLOAT32))
    stacks = math.ceil(tokens / (stacked * TILE_TOKENS))
    return PRODUCTS_A_LINEAR * len(set(shape.linear.values())) + PRODUCTS_A_STACK * stacks


def advise_capacity(num_sizes: int) -> str | None:
    """Return what to set if the layers of one micro-batch cannot share their products."""
    capacity = read_capacity()
    if num_sizes <= capacity:
        return None
    return (
        f"a micro-batch has up to {num_sizes} different matrix products, and oneDNN keeps "
        f"{capacity} compiled ones, so every layer compiles its own: "
        f"export {VARIABLES[0]}={2 ** math.ceil(math.log2(num_sizes))}"
    )
