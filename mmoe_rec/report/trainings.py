"""Several trainings of one setting: what they are worth on average, and how far they are apart, as a page, a table and
sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from mmoe_rec.evaluation import metrics as every
from mmoe_rec.evaluation.metrics.metric import Named
from mmoe_rec.evaluation.summary import SCORE
from mmoe_rec.evaluation.trainings import SettingsDifference, TrainingsMean
from mmoe_rec.report.evaluation import difference_cell
from mmoe_rec.report.formatting import NONE, difference, signed
from mmoe_rec.report.pages import COLOURS, SERIES, blank, plain, render, svg
from mmoe_rec.report.sentences import once_corrected

Means = Mapping[str, Mapping[str, TrainingsMean]]
"""Task or `score` -> metric"""


@dataclass(frozen=True)
class TrainingsReport:
    """What several trainings of a setting are worth.

    title: of the page; seeds: of the trainings; rows: that were measured; units: what was redrawn for the intervals,
    `users` or `rows`; summary: of `average_trainings`; against: name of each other setting -> differences, of
    `compare_trainings`; warnings: what is suspicious; facts: name -> text.
    """

    title: str
    seeds: tuple[int, ...]
    rows: int
    units: str
    summary: Means
    against: Mapping[str, SettingsDifference] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def sentences(self) -> list[str]:
        """Beside which settings these are better, and what one training is worth."""
        return [*describe_differences(self.against), *describe_uncertainty(self.summary, self.units)]


def terminal_parts(report: TrainingsReport) -> Iterator[Table | str]:
    """A table, sentences and warnings, for the terminal."""
    yield trainings_table(report)
    yield from report.sentences
    yield from (f"warning: {each}" for each in report.warnings)


def page(trainings: TrainingsReport) -> str:
    """The whole page."""
    groups = [_group(name, trainings) for name in trainings.summary]
    groups = [each for each in groups if each["rows"]]
    units = trainings.units
    values = {
        "title": trainings.title,
        "seeds": list(trainings.seeds),
        "units": units,
        "others": list(trainings.against),
        "measured": trainings.rows,
        "means": [f"{each['name']}: {each['headline']}" for each in groups],
        "sentences": trainings.sentences,
        "warnings": trainings.warnings,
        "groups": groups,
        "facts": trainings.facts,
    }
    return render("trainings.html.j2", values)


def _group(group: str, trainings: TrainingsReport) -> dict[str, Any]:
    shown, headline, figure = _shown_metrics(group, trainings.summary[group]), "", ""
    rows = []
    for metric, each in shown:
        others = [other.groups.get(group, {}).get(metric.name) for other in trainings.against.values()]
        apart = [difference_cell(metric, other) for other in others]
        rows.append({"label": metric.label, "cells": list(_cells(metric, each)), "apart": apart})
    if shown:
        metric, each = shown[0]
        mean, ends, *_ = _cells(metric, each)
        headline = f"{metric.name} {mean} on average" + ("" if ends == NONE else f" ({ends})")
        figure = svg(trainings_figure(metric.name, trainings.seeds, each), f"{metric.name} of {group} by training")
    return {"name": group, "rows": rows, "headline": headline, "figure": figure}


def _shown_metrics(group: str, metrics: Mapping[str, TrainingsMean]) -> list[tuple[Named, TrainingsMean]]:
    """Those of a group that tables show and that have a mean, in their order."""
    return [
        (metric, metrics[metric.name])
        for metric in every.METRICS
        if metric.is_shown(group == SCORE) and metric.name in metrics and metrics[metric.name].mean is not None
    ]


def _cells(metric: Named, each: TrainingsMean, nothing: str = NONE) -> Iterator[str]:
    """Mean, interval, spread between trainings, error by users, and the trainings' values; nothing: stands for a number
    that does not exist."""

    def shown(value: float | None) -> str:
        return nothing if value is None else metric.shown(value)

    yield shown(each.mean)
    yield nothing if each.low is None else f"{shown(each.low)} to {shown(each.high)}"
    yield shown(each.between_trainings)
    yield shown(each.between_users)
    yield from map(shown, each.values)


def trainings_figure(label: str, seeds: Sequence[int], each: TrainingsMean) -> Figure:
    """A metric of each training as a point, beside their mean as a line with its interval."""
    figure = blank(max(3.6, 1.8 + 0.32 * len(seeds)), 2.6)
    axes = plain(figure.subplots())
    places = np.arange(len(seeds))
    if each.low is not None and each.high is not None:
        axes.axhspan(each.low, each.high, color=COLOURS["soft"], zorder=0)
    axes.axhline(each.mean or 0.0, color=COLOURS["muted"], linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.plot(places, np.array(each.values, np.float64), "o", color=SERIES[0], markersize=6)
    axes.set_xticks(places, [str(seed) for seed in seeds])
    axes.set_xlabel("seed")
    axes.set_ylabel(label)
    return figure


def trainings_table(trainings: TrainingsReport) -> Table:
    """The means on the terminal."""
    table = Table(title=f"{len(trainings.seeds)} trainings, {trainings.rows:,} test rows", title_justify="left")
    table.add_column("", no_wrap=True)
    for name in ("mean", "95% interval", "between\ntrainings", f"between\n{trainings.units}"):
        table.add_column(name, justify="right", no_wrap=True)
    for group, metrics in trainings.summary.items():
        if shown := _shown_metrics(group, metrics):
            table.add_row(Text(group, style="bold"))
        for metric, each in shown:
            cells = islice(_cells(metric, each, "-"), len(table.columns) - 1)
            table.add_row(f"  {metric.label}", *cells, end_section=metric is shown[-1][0])
    units = f"between {trainings.units}: the standard error of the mean"
    table.caption = f"between trainings: their standard deviation; {units}"
    return table


def describe_uncertainty(summary: Means, units: str = "users") -> Iterator[str]:
    """Of each task, which is the larger uncertainty of one training. units: what was redrawn."""
    for group, metrics in summary.items():
        metric = "auc" if "auc" in metrics else "r2"
        each = metrics.get(metric)
        if each is None or each.between_users is None or each.between_trainings is None:
            continue
        seeds, users = each.between_trainings, each.between_users
        which = f"another seed changes it more than other {units}" if seeds > users else f"other {units} change it more"
        yield (
            f"{group}: the {metric} of one training has a standard deviation of {seeds:.2g} over seeds, and one of "
            f"{users:.2g} over the choice of {units}: {which}"
        )


def describe_differences(against: Mapping[str, SettingsDifference]) -> Iterator[str]:
    """Beside each other setting, whether this one is better on average, by what decides."""
    for other, each in against.items():
        apart = each.objective
        if apart.value is None or apart.low is None:
            yield f"it can't be told how the trainings differ from those of '{other}': too few labels, or users"
        elif apart.is_significant:
            which = "better" if (apart.value > 0) == (each.better == "higher") else "worse"
            told = f"{each.name} differs by {difference(apart)}"
            yield f"on average these settings are {which} than '{other}': {told}"
        else:
            (detectable,) = signed(apart.detectable or 0.0, sign=False)
            yield (
                f"no difference from '{other}' is shown on average{once_corrected(apart)}: {each.name} differs by "
                f"{difference(apart)}; nine of ten such comparisons would show one of {detectable}"
            )
