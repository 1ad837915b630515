"""An evaluation as a page of its own: the verdict first, then what it rests on; and its figures, as
`matplotlib.figure.Figure`: save with `figure.savefig`, or log to MLflow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from mmoe_rec.evaluation import metrics as every
from mmoe_rec.evaluation.comparison import BETTER, WORSE
from mmoe_rec.evaluation.intervals import Difference, Interval
from mmoe_rec.evaluation.metrics.metric import Named
from mmoe_rec.evaluation.results import Results
from mmoe_rec.evaluation.slices import ALL, SliceRecord, sort_worst_first
from mmoe_rec.evaluation.summary import CATALOGUE, SCORE, PlacementRecord, Summary
from mmoe_rec.report.findings import Finding, find_all
from mmoe_rec.report.formatting import NONE, signed
from mmoe_rec.report.pages import COLOURS, SERIES, blank, plain, render, svg
from mmoe_rec.report.sentences import describe_guard, describe_metrics, describe_notes, describe_verdict
from mmoe_rec.report.tables import rows_of_catalogue, rows_of_metrics

if TYPE_CHECKING:
    from mmoe_rec.evaluation.tradeoffs import WeightsRecord

_SHOWN_SLICES = 12
_NDCG = next(each for each in every.METRICS if each.name == "ndcg_at_10")
_INK, _MUTED, _LINE = COLOURS["ink"], COLOURS["muted"], SERIES[0]
_TITLE: dict[str, Any] = {"fontsize": 13, "fontweight": "bold", "color": _INK}
_LOG_SPAN = 20  # axes are logarithmic when the largest mean prediction is more than this many times the smallest


def page(results: Results) -> str:
    """The whole page."""
    summaries, comparison, findings = results.summaries, results.comparison, find_all(results)
    first, models = results.first, results.models
    against = {} if comparison is None else comparison.against
    slices = [_slice_row(each) for each in sort_worst_first(results.slices)]
    guards = [
        {"passed": guard.passed, "sentence": describe_guard(guard, other, results.rules), "other": other}
        for other, each in against.items()
        for guard in (() if each.verdict is None else each.verdict.guards)
    ]
    values = {
        "title": results.title,
        "models": {name: each.address for name, each in models.items()},
        "summary": first.summary,
        "verdicts": [describe_verdict(comparison, other, first.summary) for other in against] if comparison else [],
        "severity": _severity(results, findings),
        "judged": None if comparison is None else comparison.objective,
        "guards": guards,
        "alone": describe_metrics(first.summary),
        "redrawn": "rows" if results.each_row_is_a_user else "users",
        "findings": findings,
        "notes": describe_notes(list(summaries.values())),
        "groups": list(_groups(results)),
        "curves": list(_curves(summaries)),
        "gates": [{"model": name, "tasks": each.gates} for name, each in models.items() if each.gates],
        "tradeoffs": _tradeoffs(first.tradeoffs),
        "placement": list(_placement(first.placement, first.summary)),
        "slices": slices[:_SHOWN_SLICES],
        "more_slices": slices[_SHOWN_SLICES:],
        "few": len({(each.by, each.slice, each.group) for each in results.slices if each.value is None}),
        "facts": results.facts,
    }
    return render("evaluation.html.j2", values)


def _severity(results: Results, findings: Sequence[Finding]) -> str:
    """The class of the verdict's card."""
    against = [] if results.comparison is None else list(results.comparison.against.values())
    kinds = [each.verdict.kind for each in against if each.verdict is not None]
    if WORSE in kinds or any(each.severity == "problem" and each.model == results.name for each in findings):
        return "problem"
    return "warning" if findings or any(kind != BETTER for kind in kinds) else ""


