"""Charts as inline SVG, in colours of the page's style sheet."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from typing import Any

from mmoe_rec.inspection.formatting import percent, rate
from mmoe_rec.inspection.markup import Markup, joined, tag

_WIDTH, _LEFT, _RIGHT = 920.0, 58.0, 12.0
_TOP, _LINE, _GAP, _BARS, _BOTTOM = 26.0, 150.0, 16.0, 46.0, 22.0
_BASE = _TOP + _LINE + _GAP + _BARS


@dataclass(frozen=True)
class _Point:
    """A task's labels in the part of a week that belongs to one split; place: the week's number from the left."""

    place: int
    split: str
    week: str
    labels: dict[str, Any]


def weeks_chart(weeks: list[dict[str, Any]], task: str) -> Markup:
    """Rate of a task's label by week, its observed rows below, the splits as bands."""
    points = [
        _Point(place, split, week["week"], each["tasks"][task])
        for place, week in enumerate(weeks)
        for split, each in week["splits"].items()
    ]
    step = (_WIDTH - _LEFT - _RIGHT) / max(len(weeks), 1)
    parts = [_bands(points, step), *_lines(points, step), *_bars(points, step)]
    every = max(1, math.ceil(len(weeks) / 12))
    for place in range(0, len(weeks), every):
        text = date.fromisoformat(weeks[place]["week"]).strftime("%-d %b %y")
        parts.append(tag("text", text, x=_n(_middle(place, step)), y=_n(_BASE + 15), class_="tick middle"))
    box = f"0 0 {_n(_WIDTH)} {_n(_BASE + _BOTTOM)}"
    return tag("svg", *parts, viewBox=box, role="img", aria_label=f"rate of {task} by week", class_="chart wide")


def _middle(place: int, step: float) -> float:
    return _LEFT + (place + 0.5) * step


def _lines(points: list[_Point], step: float) -> Iterator[Markup]:
    known = [point for point in points if point.labels["rate"] is not None]
    ticks = _ticks([point.labels["rate"] for point in known])

    def y(value: float) -> str:
        return _n(_TOP + _LINE * (1 - (value - ticks[0]) / (ticks[-1] - ticks[0])))

    kind = points[0].labels["kind"]
    for tick in ticks:
        text = f"{tick:.4g}" if kind != "binary" else f"{100 * tick:.3g}%"
        yield tag("line", x1=_n(_LEFT), x2=_n(_WIDTH - _RIGHT), y1=y(tick), y2=y(tick), class_="grid")
        yield tag("text", text, x=_n(_LEFT - 8), y=y(tick), dy="4", class_="tick end")
    for split in dict.fromkeys(point.split for point in known):
        own = [(_n(_middle(point.place, step)), point) for point in known if point.split == split]
        yield tag(
            "polyline", points=" ".join(f"{x},{y(each.labels['rate'])}" for x, each in own), class_=f"line {split}"
        )
        for x, each in own:
            told = f"{rate(each.labels['rate'], kind)} of {each.labels['observed']:,} rows"
            hint = tag("title", f"week of {each.week}, {split}: {told}")
            yield tag("circle", hint, cx=x, cy=y(each.labels["rate"]), r="3.4", class_=f"dot {split}")


def _bars(points: list[_Point], step: float) -> Iterator[Markup]:
    """Observed rows; those of splits that share a week stand on each other."""
    totals: Counter[int] = Counter()
    for point in points:
        totals[point.place] += point.labels["observed"]
    most, below = max([*totals.values(), 1]), Counter[int]()
    for point in points:
        observed = point.labels["observed"]
        below[point.place] += observed
        top, height = _BASE - _BARS * below[point.place] / most, _BARS * observed / most
        hint = tag("title", f"week of {point.week}, {point.split}: {observed:,} observed rows")
        x = _n(_middle(point.place, step) - step * 0.36)
        yield tag("rect", hint, x=x, y=_n(top), width=_n(step * 0.72), height=_n(height), class_=f"bar {point.split}")
    yield tag("text", "rows", x=_n(_LEFT - 8), y=_n(_BASE - 2), class_="tick end")
    yield tag("text", f"{most:,}", x=_n(_LEFT - 8), y=_n(_BASE - _BARS + 9), class_="tick end")


