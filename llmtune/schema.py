"""The base class of every config section: frozen, and closed to keys it does not declare."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One section of a config: a knob is one field, declared once with its unit and its help.

    Unknown keys are errors and a loaded section cannot be changed, so what `config show` prints
    is what every stage reads.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
