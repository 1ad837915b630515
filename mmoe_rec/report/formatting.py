"""Numbers as a reader sees them."""

import math
from collections.abc import Mapping
from typing import Any

from mmoe_rec.task_kinds import KINDS

NO_VALUE = "-"
_DAY = 86_400_000_000
_DECIMALS = 4
_MOST_DECIMALS = 7  # what is smaller is written like 1.5e-08


def format_percent(share: float | None) -> str:
    """A share; 99.96% does not become 100%, nor 0.03% nothing."""
    if share is None:
        return NO_VALUE
    if 0 < share < 0.001:
        return "<0.1%"
    if 0.999 < share < 1:
        return ">99.9%"
    return f"{share:.0%}" if share in (0, 1) else f"{share:.1%}"


def format_fixed(value: float | None, digits: int = 3) -> str:
    """A number with a fixed number of digits after the point."""
    return NO_VALUE if value is None else f"{value:.{digits}f}"


def format_count(value: int | None) -> str:
    """A whole number, its thousands apart."""
    return NO_VALUE if value is None else f"{value:,}"


def format_rate(value: float | None, kind: str) -> str:
    """The mean label of a task of a kind."""
    return NO_VALUE if value is None else KINDS[kind].format_mean(value)


def describe_conflicting_times(requests: Mapping[str, Any] | None) -> str | None:
    """How many requests have several times, of a manifest's `requests`; None where none has."""
    if not requests or not requests["conflicting_times"]:
        return None
    longest = requests["longest_microseconds"]
    again = "; are ids used again?" if longest > _DAY else ""
    return (
        f"{requests['conflicting_times']:,} of {requests['count']:,} requests have rows of several times, up to "
        f"{format_duration(longest)} apart: all rows of a request take its first time{again}"
    )


def describe_pending_labels(task: str, labels: int, label_cutoff: str | None) -> str:
    """How many labels of a split do not count, as they had not matured."""
    noun, verb = ("label", "does") if labels == 1 else ("labels", "do")
    return f"{labels:,} {noun} of {task} had not matured by {format_minute(label_cutoff)} UTC and {verb} not count"


def format_duration(microseconds: int) -> str:
    """A time in a unit that makes it a small number."""
    for unit, size_of in (("days", 86_400e6), ("hours", 3_600e6), ("minutes", 60e6), ("seconds", 1e6)):
        if microseconds >= 2 * size_of:
            return f"{microseconds / size_of:.1f} {unit}"
    return f"{microseconds / 1e6:g} seconds"


def format_minute(time: str | None) -> str:
    """The day and minute of an ISO time."""
    return NO_VALUE if time is None else time[:16].replace("T", " ")


def format_signed(*values: float, sign: bool = True) -> list[str]:
    """Differences that stand together, such as one and the ends of its interval, with as many decimals.

    They have four decimals, or two digits where the largest is small; there are more where one that is not 0 would else
    look like it. From 1,000 on they are whole.
    """
    sizes = [abs(each) for each in values if each]
    if not sizes:
        return ["0"] * len(values)
    largest, smallest = max(sizes), min(sizes)
    decimals = _DECIMALS if largest >= 0.00095 else 1 - _exponent(largest)
    decimals = max(decimals, -_exponent(smallest) if smallest >= largest / 1000 else 0)
    form = f"+.{decimals}f" if decimals <= _MOST_DECIMALS else "+#.2g"
    form = form if largest < 1000 else "+,.0f"
    shown = ["0" if each == 0 else format(each, form) for each in values]
    return shown if sign else [each.removeprefix("+") for each in shown]


def _exponent(size: float) -> int:
    """The exponent of ten in scientific notation with two digits."""
    return int(f"{size:.1e}".partition("e")[2]) if math.isfinite(size) else 0
