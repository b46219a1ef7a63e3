"""How many compiled matrix products a process keeps on a CPU: fewer than oneDNN would by itself.

oneDNN compiles a 16-bit product for its very sizes and keeps the last ones in its primitive cache.
Rows differ in length, so almost every micro-batch brings sizes that never come again; what pays is
that the layers of one micro-batch share theirs. A cache that holds a few micro-batches keeps that,
for a quarter of the memory of oneDNN's own.
"""

import os
from collections.abc import Mapping, MutableMapping

CAPACITY = 256
"""Products kept. A micro-batch of rows up to 128 tokens has about 60 sizes, a row of 4,096 tokens
about 200: fewer than the layers share would be compiled again in every layer."""
ONEDNN_CAPACITY = 1024
"""What oneDNN keeps where nothing is set."""
VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY")
"""Both are read by oneDNN, the first wins."""


def limit_kernel_cache(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set the capacity where the user has not; oneDNN reads it at its first product in a process.

    Processes that are started from here inherit it.
    """
    if not any(name in environ for name in VARIABLES):
        environ[VARIABLES[0]] = str(CAPACITY)


def read_capacity(environ: Mapping[str, str] = os.environ) -> int:
    """Return how many products are kept, as oneDNN reads the environment."""
    given = next((environ[name] for name in VARIABLES if environ.get(name)), "")
    return int(given) if given.isdecimal() else ONEDNN_CAPACITY