def _groups(results: Results) -> Iterator[dict[str, Any]]:
    """Tables of metrics: one a task, of the score, and of the catalogue."""
    summaries = list(results.summaries.values())
    against = {} if results.comparison is None else results.comparison.against
    for group, first in summaries[0].groups.items():
        rows = [
            {
                "label": metric.label,
                "main": metric.is_shown(group == SCORE),
                "cells": [_cell(metric, each) for each in values],
                "apart": [
                    difference_cell(metric, each.groups.get(group, {}).get(metric.name)) for each in against.values()
                ],
            }
            for metric, values in rows_of_metrics(summaries, group).items()
        ]
        told = f"{first.counts['rows']:,} rows" if "rows" in first.counts else ""
        told += f", {first.counts['positives']:,} positive" if "positives" in first.counts else ""
        if rows:
            yield {"name": group, "told": told, "rows": rows, "others": list(against)}
    # What requests show together has no interval, and so no differences.
    shown = [
        {"label": each.label, "main": each.is_headline, "apart": [], "cells": [_cell(each, value) for value in values]}
        for each, values in rows_of_catalogue(summaries).items()
    ]
    if shown:
        yield {"name": CATALOGUE, "told": "", "rows": shown, "others": []}


def _cell(metric: Named, each: Interval) -> dict[str, str]:
    if each.value is None:
        return {"value": NONE, "interval": ""}
    ends = [metric.shown(end) for end in (each.low, each.high) if end is not None]
    return {"value": metric.shown(each.value), "interval": " to ".join(ends)}


def difference_cell(metric: Named, apart: Difference | None) -> dict[str, str]:
    """A difference of a metric for a table: `value`, `interval`, and the class of its `badge`, which colours it if it
    is significant after Holm's correction."""
    if apart is None or apart.value is None:
        return {"value": NONE, "interval": "", "badge": ""}
    value, *ends = signed(*(each for each in (apart.value, apart.low, apart.high) if each is not None))
    gain = (apart.value > 0) == (metric.better == "higher")
    badge = "" if not apart.is_significant or metric.better == "one" else "good" if gain else "problem"
    return {"value": value, "interval": " to ".join(ends), "badge": badge}


def _curves(summaries: Mapping[str, Summary]) -> Iterator[dict[str, str]]:
    for task in next(iter(summaries.values())).tasks:
        for name, summary in summaries.items():
            if task in summary.tasks and summary.tasks[task].details.get("calibration_bins"):
                label = f"predicted against observed probabilities of {task} by {name}"
                yield {"task": task, "model": name, "figure": svg(calibration_figure(summary, task), label)}


def _placement(records: Sequence[PlacementRecord], summary: Summary) -> Iterator[dict[str, Any]]:
    """Of each feature of placement, a table and a figure of what its values do to each task."""
    kinds = {name: task.kind for name, task in summary.tasks.items()}
    for feature in dict.fromkeys(each.feature for each in records):
        mine = [each for each in records if each.feature == feature]
        yield {
            "feature": feature,
            "tasks": {task: "odds" if kinds.get(task) == "binary" else "added" for task in mine[0].effects},
            "rows": mine,
            "figure": svg(placement_figure(mine, kinds), f"what values of {feature} do to each task"),
        }


def _tradeoffs(records: Sequence[WeightsRecord]) -> dict[str, Any] | None:
    """The front of weights, in the order of the first task's, with the model's own; and a figure of two tasks."""
    if not records:
        return None
    rows = []
    for each in sorted(records, key=lambda each: -next(iter(each.weights.values()))):
        said = ["this model"] * (each is records[0]) + ["(dominated)"] * (each.dominated_by is not None)
        if said != ["(dominated)"]:
            weights = " : ".join(f"{weight:.2g}" for weight in each.weights.values())
            values = [_cell(_NDCG, value) for value in each.values.values()]
            rows.append({"weights": weights, "values": values, "said": " ".join(said)})
    tasks, figure = list(records[0].values), ""
    if len(tasks) == 2 and all(value.value is not None for each in records for value in each.values.values()):
        figure = svg(tradeoff_figure(records), f"NDCG@10 of {tasks[0]} and {tasks[1]} by weights in the score")
    return {"tasks": tasks, "rows": rows, "tried": len(records), "figure": figure}


