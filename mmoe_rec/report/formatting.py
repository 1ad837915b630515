"""Format numbers and facts for readers of a report."""

import math
from collections.abc import Mapping
from typing import Any

from mmoe_rec.task_kinds import KINDS

NO_VALUE = "-"
_DAY = 86_400_000_000
_DECIMALS = 4
# Numbers that need more decimals are written in scientific notation, such as 1.5e-08.
_MAX_DECIMALS = 7


def format_percent(fraction: float | None) -> str:
    """Format a fraction as a percentage, "<0.1%" just above 0, ">99.9%" just below 1. None gives `NO_VALUE`."""
    if fraction is None:
        return NO_VALUE
    if 0 < fraction < 0.001:
        return "<0.1%"
    if 0.999 < fraction < 1:
        return ">99.9%"
    return f"{fraction:.0%}" if fraction in (0, 1) else f"{fraction:.1%}"


def format_fixed(value: float | None, digits: int = 3) -> str:
    """Format a number with a fixed number of decimals, None as `NO_VALUE`.

    Args:
        value: The number.
        digits: Number of decimals.
    """
    return NO_VALUE if value is None else f"{value:.{digits}f}"


def format_count(value: int | None) -> str:
    """Format an integer with thousands separators, None as `NO_VALUE`."""
    return NO_VALUE if value is None else f"{value:,}"


def format_rate(value: float | None, kind: str) -> str:
    """Format the mean label of a task, None as `NO_VALUE`.

    Args:
        value: Mean label.
        kind: Kind of the task, "binary" or "regression".
    """
    return NO_VALUE if value is None else KINDS[kind].format_mean(value)


def describe_conflicting_times(requests: Mapping[str, Any] | None) -> str | None:
    """Describe how many requests have several times, None if none has. `requests` is from the features' manifest."""
    if not requests or not requests["conflicting_times"]:
        return None
    longest = requests["longest_microseconds"]
    reused = ". Are request IDs reused?" if longest > _DAY else ""
    return (
        f"{requests['conflicting_times']:,} of {requests['count']:,} requests have rows with several times, up to "
        f"{format_duration(longest)} apart. All rows of a request take its first time{reused}"
    )


def describe_pending_labels(task: str, labels: int, label_cutoff: str | None) -> str:
    """Describe how many labels of a split don't count because they were not final.

    Args:
        task: Name of the task.
        labels: Number of labels that don't count.
        label_cutoff: Time at which labels had to be final, in ISO 8601 (UTC).
    """
    noun, was, verb = ("label", "was", "does") if labels == 1 else ("labels", "were", "do")
    return f"{labels:,} {noun} of {task} {was} not final by {format_minute(label_cutoff)} UTC and {verb} not count"


def format_duration(microseconds: int) -> str:
    """Format a duration in days, hours, minutes or seconds: the largest unit that gives at least 2."""
    for unit, unit_microseconds in (("days", 86_400e6), ("hours", 3_600e6), ("minutes", 60e6), ("seconds", 1e6)):
        if microseconds >= 2 * unit_microseconds:
            return f"{microseconds / unit_microseconds:.1f} {unit}"
    return f"{microseconds / 1e6:g} seconds"


def format_minute(time: str | None) -> str:
    """Format an ISO time to the minute, None as `NO_VALUE`."""
    return NO_VALUE if time is None else time[:16].replace("T", " ")


def format_signed(*values: float, sign: bool = True) -> list[str]:
    """Format related numbers, such as a difference and the ends of its interval, with equally many decimals.

    Numbers get four decimals, or more if all are small (two significant digits) or if a number would otherwise look
    like 0. If the largest number is at least 1,000, all are rounded to integers.

    Args:
        values: The numbers.
        sign: Whether positive numbers get a plus sign.
    """
    sizes = [abs(value) for value in values if value]
    if not sizes:
        return ["0"] * len(values)
    largest, smallest = max(sizes), min(sizes)
    decimals = _DECIMALS if largest >= 0.00095 else 1 - _exponent(largest)
    decimals = max(decimals, -_exponent(smallest) if smallest >= largest / 1000 else 0)
    spec = f"+.{decimals}f" if decimals <= _MAX_DECIMALS else "+#.2g"
    spec = spec if largest < 1000 else "+,.0f"
    texts = ["0" if value == 0 else format(value, spec) for value in values]
    return texts if sign else [text.removeprefix("+") for text in texts]


def _exponent(size: float) -> int:
    """Return the exponent of ten of `size` in scientific notation, after rounding to two digits."""
    return int(f"{size:.1e}".partition("e")[2]) if math.isfinite(size) else 0
