"""Another model's answers, from a file: scored by the suite's own metric, item by item."""

import codecs
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtune.data.problems import list_first
from llmtune.errors import LlmtuneError
from llmtune.evaluation.results import ItemScore
from llmtune.evaluation.tasks.base import PromptedSuite, Suite
from llmtune.io.json_files import parse_json

logger = logging.getLogger("llmtune")


@dataclass(frozen=True)
class Prediction:
    """One answer: `id` None is by place, `suite` None fits any suite that has the item."""

    text: str
    id: str | None
    suite: str | None


@dataclass(frozen=True)
class PredictionsFile:
    """The answers of one file."""

    name: str
    path: Path
    predictions: tuple[Prediction, ...]

    def texts_by_suite(self, suites: Sequence[Suite]) -> list[tuple[Suite, dict[str, str]]]:
        """Return the answers by item id for each suite that the file is about.

        A line that names a suite is about that one; the others are about the target suites: by
        the ids of their items, or by place where there are no ids and as many lines as items.

        Raises:
            LlmtuneError: the file is about none of the suites.
        """
        found = [(suite, self._texts_for(suite)) for suite in suites]
        answered = [(suite, texts) for suite, texts in found if texts]
        if not answered:
            targets = [f"{s.name} ({len(s.items)} items)" for s in suites if s.role == "target"]
            raise LlmtuneError(
                f"evaluate.predictions.{self.name}: {self.path}: none of its "
                f"{len(self.predictions)} lines answers an item; the target suites are "
                f"{', '.join(targets) or 'none'}"
            )
        return answered

    def say_unknown(self, answered: Sequence[tuple[Suite, dict[str, str]]]) -> None:
        """Log how many lines answer no item: ids of other items, or a suite that is not there.

        Args:
            answered: what `texts_by_suite` returned.
        """
        used = {(suite.name, name) for suite, texts in answered for name in texts}
        names = {name for _, name in used}
        unknown = [
            each
            for each in self.predictions
            if each.id is not None
            and ((each.suite, each.id) not in used if each.suite else each.id not in names)
        ]
        if unknown:
            first = unknown[0]
            of_suite = f" of suite {first.suite!r}" if first.suite else ""
            logger.warning(
                "evaluate.predictions.%s: %d of %d lines answer no item that is measured "
                "(first: id %r%s)",
                self.name,
                len(unknown),
                len(self.predictions),
                first.id,
                of_suite,
            )

    def _texts_for(self, suite: Suite) -> dict[str, str]:
        is_target = suite.role == "target"
        own = [
            each
            for each in self.predictions
            if each.suite == suite.name or (each.suite is None and is_target)
        ]
        if all(each.id is None for each in own):
            if len(own) != len(suite.items):
                return {}
            return {item.id: each.text for item, each in zip(suite.items, own, strict=True)}
        ids = {item.id for item in suite.items}
        return {each.id: each.text for each in own if each.id in ids}


def read_predictions(name: str, path: Path) -> PredictionsFile:
    """Read JSONL of {"prediction": ..., "id": ..., "suite": ...}; the last two may be left out.

    Raises:
        LlmtuneError: the file is missing or empty, or lines are wrong (`file:line: what`).
    """
    where = f"evaluate.predictions.{name}: {path}"
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise LlmtuneError(f"{where}: cannot be read: {error.strerror}") from None
    found: list[Prediction] = []
    problems: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append(_read_line(line))
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
    if not problems and len({each.id is None for each in found}) > 1:
        problems.append(f"{path}: some lines have an id and some have none; give all or none")
    times = Counter((each.suite, each.id) for each in found if each.id is not None)
    twice = [name for (_, name), count in times.items() if count > 1]
    if twice:
        problems.append(f"{path}: the id {twice[0]!r} is answered more than once; give it one line")
    if problems:
        raise LlmtuneError("\n".join(list_first(problems)))
    if not found:
        raise LlmtuneError(f"{where}: holds no predictions")
    return PredictionsFile(name, path, tuple(found))


def score_predictions(suite: Suite, texts: Mapping[str, str]) -> list[ItemScore]:
    """Score the items that were answered, in the suite's order; unparseable answers score 0.

    Raises:
        LlmtuneError: the suite's metric needs probabilities, which a text has not.
    """
    config = suite.config
    assert isinstance(config, PromptedSuite)
    config.require_text_metric(suite.name)
    return [config.score_text(item, texts[item.id]) for item in suite.items if item.id in texts]


def _read_line(line: bytes) -> Prediction:
    try:
        row = parse_json(line.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, found {type(row).__name__}")
    text = row.get("prediction")
    if not isinstance(text, str | int | float) or isinstance(text, bool):
        raise ValueError(f'expected "prediction" with a text; the line has {sorted(row)}')
    names = (None if row.get(key) is None else str(row[key]) for key in ("id", "suite"))
    return Prediction(str(text), *names)
