"""Which experiment trackers a run may report to, and whether this machine has them."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal

from llmtune.errors import LlmtuneError

Reporter = Literal["tensorboard", "wandb", "mlflow", "trackio"]


def check_reporters(report_to: Sequence[Reporter]) -> None:
    """Check that the package behind every tracker is installed, before anything is loaded.

    Raises:
        LlmtuneError: names every missing package at once, and how to install it.
    """
    missing = [name for name in report_to if find_spec(name) is None]
    if missing:
        raise LlmtuneError(
            f"train.report_to names {', '.join(missing)}, but this environment does not have the "
            f"package{'s' if len(missing) > 1 else ''}. Install with "
            f"`pip install {' '.join(missing)}`, or take {'them' if len(missing) > 1 else 'it'} "
            "out of train.report_to."
        )
