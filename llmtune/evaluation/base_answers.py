"""What the untouched base answers to the suites that are held to it, written once and kept."""

import logging
from collections.abc import Callable
from pathlib import Path

from llmtune.errors import LlmtuneError
from llmtune.evaluation.tasks.base import Suite
from llmtune.io.fingerprint import hash_file, hash_json
from llmtune.io.json_files import read_json
from llmtune.io.run_dir import atomic_write_json
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.gguf import cache_dir
from llmtune.models.hardware import release_memory
from llmtune.models.live import LiveModel
from llmtune.scoring.live import as_arm
from llmtune.training.memory.measure import is_out_of_memory

log = logging.getLogger("llmtune")

Load = Callable[[str], LiveModel]


def take_base_answers(suites: tuple[Suite, ...], base: Checkpoint, load: Load) -> tuple[Suite, ...]:
    """Return the suites, those held to the base with its answers as references.

    Answers are kept in the cache directory by the base's fingerprint, its template and the items.

    Args:
        base: the checkpoint that the user gave.
        load: loads `original`, the base as it is, or if that does not fit `tuned`, which answers
            with its adapter off; both are given back here.
    """
    paths = {s.name: _kept_at(s, base) for s in suites if s.config.NEEDS_BASE_ANSWERS}
    answers = {name: _read(path) for name, path in paths.items()}
    left = [suite for suite in suites if suite.name in answers and answers[suite.name] is None]
    if left:
        live, is_kept = _load(load)
        with as_arm(live, "base") as untouched:
            for suite in left:
                log.info("evaluate: the untouched base answers %s, once", suite.name)
                written = suite.config.write_answers(untouched, suite)
                answers[suite.name] = written
                if is_kept:
                    atomic_write_json(paths[suite.name], written)
        del live, untouched
        release_memory()
    return tuple(
        suite if (texts := answers.get(suite.name)) is None else suite.with_base_answers(texts)
        for suite in suites
    )


def _load(load: Load) -> tuple[LiveModel, bool]:
    """Load the original, or the quantized base if it does not fit; and whether to keep answers."""
    try:
        return load("original"), True
    except LlmtuneError as error:
        if error.__cause__ is None or not is_out_of_memory(error.__cause__):
            raise
    log.info("evaluate: the original base does not fit; the quantized base's answers are used")
    return load("tuned"), False


def _kept_at(suite: Suite, base: Checkpoint) -> Path:
    template = base.template
    key = hash_json(
        [
            base.fingerprint,
            hash_file(template.file) if template.file else None,
            *template.arguments,
            suite.config.model_dump(mode="json", exclude={"name", "description", "items", "role"}),
            suite.items_fingerprint,
        ]
    )
    return cache_dir() / "answers" / f"{key[:32]}.json"


def _read(path: Path) -> list[str] | None:
    try:
        texts = read_json(path)
    except LlmtuneError:
        return None  # not written yet, or damaged: written again
    return texts if isinstance(texts, list) else None
