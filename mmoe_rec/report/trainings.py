"""Several trainings of one setting, as a page, a table and sentences: their mean, and how far they are apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rich.table import Table
from rich.text import Text

from mmoe_rec.evaluation import metrics as every
from mmoe_rec.evaluation.intervals import Interval
from mmoe_rec.evaluation.metrics.metric import Named
from mmoe_rec.evaluation.summary import SCORE
from mmoe_rec.evaluation.trainings import SettingsDifference, TrainingsMean
from mmoe_rec.report.formatting import NONE, difference, interval, signed
from mmoe_rec.report.pages import render
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
        """Which settings these are better than, and what one training is worth."""
        return [*describe_differences(self.against), *describe_uncertainty(self.summary, self.units)]

    @property
    def means(self) -> list[str]:
        """The mean of each group's first metric, which the page shows in a table."""
        firsts = ((group, *shown[0]) for group, each in self.summary.items() if (shown := _shown_metrics(group, each)))
        return [
            f"{group}: {metric.name} {interval(Interval(each.mean, each.low, each.high))} on average of "
            f"{len(self.seeds)} trainings"
            for group, metric, each in firsts
        ]


def terminal_parts(report: TrainingsReport) -> Iterator[Table | str]:
    """A table, sentences and warnings, for the terminal."""
    table = Table(title=f"{len(report.seeds)} trainings, {report.rows:,} test rows", title_justify="left")
    table.add_column("", no_wrap=True)
    for name in ("mean", "95% interval", "between\ntrainings", f"between\n{report.units}"):
        table.add_column(name, justify="right", no_wrap=True)
    for group, metrics in report.summary.items():
        if shown := _shown_metrics(group, metrics):
            table.add_row(Text(group, style="bold"))
        for metric, each in shown:
            cells = _cells(metric, each, "-")[: len(table.columns) - 1]
            table.add_row(f"  {metric.label}", *cells, end_section=metric is shown[-1][0])
    units = f"between {report.units}: the standard error of the mean"
    table.caption = f"between trainings: their standard deviation; {units}"
    yield table
    yield from report.sentences
    yield from (f"warning: {each}" for each in report.warnings)


def page(trainings: TrainingsReport) -> str:
    """The whole page."""
    groups = []
    for group, metrics in trainings.summary.items():
        others = [each.groups.get(group, {}) for each in trainings.against.values()]
        rows = [
            {"metric": metric, "value": each.mean, "cells": _cells(metric, each, NONE)}
            | {"apart": [its.get(metric.name) for its in others]}
            for metric, each in _shown_metrics(group, metrics)
        ]
        groups += [{"name": group, "rows": rows}] if rows else []
    return render("trainings.html.j2", {"title": trainings.title, "trainings": trainings, "groups": groups})


def _shown_metrics(group: str, metrics: Mapping[str, TrainingsMean]) -> list[tuple[Named, TrainingsMean]]:
    """Those of a group that tables show and that have a mean, in their order."""
    return [
        (metric, metrics[metric.name])
        for metric in every.METRICS
        if metric.is_shown(group == SCORE) and metric.name in metrics and metrics[metric.name].mean is not None
    ]


def _cells(metric: Named, each: TrainingsMean, nothing: str) -> list[str]:
    """Mean, interval, spread between trainings, error by users, and each value; nothing: stands for no number."""
    numbers = [each.mean, each.between_trainings, each.between_users, *each.values]
    mean, *others = (nothing if value is None else metric.shown(value) for value in numbers)
    ends = [metric.shown(end) for end in (each.low, each.high) if end is not None]
    return [mean, " to ".join(ends) or nothing, *others]


def describe_uncertainty(summary: Means, units: str = "users") -> Iterator[str]:
    """Which of the two uncertainties of a training is the larger one, for each task. units: what was redrawn."""
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
    """Whether these settings are better on average than each of the others, by what decides."""
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
