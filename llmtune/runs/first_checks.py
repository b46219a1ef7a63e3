"""What can be found wrong with an evaluation before any training was paid for."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmtune.data.config import DataConfig
from llmtune.evaluation.config import EvaluateConfig

if TYPE_CHECKING:
    from llmtune.evaluation.suite import Suite

log = logging.getLogger("llmtune")


def check_evaluation_files(config: EvaluateConfig, suites: "Sequence[Suite]") -> None:
    """Read the user's prompt and prediction files and hold them against the suites.

    Raises:
        LlmtuneError: one is missing or cannot serve.
    """
    from llmtune.evaluation.few_shot import takes_demonstrations
    from llmtune.evaluation.predictions import read_predictions, takes_predictions
    from llmtune.evaluation.prompt_file import read_prompt_file

    for name, path in config.prompts.items():
        prompt = read_prompt_file(name, path)
        for suite in filter(takes_demonstrations, suites):
            prompt.ask(suite)
    for name, path in config.predictions.items():
        predictions = read_predictions(name, path)
        predictions.texts_by_suite([suite for suite in suites if takes_predictions(suite)])


def warn_of_leaks(config: EvaluateConfig, data: DataConfig, suites: "Sequence[Suite]") -> None:
    """Log which items of the suites stand word for word in the training rows."""
    if not config.measures("contamination") or not suites:
        return
    from llmtune.evaluation.diagnosis.contamination import find_leaked
    from llmtune.evaluation.diagnosis.rows import iter_row_texts

    sizes = {suite.name: len(suite.items) for suite in suites}
    for name, leaked in find_leaked(iter_row_texts(data, "train"), suites).items():
        item, place = next(iter(leaked.items()))
        log.warning(
            "suite %s: %d of its %d items stand word for word in the training rows (first: item %r "
            "in %s); its score will show memory. Take them out of one of the two before training",
            name,
            len(leaked),
            sizes[name],
            item,
            place,
        )
