"""The figures of a data set's health, as SVG in the colours of its page."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator

from mmoe_rec.report.formatting import percent, rate
from mmoe_rec.report.style import COLOURS, plain, svg

_POINTS = 72  # in an inch
_WIDE, _HIGH, _LEFT, _RIGHT = 920.0, 262.0, 58.0, 12.0
_LINE, _BARS = (86.0, 175.0), (22.0, 46.0)  # bottom and height of the panels of rates and of rows
_SMALL = (330.0, 104.0)
_SHOWN_BINS = 24


@dataclass(frozen=True)
class _Point:
    """A task's labels in the part of a week that belongs to one split; place: the week's number from the left."""

    place: int
    split: str
    week: str
    labels: dict[str, Any]


def weeks_figure(weeks: list[dict[str, Any]], task: str) -> str:
    """Rate of a task's label by week, its observed rows below, the splits as bands."""
    points = [
        _Point(place, split, week["week"], each["tasks"][task])
        for place, week in enumerate(weeks)
        for split, each in week["splits"].items()
    ]
    drawn = Figure(figsize=(_WIDE / _POINTS, _HIGH / _POINTS))
    line, bars = (_panel(drawn, bottom, height) for bottom, height in (_LINE, _BARS))
    for axes in (line, bars):
        axes.set_xlim(-0.5, len(weeks) - 0.5)
    _bands(line, points)
    hints = {**_rates(line, points), **_rows(bars, points)}
    line.set_xticks([])
    every = range(0, len(weeks), max(1, math.ceil(len(weeks) / 12)))
    bars.set_xticks(every, [date.fromisoformat(weeks[place]["week"]).strftime("%-d %b %y") for place in every])
    return svg(drawn, f"rate of {task} by week", hints)


def shares_figure(bins: list[dict[str, Any]], label: str) -> str:
    """Shares of training (left) and test rows (right) in each bin."""
    drawn = Figure(figsize=(_SMALL[0] / _POINTS, _SMALL[1] / _POINTS))
    axes = drawn.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    shares = {split: np.array([each[split] for each in bins]) for split in ("train", "test")}
    most, places = max(*(each.max() for each in shares.values()), 1e-9), np.arange(len(bins))
    axes.set(xlim=(0, len(bins)), ylim=(0, 1.04 * most))
    columns = _boxes(places, 1.0, 0.0, np.full(len(bins), 1.04 * most))
    axes.add_collection(PolyCollection(columns, gid="hover", facecolors="none", edgecolors="#00000000", clip_on=False))
    for offset, (split, share) in zip((0.08, 0.5), shares.items(), strict=True):
        outline = Path.make_compound_path(*map(Path, _boxes(places + offset, 0.42, 0.0, share)))
        axes.add_patch(PathPatch(outline, facecolor=COLOURS[split], linewidth=0, clip_on=False))
    axes.axhline(0, color=COLOURS["line"], linewidth=1, clip_on=False)
    told = [f"{each['bin']}: {percent(each['train'])} in training, {percent(each['test'])} in test" for each in bins]
    return svg(drawn, label, {"hover": told})


def shown_bins(bins: list[dict[str, Any]], ordered: bool) -> list[dict[str, Any]]:
    """All bins that rise in value; for ids the first, the named ones at the end, and between them one for the rest."""
    if ordered or len(bins) <= _SHOWN_BINS:
        return bins
    ends = [each for each in bins if each["bin"] in ("unknown", "missing")]
    rest = [each for each in bins[_SHOWN_BINS - 3 :] if each not in ends]
    others = {split: sum(each[split] for each in rest) for split in ("train", "test")}
    return [*bins[: _SHOWN_BINS - 3], {"bin": "all others", **others}, *ends]


