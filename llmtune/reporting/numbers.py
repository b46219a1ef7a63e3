"""How the report writes numbers: percent and points, nats, seconds, bytes, probabilities."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from llmtune.io import sizes

T = TypeVar("T")
MINUS = "\N{MINUS SIGN}"
NO_VALUE = "\N{EN DASH}"
SECONDS_PER_MINUTE = 60
SECONDS_PER_HOUR = 3600
SMALLEST_P = 0.001
NO_BREAK = "\N{NO-BREAK SPACE}"
UNBROKEN = re.compile(r"n = (?=\d)|(?<=\d) (?=%|points|nats|bits|items|tokens)|\[\S+ (?=\S+\])")
"""Where a number and its unit, and the two ends of an interval, would be torn apart."""


@dataclass(frozen=True)
class Unit:
    """How one kind of score is written: `scale` times the raw value, with `decimals` digits."""

    name: str
    scale: float
    decimals: int
    score_suffix: str
    difference_suffix: str

    def score(self, value: float | None) -> str:
        """Format a score, as `89.7 %` or `3.412`; a dash if there is none."""
        if value is None:
            return NO_VALUE
        return _signed(value * self.scale, self.decimals) + self.score_suffix

    def difference(self, value: float | None) -> str:
        """Format a difference with its sign and its unit, as `+16.4 points`."""
        if value is None:
            return NO_VALUE
        return self.change(value) + self.difference_suffix

    def change(self, value: float) -> str:
        """Format a difference with its sign and without its unit, as `+16.4`."""
        return _signed(value * self.scale, self.decimals, plus=True)

    def interval(self, low: float, high: float) -> str:
        """Format an interval of a difference without its unit, as `[+13.6, +19.2]`."""
        return f"[{self.change(low)}, {self.change(high)}]"

    def size(self, value: float) -> str:
        """Format how large a difference is, without its sign, as `16.4 points`."""
        return self.bare_size(value) + self.difference_suffix

    def bare_size(self, value: float) -> str:
        """Format how large a difference is, without sign and unit, as `16.4`."""
        return f"{abs(value) * self.scale:.{self.decimals}f}"

    def bound(self, value: float) -> str:
        """Format a chosen size, with the digits it was chosen with, as `5 points`."""
        return f"{abs(value) * self.scale:g}{self.difference_suffix}"


FRACTION = Unit("fraction", 100.0, 1, " %", " points")
NATS = Unit("nats/token", 1.0, 3, "", " nats/token")
BITS = Unit("bits/byte", 1.0, 3, "", " bits/byte")
LOSS_UNITS = {"nats_per_token": NATS, "bits_per_byte": BITS}


def unit_of_metric(metric: str) -> Unit:
    """Return how a metric's values are written: a loss in its own unit, a score as percent."""
    return LOSS_UNITS.get(metric, FRACTION)


def format_count(value: float | None) -> str:
    """Format a whole number with thin groups of three digits, as `12 345`."""
    if value is None:
        return NO_VALUE
    return f"{round(value):,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def format_seconds(seconds: float | None) -> str:
    """Format a duration in at most two units, as `3 min 29 s`."""
    if seconds is None:
        return NO_VALUE
    if seconds < SECONDS_PER_MINUTE:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    whole = round(seconds)
    if whole < SECONDS_PER_HOUR:
        minutes, rest = divmod(whole, SECONDS_PER_MINUTE)
        return f"{minutes} min {rest} s"
    hours, rest = divmod(whole, SECONDS_PER_HOUR)
    return f"{hours} h {rest // SECONDS_PER_MINUTE} min"


def format_bytes(size: float | None) -> str:
    """Format a number of bytes with a binary unit, as `3.7 GiB`."""
    if size is None:
        return NO_VALUE
    return sizes.format_bytes(size)


def format_p(p_value: float | None) -> str:
    """Format a p-value, as `0.031` or `< 0.001`."""
    if p_value is None:
        return NO_VALUE
    return f"< {SMALLEST_P}" if p_value < SMALLEST_P else f"{p_value:.3f}"


def format_number(value: float | None, digits: int = 4) -> str:
    """Format a whole number as a count, any other with `digits` significant digits."""
    if value is None:
        return NO_VALUE
    if isinstance(value, int):
        return format_count(value)
    return f"{value:.{digits}g}".replace("-", MINUS, 1) if value < 0 else f"{value:.{digits}g}"


def keep_together(text: str) -> str:
    """Return a text in which no line ends between a number and what belongs to it."""
    return UNBROKEN.sub(lambda match: match.group().replace(" ", NO_BREAK), text)


def finite(value: object) -> float | None:
    """Return `value` as a float, or None if it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def without_nan(value: T) -> T:
    """Return JSON values with every NaN and infinity as None, which is what JSON has for them."""
    return cast(T, _without_nan(value))


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _signed(value: float, decimals: int, *, plus: bool = False) -> str:
    text = f"{abs(value):.{decimals}f}"
    if float(text) == 0:
        return text
    if value < 0:
        return MINUS + text
    return "+" + text if plus else text


class NumberWriter:
    """The report's way of writing numbers, handed to what describes a diagnosis."""

    def count(self, value: float | None) -> str:
        """Write a whole number."""
        return format_count(value)

    def nats(self, value: float | None) -> str:
        """Write a loss."""
        return NATS.score(value)

    def share(self, value: float | None) -> str:
        """Write a share as percent."""
        return FRACTION.score(value)

    def p(self, value: float | None) -> str:
        """Write a p-value."""
        return format_p(value)

    def number(self, value: float | None, digits: int = 4) -> str:
        """Write any number."""
        return format_number(value, digits)