def _bands(points: list[_Point], step: float) -> Markup:
    parts = []
    for split in dict.fromkeys(point.split for point in points):
        places = [point.place for point in points if point.split == split]
        # A week that two splits share is cut in half.
        shared = {point.place for point in points if point.split != split}
        left = _LEFT + (min(places) + 0.5 * (min(places) in shared)) * step
        right = _LEFT + (max(places) + 1 - 0.5 * (max(places) in shared)) * step
        parts.append(
            tag("rect", x=_n(left), y="0", width=_n(right - left), height=_n(_TOP + _LINE + 6), class_=f"band {split}")
        )
        if right - left > 7.5 * len(split) or len(places) > 3:
            parts.append(tag("text", split, x=_n((left + right) / 2), y="15", class_=f"name middle {split}"))
    return joined(*parts)


def _ticks(values: list[float]) -> list[float]:
    """Round numbers around the values, at least a fifth of them apart in all: noise is not to look like news."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    middle, span = (low + high) / 2, max(high - low, 0.2 * abs(low + high) / 2, 1e-9)
    low, high = middle - 0.6 * span, middle + 0.6 * span
    if values and min(values) >= 0:
        low = max(low, 0.0)
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(each * power for each in (1, 2, 2.5, 5, 10) if each * power >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(place * step, 12) for place in range(first, last + 1)]


_SHOWN_BINS = 24


def shares_chart(bins: list[dict[str, Any]], ordered: bool) -> Markup:
    """Shares of training (left) and test rows (right) in each bin; `ordered` bins rise in value."""
    shown = bins if ordered or len(bins) <= _SHOWN_BINS else _fewer(bins)
    width, height, foot = 330.0, 104.0, 18.0
    step = width / len(shown)
    most = max([each[split] for each in shown for split in ("train", "test")] + [1e-9])
    parts = [tag("line", x1="0", x2=_n(width), y1=_n(height), y2=_n(height), class_="grid")]
    for place, each in enumerate(shown):
        group = [tag("title", f"{each['bin']}: {percent(each['train'])} in training, {percent(each['test'])} in test")]
        group.append(tag("rect", x=_n(place * step), y="0", width=_n(step), height=_n(height), class_="hover"))
        for offset, split in ((0.08, "train"), (0.5, "test")):
            tall = (height - 4) * each[split] / most
            at = {"x": _n((place + offset) * step), "y": _n(height - tall), "width": _n(0.42 * step)}
            group.append(tag("rect", **at, height=_n(tall), class_=f"bar {split}"))
        parts.append(tag("g", *group))
    named = [each["bin"] for each in shown if each["bin"] in ("all others", "unknown", "missing")]
    first, last = shown[0]["bin"], ", ".join(named) or shown[-1]["bin"]
    if ordered and len(shown) > 2:
        first, last = "low values", "high values, then missing" if last == "missing" else "high values"
    parts.append(tag("text", _short(first), x="0", y=_n(height + 13), class_="tick"))
    if len(shown) > 1:
        parts.append(tag("text", _short(last), x=_n(width), y=_n(height + 13), class_="tick end"))
    return tag("svg", *parts, viewBox=f"0 0 {_n(width)} {_n(height + foot)}", role="img", class_="chart")


def _fewer(bins: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first bins, the named ones at the end, and between them one that holds the rest."""
    ends = [each for each in bins if each["bin"] in ("unknown", "missing")]
    rest = [each for each in bins[_SHOWN_BINS - 3 :] if each not in ends]
    others = {split: sum(each[split] for each in rest) for split in ("train", "test")}
    return [*bins[: _SHOWN_BINS - 3], {"bin": "all others", **others}, *ends]


def _short(text: str) -> str:
    return text if len(text) <= 30 else text[:29] + "…"


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
