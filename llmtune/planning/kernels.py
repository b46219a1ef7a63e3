"""What a CPU keeps of compiled matrix products: oneDNN makes a kernel for every new shape.

oneDNN compiles a 16-bit product for its very sizes and keeps the last 1,024 of them (its primitive
cache; ONEDNN_PRIMITIVE_CACHE_CAPACITY changes that). Rows differ in length, so almost every
micro-batch brings its own sizes. float32 products go elsewhere and keep nothing.
"""

import math
import os

from llmtune.planning.shape import ModelShape

KERNEL_BYTES = 580_000
"""Of one product: 0.53 to 0.58 MiB allocated for each of 100 to 200 new shapes, five kinds of
product (torch 2.13, AVX-512 with bf16)."""
CAPACITY = 1024
CAPACITY_VARIABLE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
PRODUCTS_A_LINEAR = 8
"""Output and gradient of the input; of the adapter two forward and four backward."""
PRODUCTS_A_STACK = 5
"""Attention in 16 bits: probabilities times values, and four backward."""
TILE_TOKENS = 128
STACK_BYTES = 3 << 19
"""Attention computes short tiles together up to these bytes of scores (`ops/tiled_attention`)."""


def kernel_bytes(shape: ModelShape, *, micro_batches: int | None, stacks: int | None) -> int:
    """Return the bytes of the kernels kept after so many micro-batches.

    `stacks` are the different sizes of attention's products in them; None is more than the cache
    holds.
    """
    given = os.environ.get(CAPACITY_VARIABLE, "")
    capacity = int(given) if given.isdecimal() else CAPACITY
    if micro_batches is None or stacks is None:
        return capacity * KERNEL_BYTES
    linears = PRODUCTS_A_LINEAR * len(set(shape.linear.values()))
    return min(micro_batches * linears + PRODUCTS_A_STACK * stacks, capacity) * KERNEL_BYTES


def count_stacks(
    num_tokens: int | None, *, longest: int, num_lengths: int | None, heads: int
) -> int | None:
    """Return how many sizes attention's products have; None if nothing is known of the rows.

    Short rows share a tile of TILE_TOKENS, and such tiles are stacked; the tiles of a long row
    follow its length, each alone.
    """
    if longest > TILE_TOKENS:
        known = [] if num_lengths is None else [num_lengths * math.ceil(longest / TILE_TOKENS)]
        stacked = 1
    else:
        known = [TILE_TOKENS]
        stacked = max(1, STACK_BYTES // (heads * TILE_TOKENS**2 * 4))
    if num_tokens is not None:
        known.append(math.ceil(num_tokens / (stacked * TILE_TOKENS)))
    return min(known, default=None)
