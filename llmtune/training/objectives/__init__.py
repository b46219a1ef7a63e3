"""The `train.objective` section: what training minimizes. A new objective is one entry here."""

from llmtune.training.objectives.sft import SftObjective

ObjectiveConfig = SftObjective
"""With more than one: `Annotated[SftObjective | Other, Field(discriminator="method")]`."""

DEFAULT_OBJECTIVE = SftObjective()
"""What runs of versions without `train.objective` trained on."""
