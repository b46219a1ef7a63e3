"""Was the task learned, or the rows? Loss on seen against unseen rows, beyond the base's own."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from llmtune.evaluation.diagnosis.base import (
    Diagnosis,
    Diagnostic,
    Extent,
    Given,
    Interval,
    Planned,
    refuse,
)
from llmtune.evaluation.diagnosis.shown import Facts, Paragraph, Section
from llmtune.io.fingerprint import hash_json

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from llmtune.data.example import Example
    from llmtune.evaluation.diagnosis.subject import DiagnosisSettings, Subject

MAX_ROWS = 200
MIN_ROWS = 4
BOOTSTRAP_SAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class MemorizationResult(Diagnostic):
    """Gap of held-out and train loss beyond the base's, in nats a token, and membership AUC."""

    FILE_NAME: ClassVar[str] = "memorization.json"
    gap_nats: float
    gap_interval: Interval
    auc: float
    auc_interval: Interval
    n_train: int
    n_held_out: int


class Memorization(Diagnosis[MemorizationResult]):
    """Whether the rows that were trained on can be distinguished from rows that were not."""

    name = "memorization"
    former_name = "memorisation"
    what = "memorization"
    help = "Whether train rows can be distinguished from held-out ones"
    extent: ClassVar[Extent] = "full"
    number_names = ("memorization_auc",)
    result = MemorizationResult

    def plan(self, given: Given) -> Planned[MemorizationResult]:
        """Plan to compare seen with held-out rows."""
        return plan_memorization(given.subject, given.diagnosis_settings)

    def section(self, found: MemorizationResult, facts: Facts) -> Section | None:
        """Say the gap of held-out and training loss, and the membership AUC."""
        nats, count = facts.write.nats, facts.write.count
        (gap_low, gap_high), (auc_low, auc_high) = found.gap_interval, found.auc_interval
        text = (
            "Beyond what the base already shows, the held-out rows cost "
            f"{nats(found.gap_nats)} nats/token more than the training rows "
            f"[{nats(gap_low)}, {nats(gap_high)}]. From how much likelier a row became one can "
            f"tell training from held-out rows with an AUC of {found.auc:.2f} "
            f"[{auc_low:.2f}, {auc_high:.2f}]; 0.5 is a coin."
        )
        note = (
            f"{count(found.n_train)} training rows against {count(found.n_held_out)} held-out rows."
        )
        return Section(
            "Learned, or learned by heart?", (Paragraph(text), Paragraph(note, is_note=True))
        )

    def numbers(self, found: MemorizationResult) -> dict[str, float | None]:
        """Return the membership AUC."""
        return {"memorization_auc": found.auc}


@dataclass(frozen=True)
class RowLosses:
    """Of each row the summed -log p of its trained tokens under base and tuned, in nats, [N]."""

    base: np.ndarray
    tuned: np.ndarray
    num_tokens: np.ndarray


def plan_memorization(subject: Subject, settings: DiagnosisSettings) -> Planned[MemorizationResult]:
    """Plan to compare at most 200 rows that training saw with as many held-out rows.

    Refused where fewer than four rows were seen, or held out.
    """
    from llmtune.evaluation.diagnosis.subject import hash_ids, model_inputs, pick

    seen = [subject.train[place] for place in pick(subject.trained, MAX_ROWS, settings.seed)]
    places = pick(range(len(subject.held_out)), MAX_ROWS, settings.seed)
    held_out = [subject.held_out[place] for place in places]
    if min(len(seen), len(held_out)) < MIN_ROWS:
        return refuse(
            MemorizationResult,
            f"{len(seen)} trained and {len(held_out)} held-out rows; it needs "
            f"{MIN_ROWS} of each: give data.evaluation or data.evaluation_share",
        )
    ids = {"seen": [e.input_ids for e in seen], "held_out": [e.input_ids for e in held_out]}
    inputs = model_inputs(subject.scored, with_adapter=True) | {
        "rows": hash_json({name: hash_ids(rows) for name, rows in ids.items()})
    }
    tokens = 2 * sum(len(row) for rows in ids.values() for row in rows)

    def measure() -> MemorizationResult:
        started = time.perf_counter()
        losses = [
            measure_losses(
                subject.scored.model,
                rows,
                token_budget=settings.budget(subject.scored),
                on_progress=settings.report(name, len(rows)),
            )
            for name, rows in (("memory, seen rows", seen), ("memory, held-out rows", held_out))
        ]
        gap, gap_interval, auc, auc_interval = compare_losses(*losses, settings=settings)
        return MemorizationResult(
            inputs=inputs,
            seconds=time.perf_counter() - started,
            gap_nats=gap,
            gap_interval=gap_interval,
            auc=auc,
            auc_interval=auc_interval,
            n_train=len(seen),
            n_held_out=len(held_out),
        )

    return Planned(MemorizationResult, inputs, tokens, measure)