def _slice_row(each: SliceRecord) -> dict[str, Any]:
    """A slice, with what it is compared with."""
    better = not each.is_worse and each.is_significant and each.apart != 0
    apart, *ends = signed(*(end for end in (each.apart, each.low, each.high) if end is not None)) or [NONE]
    return {
        "slice": f"{each.by}: {each.slice}",
        "group": each.group,
        "metric": each.metric,
        "rows": each.rows,
        "value": f"{each.value:.4f}",
        "beside": ALL if each.beside == ALL else f"'{each.beside}' there",
        "apart": apart,
        "interval": " to ".join(ends),
        "badge": "problem" if each.is_worse else "good" if better else "",
    }


def calibration_figure(summary: Summary, task: str) -> Figure:
    """Observed rate against mean prediction in equal-mass bins, and below it their ratio, with 95% intervals.

    task: a binary one with observed labels.
    """
    group = summary.tasks[task]
    names = ("mean_predicted", "observed_rate", "low", "high")
    bins = np.array([[row[name] for name in names] for row in group.details["calibration_bins"]], dtype=np.float64)
    predicted = bins[:, 0]
    figure = blank(5.6, 6.6)
    axes, ratios = map(plain, figure.subplots(2, 1, sharex=True, height_ratios=[3, 1]))
    is_log = bool(predicted.min() > 0 and predicted.max() > _LOG_SPAN * predicted.min())
    shown = (bins[:, 1] > 0) | (not is_log)
    with np.errstate(divide="ignore", invalid="ignore"):  # a prediction of 0 has no ratio
        relative = bins / predicted[:, None]
    for each, values, label in ((axes, bins[shown], "equal-mass bins, 95% interval"), (ratios, relative, None)):
        _, middle, low, high = values.T
        reach = np.nan_to_num(np.maximum([middle - low, high - middle], 0.0))
        style: dict[str, Any] = {"color": _LINE, "marker": "o", "markersize": 5, "linewidth": 1.4, "capsize": 2.5}
        each.errorbar(predicted[shown] if each is axes else predicted, middle, reach, **style, label=label, zorder=3)
    dashed: dict[str, Any] = {"color": _MUTED, "linewidth": 1, "linestyle": (0, (4, 3)), "zorder": 1}
    ends = predicted[[0, -1]]
    axes.plot(ends, ends, **dashed, label="perfect")
    if not shown.all():
        floor = np.full(int((~shown).sum()), min(predicted.min(), bins[shown, 1].min(initial=1.0)))
        hollow: dict[str, Any] = {"markerfacecolor": "white", "color": _LINE, "linestyle": "none"}
        axes.plot(predicted[~shown], floor, "o", **hollow, clip_on=False, label="no positive row")
    if is_log:
        axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if is_log else MaxNLocator(6))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("observed rate")
    axes.legend(loc="upper left", frameon=False, fontsize=9, labelcolor=_INK)
    ratios.axhline(1, **dashed)
    ratios.set(ylabel="observed /\npredicted", xlabel="mean predicted probability")
    figure.suptitle(f"{task}: predicted against observed", x=0.03, ha="left", **_TITLE)
    told, ratio = [f"{group.counts['rows']:,} rows, {group.counts['positives']:,} positive"], group.get("calibration")
    if ratio.value is not None:
        interval = f" [{ratio.low:.3f}, {ratio.high:.3f}]" if ratio.low is not None else ""
        told.append(f"predicted / observed {ratio.value:.3f}{interval}")
    told.append(f"expected calibration error {group.details['ece']:.2g}")
    axes.set_title("\n".join(told), loc="left", fontsize=9, color=_MUTED, pad=8)
    return figure


