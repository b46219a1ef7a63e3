"""Regexes of an adapter's config: refused if they are none, or take too long on a module's name."""

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from functools import lru_cache

from llmtune.errors import LlmtuneError

MOST_LENGTH = 20_000
"""Characters; the longest published pattern, a list of modules, has about 4,000."""
MOST_SECONDS = 2
"""Of the processor, for all patterns on all names; usual ones take microseconds."""
MOST_WAIT = 60
REPEATS = re.compile(r"[*+{]")
CHECKED_NAMES = 40
NUMBER = re.compile(r"\d+")

# A name that an adapter does not list is tried as well: these are of the usual architectures.
USUAL_NAMES = (
    "base_model.model.model.layers.10.self_attn.q_proj",
    "model.language_model.layers.31.mlp.experts.7.down_proj",
    "model.layers.31.block_sparse_moe.experts.127.gate_up_proj",
    "transformer.h.10.attn.c_attn",
    "gpt_neox.layers.10.attention.query_key_value",
    "vision_tower.vision_model.encoder.layers.10.self_attn.out_proj",
    "lm_head",
)
MATCHING = """
import json, re, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[1]), int(sys.argv[1]) + 1))
except ImportError:
    pass
patterns, names = json.loads(sys.stdin.read())
for pattern in patterns:
    for name in names:
        re.match(rf"(.*\\.)?({pattern})$", name)
print("quick")
"""


def require_quick_patterns(patterns: Iterable[str], names: Iterable[str], *, place: str) -> None:
    """Check that patterns are regexes, and match module names without hanging.

    Python's matcher takes exponential time on some patterns and cannot be told to stop, so what
    repeats more than once is tried in a process of its own first.

    Args:
        patterns: of a config.
        names: of modules that they may be matched with; a few of the kinds are tried.
        place: where the patterns were read, for the message.

    Raises:
        LlmtuneError: one is not a regex, is too long, or takes too long.
    """
    given = tuple(dict.fromkeys(patterns))
    for pattern in given:
        if len(pattern) > MOST_LENGTH:
            raise LlmtuneError(
                f"{place}: the pattern {pattern[:40]!r}... has {len(pattern):,} characters; "
                f"expected {MOST_LENGTH:,} at most"
            )
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError, MemoryError) as error:
            raise LlmtuneError(
                f"{place}: the pattern {pattern[:80]!r} is not a regex: {error}"
            ) from None
    risky = tuple(pattern for pattern in given if len(REPEATS.findall(pattern)) > 1)
    kinds = {NUMBER.sub("0", name): name for name in names}
    tried = (*USUAL_NAMES, *sorted(kinds.values(), key=len)[-CHECKED_NAMES:])
    if risky and not _are_quick(risky, tried, MOST_SECONDS):
        raise LlmtuneError(
            f"{place}: the pattern {min(risky, key=len)[:80]!r} takes too long to match a module's "
            "name; write it without a repeat inside a repeat"
        )


@lru_cache(maxsize=256)
def _are_quick(patterns: tuple[str, ...], names: tuple[str, ...], seconds: int) -> bool:
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", MATCHING, str(seconds)],
            input=json.dumps([patterns, names]),
            capture_output=True,
            text=True,
            timeout=MOST_WAIT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.stdout.strip() == "quick"
