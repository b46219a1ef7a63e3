"""The merge, and the check of the merged model against base + adapter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from llmtune.io.manifest import CheckRecord, MergeRecord
from llmtune.reporting.facts import Fact
from llmtune.reporting.numbers import FRACTION, format_count, format_number
from llmtune.reporting.sections.generations import Passages, mark_changes


@dataclass(frozen=True)
class ShownDivergence:
    """One open prompt whose two greedy answers diverge, with what differs marked."""

    title: str
    live: Passages
    merged: Passages


@dataclass(frozen=True)
class ShownCheck:
    """The check in a sentence, in rows, and prompt by prompt."""

    sentence: str
    facts: tuple[Fact, ...]
    divergences: tuple[ShownDivergence, ...]


class MergeSection(TypedDict):
    """What the template shows next to the merge stage's own result."""

    check: ShownCheck | None


def show_merge(merge: MergeRecord) -> MergeSection | None:
    """Return the merge's check, or None if there is no merge."""
    return {"check": describe_check(merge.get("check"))} if merge else None


def describe_check(check: CheckRecord | None) -> ShownCheck | None:
    """Return what to show of the merge stage's check, or None if it was not made.

    A number that the check does not hold is left out.
    """
    if not check:
        return None
    counted = (
        ("labels", check.get("num_same_labels"), check.get("num_labels")),
        ("greedy answers", check.get("num_same_texts"), check.get("num_open_prompts")),
    )
    same = [f"{part} of {whole} {name}" for name, part, whole in counted if whole]
    sentence = f"Merged model and base + adapter, both computed in {check.get('dtype', 'one type')}"
    sentence += f", gave the same {' and '.join(same)}." if same else " and compared."
    tokens, kl = check.get("num_tokens"), check.get("kl")
    largest, agreement = check.get("max_logit_difference"), check.get("top1_agreement")
    values = (
        ("tokens compared", tokens, format_count(tokens)),
        ("KL to base + adapter, nats/token", kl, format_number(kl, 3)),
        ("largest logit difference", largest, format_number(largest, 3)),
        ("positions with the same likeliest token", agreement, FRACTION.score(agreement)),
    )
    facts = (Fact(label, text) for label, number, text in values if number is not None)
    return ShownCheck(sentence, tuple(facts), _divergences(check))


def _divergences(check: CheckRecord) -> tuple[ShownDivergence, ...]:
    rows: Sequence[Mapping[str, Any]] = check.get("divergences") or ()
    prompts: Sequence[str] = check.get("open_prompts") or ()
    return tuple(
        ShownDivergence(
            _title(row, prompts),
            *mark_changes(str(row.get("live_text", "")), str(row.get("merged_text", ""))),
        )
        for row in rows
    )


def _title(row: Mapping[str, Any], prompts: Sequence[str]) -> str:
    place = row.get("prompt")
    prompt = f"Open prompt {place + 1}" if isinstance(place, int) else str(place)
    if isinstance(place, int) and place < len(prompts):
        prompt = f"“{prompts[place]}”"
    live, merged = (format_number(row.get(f"{arm}_margin"), 3) for arm in ("live", "merged"))
    return (
        f"{prompt}: they diverge after {row.get('position')} tokens; there the likeliest token led "
        f"the second by {live} in logits (base + adapter) and {merged} (merged)"
    )
