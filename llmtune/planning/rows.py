"""How long the rows are: of the real data if it can be read, else a stated assumption."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmtune.data.cache import cache_path, load_prepared
from llmtune.data.config import DataConfig, SourceConfig
from llmtune.data.example import PreparedData
from llmtune.data.hub import is_hub_id
from llmtune.data.prepare import prepare_examples
from llmtune.data.rows import find_files
from llmtune.errors import LlmtuneError
from llmtune.io.quiet import quieted
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.config import OWN_TEMPLATE, TemplateChoice
from llmtune.training.memory.arithmetic import RowSizes

READ_BYTES = 20 << 20
"""Files larger than this together are not tokenized for a plan."""
SAMPLED_ROWS = 2000
ASSUMED_LENGTH = 1024
ASSUMED_TRAINED_RATIO = 0.5


@dataclass(frozen=True)
class RowFacts:
    """Lengths in tokens. `source` says where they are from."""

    longest: int
    mean: float
    largest_step: int
    """Tokens of the largest possible optimizer step, rows laid end to end."""
    trained_ratio: float
    num_rows: int | None
    """Training rows of an epoch; None if they were not counted."""
    source: str
    num_lengths: int | None = None
    """Different lengths among the rows; None if they were not counted."""

    def sizes(self, *, packed: bool, batch_size: int) -> RowSizes:
        """Return what the micro-batches are planned by; padded rows count as the longest."""
        step = self.largest_step if packed else batch_size * self.longest
        return RowSizes(self.longest, step)


def read_rows(
    data: DataConfig,
    tokenizer_dir: Path | None,
    *,
    batch_size: int,
    seed: int,
    template: TemplateChoice = OWN_TEMPLATE,
) -> RowFacts:
    """Return the lengths of the run's rows.

    They are tokenized as training does (and kept for it), unless there is no tokenizer or no data
    yet: then every row is taken to have `data.max_length` tokens, or 1024.

    Raises:
        LlmtuneError: the rows are there and something is wrong with them.
    """
    sources = [*data.train, *data.evaluation]
    absent = [source.path for source in sources if not _is_here(source)]
    if tokenizer_dir is None or absent:
        why = f"{absent[0]} is not here" if absent else "there is no tokenizer here"
        return _assume(data, batch_size, why)
    with quieted("llmtune.data"):  # the run itself tells of the rows what it has to tell
        tokenizer = Checkpoint.open(tokenizer_dir, template=template).tokenizer
        kept_at = cache_path(data, tokenizer, split="train", seed=seed)
        kept = load_prepared(kept_at) if data.cache and kept_at is not None else None
        is_sampled = kept is None and sum(map(_num_bytes, sources)) > READ_BYTES
        if is_sampled:
            data = data.model_copy(update={"train": _limit(data.train), "cache": False})
        train = kept or prepare_examples(data, tokenizer, split="train", seed=seed)
        evaluation = prepare_examples(data, tokenizer, split="evaluation", seed=seed)
    return measure_rows(train, evaluation, batch_size=batch_size, is_sampled=is_sampled)


def measure_rows(
    train: PreparedData, evaluation: PreparedData, *, batch_size: int, is_sampled: bool = False
) -> RowFacts:
    """Return the lengths of rows that are already tokenized."""
    lengths = np.concatenate([train.examples.lengths, evaluation.examples.lengths])
    longest_first = -np.sort(-lengths)
    report = train.report
    count = len(train.examples)
    seen = f"the first {SAMPLED_ROWS} rows of each source" if is_sampled else f"all {count} rows"
    return RowFacts(
        longest=int(longest_first[0]),
        mean=float(train.examples.lengths.mean()),
        largest_step=int(longest_first[:batch_size].sum()),
        trained_ratio=report.num_trained_tokens / max(report.num_tokens, 1),
        num_rows=None if is_sampled else count,
        source=f"{seen}, tokenized",
        num_lengths=None if is_sampled else len(np.unique(lengths)),
    )


def _assume(data: DataConfig, batch_size: int, why: str) -> RowFacts:
    length = data.max_length or ASSUMED_LENGTH
    named = "data.max_length" if data.max_length else "an assumption"
    return RowFacts(
        longest=length,
        mean=float(length),
        largest_step=batch_size * length,
        trained_ratio=ASSUMED_TRAINED_RATIO,
        num_rows=None,
        source=f"every row taken to have {length} tokens ({named}), half of them trained: {why}",
    )


def _is_here(source: SourceConfig) -> bool:
    if is_hub_id(source.path):
        return False
    try:
        return bool(find_files(source.path))
    except LlmtuneError:
        return False


def _num_bytes(source: SourceConfig) -> int:
    return sum(file.stat().st_size for file in find_files(source.path))


def _limit(sources: list[SourceConfig]) -> list[SourceConfig]:
    return [
        source.model_copy(update={"limit": min(source.limit or SAMPLED_ROWS, SAMPLED_ROWS)})
        for source in sources
    ]
