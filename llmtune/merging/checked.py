"""The one way to a merged model: written beside its place, compared, and only then moved there."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from llmtune.checks.merge_result import VerifyResult
from llmtune.checks.provenance import add_to_provenance
from llmtune.data.open_prompts import OPEN_PROMPTS
from llmtune.errors import CheckFailed
from llmtune.io.manifest import CheckRecord, MergeRecord
from llmtune.io.unfinished import move_into_place, require_space, unfinished_dir
from llmtune.merging.changes import MergePlan
from llmtune.merging.config import MergeSettings
from llmtune.merging.merge import MergeResult, needed_bytes, write_merge
from llmtune.models.hardware import choose_device

log = logging.getLogger("llmtune")


@dataclass(frozen=True)
class WrittenMerge:
    """A merged model that is written and not yet in its place."""

    plan: MergePlan
    directory: Path
    result: MergeResult


@dataclass(frozen=True)
class Judgment:
    """Which of the written merges is kept, and how it compares with the live model."""

    kept: WrittenMerge
    check: VerifyResult | None
    """None if there is no live model to compare with."""
    candidates: Mapping[str, VerifyResult] = field(default_factory=dict)
    """The scores of both bases' merges, by base, if there was a choice."""


@dataclass(frozen=True)
class CheckedMerge:
    """A merged model in its place."""

    result: MergeResult
    check: VerifyResult | None
    candidates: Mapping[str, VerifyResult]

    def to_record(self) -> MergeRecord:
        """Return the result as it is recorded."""
        values = cast(MergeRecord, self.result.to_dict())
        if self.candidates:
            values["candidates"] = _score_values(self.candidates)
        values["check"] = None if self.check is None else _check_values(self.check)
        return values


def merge_checked(
    plans: Sequence[MergePlan],
    out_dir: Path,
    judge: Callable[[Sequence[WrittenMerge]], Judgment],
    *,
    max_kl: float,
    settings: MergeSettings,
) -> CheckedMerge:
    """Write every plan, let `judge` choose one and compare it, and let only that one appear.

    Raises:
        LlmtuneError: the disk is too small, or a merged weight is not finite.
        CheckFailed: the KL of the one that is kept to its live model is above `max_kl`.
    """
    place = out_dir.absolute()
    left = f"nothing was left in {out_dir}"
    if place.exists():
        left = f"the earlier model in {out_dir} is as it was"
    require_space(place, sum(needed_bytes(plan) for plan in plans))
    device = choose_device(settings.device)
    with unfinished_dir(place) as scratch:
        written = []
        for plan in plans:
            directory = scratch / plan.base
            written.append(WrittenMerge(plan, directory, _write(plan, directory, device)))
        judgment = judge(written)
        kept, check = judgment.kept, judgment.check
        problem = check and check.find_problem(max_kl)
        if problem:
            raise CheckFailed(f"{problem}; {left}")
        for notice in check.notices() if check else ():
            log.warning("merge: %s", notice)
        record: MergeRecord = {}
        if judgment.candidates:
            record["candidates"] = _score_values(judgment.candidates)
        record["check"] = None if check is None else check.numbers()
        add_to_provenance(kept.directory, record)
        move_into_place(kept.directory, place)
    return CheckedMerge(replace(kept.result, out_dir=out_dir), check, judgment.candidates)


def _write(plan: MergePlan, directory: Path, device: Any) -> MergeResult:
    result = write_merge(plan, directory, device=device)
    log.info(
        "merge into the %s base: %d of %d tensors changed, %.1f s",
        plan.base,
        sum(result.changes.values()),
        result.num_tensors,
        result.seconds,
    )
    return result


def _score_values(candidates: Mapping[str, VerifyResult]) -> dict[str, CheckRecord]:
    return {base: score.numbers() for base, score in candidates.items()}


def _check_values(check: VerifyResult) -> CheckRecord:
    values = cast(CheckRecord, asdict(check))
    if check.num_open_prompts:
        values["open_prompts"] = list(OPEN_PROMPTS[: check.num_open_prompts])
    return values
