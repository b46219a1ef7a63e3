"""What a CPU keeps of compiled matrix products: oneDNN makes a kernel for every new shape.

A 16-bit product is compiled for its very sizes, and the last ones are kept
(`llmtune.io.kernel_cache` says how many). Rows differ in length, so almost every micro-batch brings
its own sizes, and a few of them fill the cache; what is dropped leaves holes in the heap. float32
products go elsewhere and keep nothing.
"""

import math
from typing import NamedTuple

from llmtune.io.kernel_cache import VARIABLES, read_capacity
from llmtune.planning.shape import ModelShape

FLOAT32 = 4
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


class KernelBytes(NamedTuple):
    """What kernels take after a number of micro-batches."""

    kept: int
    dropped: int
    """Of those that are no longer kept."""


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
