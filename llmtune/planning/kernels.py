"""What a CPU keeps of compiled matrix products: oneDNN makes a kernel for every new shape.

oneDNN compiles a 16-bit product for its very sizes and keeps the last 1,024 of them (its primitive
cache; ONEDNN_PRIMITIVE_CACHE_CAPACITY changes that). Rows differ in length, so almost every
micro-batch brings its own sizes. float32 products go elsewhere and keep nothing.
"""

import math
import os

from llmtune.planning.shape import ModelShape

KERNEL_BYTES = 600_000
"""Of one product: 0.57-0.58 MB in use, 0.6-0.7 resident, over 100-200 new shapes of four kinds each
(torch 2.13, AVX-512 with bf16)."""
CAPACITY = 1024
CAPACITY_VARIABLE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
PRODUCTS_A_LINEAR = 8
"""Output and gradient of the input; of the adapter two forward and four backward."""
PRODUCTS_A_TILE = 5
"""Attention in 16 bits: probabilities times values, and four backward."""
TILE_TOKENS = 128


def kernel_bytes(shape: ModelShape, *, tokens: int, micro_batches: int | None) -> int:
    """Return the bytes of the kernels kept after so many micro-batches of `tokens` tokens each.

    None micro-batches are more than fill the cache.
    """
    given = os.environ.get(CAPACITY_VARIABLE, "")
    capacity = int(given) if given.isdecimal() else CAPACITY
    if micro_batches is None:
        return capacity * KERNEL_BYTES
    linears = len(set(shape.linear.values()))
    tiles = math.ceil(tokens / TILE_TOKENS)
    seen = micro_batches * (PRODUCTS_A_LINEAR * linears + PRODUCTS_A_TILE * tiles)
    return min(seen, capacity) * KERNEL_BYTES
