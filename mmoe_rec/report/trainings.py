"""Several trainings of one setting as a page of its own: what they are worth on average, and how far they are apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from matplotlib.figure import Figure

from mmoe_rec.evaluation import metrics as registered
from mmoe_rec.evaluation.metrics.metric import Named
from mmoe_rec.report.evaluation import apart_cell
from mmoe_rec.report.explanations import TRAININGS
from mmoe_rec.report.pages import render
from mmoe_rec.report.style import COLOURS, SERIES, blank, plain, svg

Summary = Mapping[str, Mapping[str, Mapping[str, Any]]]
SCORE = "score"


class Trainings(Protocol):
    """What was found of trainings. title: of the page; seeds: theirs; rows: that were measured; units: that were
    redrawn, `users` or `rows`; summary: of `over_trainings`; against: of `apart_over_trainings`; sentences: what comes
    first; warnings: what is suspicious; facts: name -> text."""

    @property
    def title(self) -> str: ...
    @property
    def seeds(self) -> tuple[int, ...]: ...
    @property
    def rows(self) -> int: ...
    @property
    def units(self) -> str: ...
    @property
    def summary(self) -> Summary: ...
    @property
    def against(self) -> Mapping[str, Mapping[str, Any]]: ...
    @property
    def sentences(self) -> Sequence[str]: ...
    @property
    def warnings(self) -> Sequence[str]: ...
    @property
    def facts(self) -> Mapping[str, str]: ...


def page(found: Trainings) -> str:
    """The whole page."""
    groups = [_group(name, found) for name in found.summary]
    groups = [each for each in groups if each["rows"]]
    values = {
        "title": found.title,
        "seeds": list(found.seeds),
        "units": found.units,
        "others": list(found.against),
        "measured": found.rows,
        "means": [f"{each['name']}: {each['headline']}" for each in groups if each["headline"]],
        "sentences": found.sentences,
        "warnings": found.warnings,
        "groups": groups,
        "facts": found.facts,
        "measures": {
            name.replace("UNITS", found.units): text.replace("UNITS", found.units) for name, text in TRAININGS.items()
        },
    }
    return render("trainings.html.j2", values)


def _group(group: str, trainings: Trainings) -> dict[str, Any]:
    found = shown_metrics(group, trainings.summary[group])
    rows = [
        {
            "label": metric.label,
            "cells": list(cells(metric, each)),
            "apart": [
                apart_cell(metric, other["groups"].get(group, {}).get(metric.name))
                for other in trainings.against.values()
            ],
        }
        for metric, each in found
    ]
    headline, figure = "", ""
    if found:
        metric, each = found[0]
        mean, interval, *_ = cells(metric, each)
        headline = f"{metric.name} {mean} on average" + ("" if interval == "–" else f" ({interval})")  # noqa: RUF001
        label = f"{metric.name} of {group} by training"
        figure = svg(trainings_figure(metric.name, trainings.seeds, each), label, {})
    return {"name": group, "rows": rows, "headline": headline, "figure": figure}


def shown_metrics(group: str, metrics: Mapping[str, Mapping[str, Any]]) -> list[tuple[Named, Mapping[str, Any]]]:
    """Those of a group that tables show and that have a mean, in their order."""
    return [
        (metric, metrics[metric.name])
        for metric in registered.METRICS
        if metric.is_shown(group == SCORE) and metrics.get(metric.name, {}).get("mean") is not None
    ]


def cells(metric: Named, each: Mapping[str, Any], nothing: str = "–") -> Iterator[str]:  # noqa: RUF001
    """Mean, interval, spread between trainings, error by users, and the trainings' values; nothing: stands for a number
    that does not exist."""

    def shown(value: float | None) -> str:
        return nothing if value is None else metric.shown(value)

    yield shown(each["mean"])
    yield nothing if each["low"] is None else f"{shown(each['low'])} to {shown(each['high'])}"
    yield shown(each["between_trainings"])
    yield shown(each["between_users"])
    yield from map(shown, each["values"])


def trainings_figure(label: str, seeds: Sequence[int], each: Mapping[str, Any]) -> Figure:
    """A metric of each training as a point, beside their mean as a line with its interval.

    each: of `over_trainings`.
    """
    figure = blank(max(3.6, 1.8 + 0.32 * len(seeds)), 2.6)
    axes = figure.subplots()
    plain(axes)
    places = np.arange(len(seeds))
    if each["low"] is not None:
        axes.axhspan(each["low"], each["high"], color=COLOURS["soft"], zorder=0)
    axes.axhline(each["mean"], color=COLOURS["muted"], linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.plot(places, each["values"], "o", color=SERIES[0], markersize=6)
    axes.set_xticks(places, [str(seed) for seed in seeds])
    axes.set_xlabel("seed")
    axes.set_ylabel(label)
    return figure