def gate_weights_figure(mean_gate_weights: Mapping[str, np.ndarray]) -> Figure:
    """How much each task draws on each expert, as a heat map with a number in every cell.

    mean_gate_weights: task -> (E,) mean gate weight of each expert, in [0, 1]; one or more tasks. NaN marks an expert
    that the task's gate does not see, drawn as an empty cell.
    """
    weights = np.array(list(mean_gate_weights.values()), dtype=np.float64)
    tasks, experts = weights.shape
    figure = blank(2.6 + 0.72 * experts, 1.7 + 0.55 * tasks)
    axes, top = figure.subplots(), float(np.nanmax(weights)) or 1.0
    image = axes.imshow(np.ma.masked_invalid(weights), cmap="Blues", vmin=0, vmax=top, aspect="auto")
    for task, expert in np.argwhere(np.isfinite(weights)):
        value = weights[task, expert]
        color = "white" if value > 0.6 * top else _INK
        axes.text(expert, task, f"{value:.2f}", ha="center", va="center", fontsize=9, color=color)
    axes.set_xticks(range(experts))
    axes.set_yticks(range(tasks), list(mean_gate_weights))
    axes.set_xlabel("expert", color=_INK)
    axes.tick_params(length=0, labelsize=9, labelcolor=_INK)
    axes.set_facecolor(COLOURS["soft"])
    axes.set_frame_on(False)
    axes.set_title("Mean gate weight", loc="left", **_TITLE, pad=10)
    figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05).outline.set_visible(False)
    return figure


def placement_figure(records: Sequence[PlacementRecord], kinds: Mapping[str, str]) -> Figure:
    """What the values of a feature of placement do to each task, a panel a task: odds beside those of the mean row on a
    logarithmic axis, or what is added to a regression.

    Args:
        records: of one feature.
        kinds: of the tasks.
    """
    tasks, places = list(records[0].effects), np.arange(len(records))
    figure = blank(max(4.0, 1.6 + 0.42 * len(records)), 0.9 + 1.7 * len(tasks))
    panels = np.atleast_1d(figure.subplots(len(tasks), 1, sharex=True))
    for axes, task, color in zip(map(plain, panels), tasks, SERIES * len(tasks), strict=False):
        is_odds = kinds.get(task) == "binary"
        base = 1.0 if is_odds else 0.0
        heights = np.array([each.effects[task] for each in records])
        axes.vlines(places, base, heights, color=color, linewidth=2)
        axes.plot(places, heights, "o", color=color, markersize=5)
        axes.axhline(base, color=_MUTED, linewidth=1, zorder=1)
        if is_odds:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
            spans_decades = heights.max() > 5 * heights.min()
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)) if spans_decades else MaxNLocator(5))
        axes.set_ylabel(f"{task}\n{'odds' if is_odds else 'added'}")
    names = [each.value for each in records]
    slanted = max(map(len, names)) > 3
    panels[-1].set_xticks(places, names, rotation=45 if slanted else 0, ha="right" if slanted else "center")
    return figure


def tradeoff_figure(records: Sequence[WeightsRecord]) -> Figure:
    """How well two tasks are served by rankings of different weights: the front as a line, what is dominated pale.

    records: of two tasks, with values; the first is the model's own ranking.
    """
    tasks = list(records[0].values)
    points = np.array([[each.values[task].value for task in tasks] for each in records], dtype=np.float64)
    front = np.array([each.dominated_by is None for each in records])
    order = np.argsort(points[front, 0])
    figure = blank(5.6, 4.2)
    axes = plain(figure.subplots())
    axes.plot(*points[front][order].T, color=_LINE, marker="o", markersize=4, linewidth=1.4, label="front", zorder=2)
    axes.plot(*points[~front].T, color=_MUTED, marker="o", markersize=3, linestyle="none", label="dominated", zorder=1)
    ring: dict[str, Any] = {"markersize": 11, "markerfacecolor": "none", "markeredgewidth": 1.8, "linestyle": "none"}
    axes.plot(*points[:1].T, color=SERIES[1], marker="o", **ring, label="this model", zorder=3)
    axes.set(xlabel=f"NDCG@10 of {tasks[0]}", ylabel=f"NDCG@10 of {tasks[1]}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.legend(frameon=False, fontsize=9, labelcolor=_INK)
    return figure