def _panel(drawn: Figure, bottom: float, height: float) -> Axes:
    width = _WIDE - _LEFT - _RIGHT
    axes = drawn.add_axes((_LEFT / _WIDE, bottom / _HIGH, width / _WIDE, height / _HIGH))
    plain(axes)
    axes.tick_params(labelsize=11, pad=6)
    axes.grid(visible=False, axis="x")
    axes.grid(axis="y", clip_on=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes


def _bands(axes: Axes, points: Sequence[_Point]) -> None:
    places: dict[str, list[int]] = {}
    for point in points:
        places.setdefault(point.split, []).append(point.place)
    splits = list(places)
    for number, split in enumerate(splits):
        # A week that two splits share is cut in half.
        earlier, later = (
            {place for each in part for place in places[each]} for part in (splits[:number], splits[number + 1 :])
        )
        left = min(places[split]) - 0.5 * (min(places[split]) not in earlier)
        right = max(places[split]) + 0.5 * (max(places[split]) not in later)
        axes.axvspan(left, right, color=COLOURS[split], alpha=0.08, linewidth=0, clip_on=False)
        step = (_WIDE - _LEFT - _RIGHT) / (points[-1].place + 1)
        if (right - left) * step > 7.5 * len(split) or len(places[split]) > 3:
            at: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "top"}
            axes.text((left + right) / 2, 0.97, split, **at, fontsize=11, fontweight="bold", color=COLOURS[split])


def _rates(axes: Axes, points: Sequence[_Point]) -> dict[str, list[str]]:
    """Draws a line with dots for each split; returns the hints of the dots."""
    known, kind, hints = [point for point in points if point.labels["rate"] is not None], points[0].labels["kind"], {}
    ticks = _ticks([point.labels["rate"] for point in known])
    axes.set_ylim(ticks[0], ticks[-1] + 0.14 * (ticks[-1] - ticks[0]))  # the names of the splits stand above
    axes.set_yticks(ticks, [f"{100 * tick:.3g}%" if kind == "binary" else f"{tick:.4g}" for tick in ticks])
    for split in dict.fromkeys(point.split for point in known):
        own = [point for point in known if point.split == split]
        x, y = [point.place for point in own], [point.labels["rate"] for point in own]
        axes.plot(x, y, color=COLOURS[split], linewidth=2, clip_on=False)
        face: dict[str, Any] = {"color": COLOURS[split], "edgecolor": COLOURS["card"], "linewidth": 1.5}
        axes.scatter(x, y, s=46, **face, zorder=3, clip_on=False, gid=f"dots-{split}")
        hints[f"dots-{split}"] = [
            f"week of {point.week}, {split}: {rate(point.labels['rate'], kind)} of {point.labels['observed']:,} rows"
            for point in own
        ]
    return hints


def _rows(axes: Axes, points: Sequence[_Point]) -> dict[str, list[str]]:
    """Draws observed rows, those of splits that share a week on each other; returns the hints of the bars."""
    below, hints = Counter[int](), {}
    for split in dict.fromkeys(point.split for point in points):
        own = [point for point in points if point.split == split]
        rows = np.array([point.labels["observed"] for point in own])
        under = np.array([below[point.place] for point in own])
        boxes = _boxes(np.array([point.place for point in own]) - 0.36, 0.72, under, rows)
        below.update({point.place: point.labels["observed"] for point in own})
        face: dict[str, Any] = {"facecolors": COLOURS[split], "alpha": 0.45, "linewidths": 0}
        axes.add_collection(PolyCollection(boxes, **face, clip_on=False, gid=f"bars-{split}"), autolim=False)
        hints[f"bars-{split}"] = [
            f"week of {point.week}, {split}: {point.labels['observed']:,} observed rows" for point in own
        ]
    most = max([*below.values(), 1])
    axes.set_ylim(0, most)
    axes.set_yticks([0, most], ["rows", f"{most:,}"])
    for label, side in zip(axes.get_yticklabels(), ("bottom", "top"), strict=True):
        label.set(verticalalignment=side)
    axes.grid(visible=False)
    return hints


def _boxes(left: np.ndarray, width: float, bottom: Any, height: np.ndarray) -> list[np.ndarray]:
    """(4, 2) corners of each of N boxes."""
    x = np.stack([left, left, left + width, left + width], axis=1)
    low = np.broadcast_to(bottom, height.shape)
    return list(np.stack([x, np.stack([low, low + height, low + height, low], axis=1)], axis=2))


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers around the values, at least a fifth of them apart in all: noise must not look like news."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    middle, span = (low + high) / 2, max(high - low, 0.2 * abs(low + high) / 2, 1e-9)
    least = max(middle - 0.6 * span, 0.0) if low >= 0 else middle - 0.6 * span
    found = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(least, middle + 0.6 * span)
    return [round(tick, 12) for tick in found]
