"""An evaluation as a page of its own: the verdict first, then what it rests on; and its figures, as
`matplotlib.figure.Figure`: save with `figure.savefig`, or log to MLflow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

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

_SHOWN_SLICES = 12
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
    """A table of each feature of placement: what its values do to each task."""
    for feature in dict.fromkeys(each.feature for each in records):
        mine = [each for each in records if each.feature == feature]
        is_odds = {task: summary.tasks[task].kind == "binary" for task in mine[0].effects}
        tasks = {task: "odds" if is_odds[task] else "added" for task in is_odds}
        yield {"feature": feature, "tasks": tasks, "rows": mine}


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
    axes, top = figure.subplots(), float(np.nanmax(weights, initial=0.0)) or 1.0
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
