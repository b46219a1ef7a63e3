"""Verify a model directory or a GGUF file against the run, adapter or model that it came from."""

from collections.abc import Sequence
from pathlib import Path

from llmtune.checks.directory import check_directory
from llmtune.checks.file import ModelFile, check_file
from llmtune.checks.prompts import HeldOut
from llmtune.checks.reference import Reference
from llmtune.checks.verification import Comparison, Tolerances, Verification
from llmtune.errors import LlmtuneError
from llmtune.evaluation.suite import load_suites
from llmtune.evaluation.tasks.base import Suite
from llmtune.exporting.gguf_writer.types import read_file_type, read_origin
from llmtune.io.gguf_head import GGUF_SUFFIX
from llmtune.merging.config import MergeConfig
from llmtune.runs.targets import Target, resolve_target


def verify_target(
    subject: Path, against: str, overrides: Sequence[str], tolerances: Tolerances
) -> Verification:
    """Compare a model directory or a GGUF file, read from disk, with what it came from.

    Args:
        subject: a merged or 4-bit model directory, or a GGUF file.
        against: a run, its config, an adapter, or a model.
        overrides: `key.path=value` of the run's config.
        tolerances: by how much they may differ.

    Raises:
        LlmtuneError: `subject` or `against` cannot be loaded.
    """
    if not subject.exists():
        raise LlmtuneError(f"{subject}: does not exist; expected a directory or a .gguf file")
    target = resolve_target(against, overrides)
    found: Comparison
    if subject.suffix == GGUF_SUFFIX:
        file = ModelFile(subject, read_file_type(subject), *read_origin(subject))
        suites = load_suites(target.config.evaluate) if target.config else []
        found = check_file(file, _reference(target, suites), tolerances)
    else:
        found = check_directory(subject, _reference(target), tolerances)
    return Verification(str(subject), against, found)


def _reference(target: Target, suites: Sequence[Suite] = ()) -> Reference:
    """Return what the checks may know of a target."""
    config = target.config
    return target.widen(
        Reference,
        max_kl=(config.merge if config else MergeConfig()).max_kl,
        held_out=HeldOut(config.data, config.seed, tuple(suites)) if config else None,
    )