def compare_losses(
    seen: RowLosses, held_out: RowLosses, *, settings: DiagnosisSettings
) -> tuple[float, Interval, float, Interval]:
    """Return gap and membership AUC, each with its percentile bootstrap interval over rows.

    gap = [NLL_held(tuned) - NLL_seen(tuned)] - [NLL_held(base) - NLL_seen(base)], in nats per
    trained token: what the base itself finds harder in one of the sets is taken off. AUC of
    m(x) = NLL_base(x) - NLL_tuned(x), per trained token, of seen against held-out rows: 0.5 where
    training changed both alike, 1 if every seen row gained more.
    """
    import numpy as np

    random = np.random.default_rng(settings.seed)
    draws = []
    for _ in range(BOOTSTRAP_SAMPLES):
        rows = [random.integers(0, len(s.base), len(s.base)) for s in (seen, held_out)]
        draws.append((_gap(seen, held_out, *rows), _auc(seen, held_out, *rows)))
    tail = (1 - settings.confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail], axis=0)
    everything = np.arange(len(seen.base)), np.arange(len(held_out.base))
    return (
        _gap(seen, held_out, *everything),
        (float(low[0]), float(high[0])),
        _auc(seen, held_out, *everything),
        (float(low[1]), float(high[1])),
    )


def membership_auc(seen: np.ndarray, held_out: np.ndarray) -> float:
    """Return the chance that a seen row's value is larger than a held-out one's, ties a half.

    The Mann-Whitney statistic from mid-ranks.
    """
    import numpy as np
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([seen, held_out]))
    count = len(seen)
    statistic = ranks[:count].sum() - count * (count + 1) / 2
    return float(statistic / (count * len(held_out)))


def measure_losses(
    model: nn.Module,
    rows: Sequence[Example],
    *,
    token_budget: int,
    on_progress: Callable[[int], None] | None = None,
) -> RowLosses:
    """Sum the loss of every row's trained tokens under base (adapter off) and tuned.

    Raises:
        LlmtuneError: the model has no adapter, or a row exceeds its positions.
    """
    import numpy as np

    from llmtune.data.example import IGNORE_INDEX
    from llmtune.scoring.batches import (
        adapter_disabled,
        batch_by_length,
        float32_head,
        inference,
        logits_positions,
        model_device,
        pad_rows,
        require_positions,
        run_forward,
    )

    lengths = [len(row.input_ids) for row in rows]
    require_positions(model, max(lengths, default=0))
    sums = np.zeros((2, len(rows)))
    done = 0
    kept = max((_answer_length(row) for row in rows), default=1)
    max_rows = max(1, logits_positions(model) // kept)
    with inference(model), float32_head(model):
        for indices in batch_by_length(lengths, token_budget, max_rows=max_rows):
            chosen = [rows[i] for i in indices]
            batch = pad_rows([row.input_ids for row in chosen], model_device(model), left=True)
            for arm in (0, 1):
                block = contextlib.nullcontext() if arm else adapter_disabled(model)
                with block:
                    logits = run_forward(model, batch, logits_to_keep=kept).logits
                sums[arm, indices] = _trained_losses(logits, chosen)
            done += len(indices)
            if on_progress is not None:
                on_progress(done)
    counts = [sum(label != IGNORE_INDEX for label in row.labels[1:]) for row in rows]
    return RowLosses(sums[0], sums[1], np.array(counts))


def _answer_length(row: Example) -> int:
    """Return the tokens from the one before the first trained token to the row's end."""
    from llmtune.data.example import IGNORE_INDEX

    first = next(i for i, label in enumerate(row.labels) if i and label != IGNORE_INDEX)
    return len(row.labels) - first + 1


def _trained_losses(logits: torch.Tensor, rows: Sequence[Example]) -> list[float]:
    """Sum each row's loss; `logits` are [B, kept, V] of the last positions."""
    import torch
    from torch import nn

    from llmtune.data.example import IGNORE_INDEX

    losses = []
    for row_logits, row in zip(logits, rows, strict=True):
        kept = min(len(row_logits), len(row.labels))
        labels = torch.tensor(row.labels[-kept:][1:], device=logits.device, dtype=torch.long)
        counted = labels != IGNORE_INDEX
        predicted = row_logits[-kept:-1][counted].float()
        loss = nn.functional.cross_entropy(predicted, labels[counted], reduction="sum")
        losses.append(loss.item())
    return losses


def _gap(seen: RowLosses, held_out: RowLosses, first: np.ndarray, second: np.ndarray) -> float:
    def differences(losses: RowLosses, rows: np.ndarray) -> float:
        changes = losses.tuned[rows] - losses.base[rows]
        return float(changes.sum() / losses.num_tokens[rows].sum())

    return float(differences(held_out, second) - differences(seen, first))


def _auc(seen: RowLosses, held_out: RowLosses, first: np.ndarray, second: np.ndarray) -> float:
    import numpy as np

    def gains(losses: RowLosses, rows: np.ndarray) -> np.ndarray:
        return np.asarray((losses.base[rows] - losses.tuned[rows]) / losses.num_tokens[rows])

    return membership_auc(gains(seen, first), gains(held_out, second))
