"""The base class of every config section: frozen, and closed to keys it does not declare."""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """One section of a config: a knob is one field, declared once with its unit and its help.

    Unknown keys are errors and a loaded section cannot be changed, so what `config show` prints
    is what every stage reads. Numbers are finite, and `true` is not the number 1.
    """

    RIVALS: ClassVar[tuple[frozenset[str], ...]] = ()
    """Knobs of which only one can be set: an override of one unsets the others."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _keep_bools_from_numbers(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {
            name: _bools_as_words(value) if _takes_numbers_only(cls, name) else value
            for name, value in values.items()
        }


def default_of(section: type[Section], name: str) -> Any:
    """Return the value of a field that is not set."""
    return section.model_fields[name].get_default(call_default_factory=True)


def _takes_numbers_only(section: type[Section], name: str) -> bool:
    """Whether a field takes numbers, and neither `true` nor another section."""
    if name not in section.model_fields:
        return False
    kinds = set(_scalars(section.model_fields[name].annotation))
    return bool(kinds & {int, float}) and kinds <= {int, float, str, type(None)}


def _bools_as_words(value: Any) -> Any:
    """Return `value` with `true` and `false` as words, which pydantic does not take as 1 and 0."""
    if isinstance(value, dict):
        return {key: _bools_as_words(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_bools_as_words(child) for child in value]
    return str(value).lower() if isinstance(value, bool) else value


def _scalars(annotation: Any) -> Iterator[type]:
    """Yield the types that `annotation` is made of, without containers and constraints."""
    if get_origin(annotation) is Literal:
        yield from map(type, get_args(annotation))
    elif isinstance(annotation, type) and not get_args(annotation):
        yield annotation
    else:
        for argument in get_args(annotation):
            yield from _scalars(argument)
