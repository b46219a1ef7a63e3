"""What the libraries below PyTorch read from the environment, and what llmtune sets if nobody has.

**Compiled products.** oneDNN compiles a 16-bit matrix product for its very sizes and keeps the last
ones in its primitive cache. Rows differ in length, so almost every micro-batch brings sizes that
never come again; what pays is that the layers of one micro-batch share theirs. A cache that holds a
few micro-batches keeps that, for a quarter of the memory of oneDNN's own.

**Spinning threads.** GNU OpenMP's threads wait for each other by spinning, 300,000 rounds long
(some milliseconds), before they sleep. With one of them off its processor because of other work,
the others burn theirs at the end of every operation: on two cores beside one busy process, a step
of small products was up to 40 times slower than with threads that sleep. Threads that never spin
are 17 % slower at small products on an idle machine, with a short spin 10 %; large ones are equal.
"""

import os
import sys
from collections.abc import Mapping, MutableMapping

CAPACITY = 256
"""Products kept. A micro-batch of rows up to 128 tokens has about 60 sizes, a row of 4,096 tokens
about 200: fewer than the layers share would be compiled again in every layer."""
ONEDNN_CAPACITY = 1024
"""What oneDNN keeps where nothing is set."""
VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY")
"""Both are read by oneDNN, the first wins."""
SPIN_ROUNDS = 1_000
"""Rounds a thread spins before it sleeps: what GNU OpenMP itself takes if it knows that it has more
threads than processors."""
WAITING_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
"""Either decides how long threads spin."""


def set_defaults(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set what the user has not; a process that is started from here inherits it."""
    limit_kernel_cache(environ)
    # OpenMP reads it once, when PyTorch is imported: set later, it would only look as if it held.
    if "torch" not in sys.modules:
        limit_spinning(environ)


def limit_kernel_cache(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set the capacity if the user has not; oneDNN reads it at its first product in a process."""
    if not any(name in environ for name in VARIABLES):
        environ[VARIABLES[0]] = str(CAPACITY)


def limit_spinning(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set how long threads spin if the user has not said how they wait."""
    if not any(name in environ for name in WAITING_VARIABLES):
        environ[WAITING_VARIABLES[0]] = str(SPIN_ROUNDS)


def threads_sleep(environ: Mapping[str, str] = os.environ) -> bool:
    """Tell whether threads that wait soon leave their processor to others."""
    given = environ.get("GOMP_SPINCOUNT", "").strip()
    if given.isdecimal():  # wins over the policy
        return int(given) <= SPIN_ROUNDS
    return environ.get("OMP_WAIT_POLICY", "").strip().lower() == "passive"


def read_capacity(environ: Mapping[str, str] = os.environ) -> int:
    """Return how many products are kept, as oneDNN reads the environment."""
    given = next((environ[name] for name in VARIABLES if environ.get(name)), "")
    return int(given) if given.isdecimal() else ONEDNN_CAPACITY
