"""Figures of an evaluation, as `matplotlib.figure.Figure`: save with `figure.savefig`, or log to MLflow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from mmoe_rec.evaluation.results import PlacementRecord
from mmoe_rec.evaluation.summary import GroupSummary, Summary
from mmoe_rec.report.style import COLOURS, SERIES, blank, plain

if TYPE_CHECKING:
    from mmoe_rec.evaluation.tradeoffs import WeightsRecord

_INK, _MUTED, _LINE = COLOURS["ink"], COLOURS["muted"], SERIES[0]
_DECADES_WITH_STEPS = 3  # over more, labels at 2 and 5 would overlap
_LOG_SPAN = 20  # axes are logarithmic when the largest mean prediction is more than this many times the smallest


def calibration_figure(summary: Summary, task: str) -> Figure:
    """Observed rate against mean prediction in equal-mass bins, and below it their ratio, with 95% intervals.

    task: a binary one with observed labels.

    Raises:
        ValueError: the task is not in the summary, is not binary, or has no observed label.
    """
    if task not in summary.tasks:
        raise ValueError(f"there is no task {task!r} to draw; expected one of {sorted(summary.tasks)}")
    group = summary.tasks[task]
    bins = group.details.get("calibration_bins")
    if not bins:
        raise ValueError(f"task {task!r} has no calibration; expected a binary task with observed labels")
    predicted, observed, low, high = _bin_arrays(bins)

    figure = blank(5.6, 6.6)
    axes, ratio_axes = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    plain(axes)
    plain(ratio_axes)
    _draw_reliability(axes, predicted, observed, low, high)
    with np.errstate(divide="ignore", invalid="ignore"):  # a prediction of 0 has no ratio
        _draw_points(ratio_axes, predicted, observed / predicted, low / predicted, high / predicted)
    ratio_axes.axhline(1, color=_MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    ratio_axes.set_ylabel("observed /\npredicted")
    ratio_axes.set_xlabel("mean predicted probability")
    figure.suptitle(
        f"{task}: predicted against observed", x=0.03, ha="left", fontsize=13, fontweight="bold", color=_INK
    )
    axes.set_title(_calibration_caption(group), loc="left", fontsize=9, color=_MUTED, pad=8)
    return figure


def gate_weights_figure(mean_gate_weights: Mapping[str, np.ndarray]) -> Figure:
    """How much each task draws on each expert, as a heat map with a number in every cell.

    Args:
        mean_gate_weights: task -> (E,) mean gate weight of each expert, in [0, 1]. Tasks may differ in E (task-specific
            experts come last); NaN marks an expert the task's gate does not see, drawn as an empty cell.

    Raises:
        ValueError: there is no task.
    """
    if not mean_gate_weights:
        raise ValueError("there are no gate weights to draw; expected at least one task")
    rows = [np.asarray(weights, dtype=np.float64) for weights in mean_gate_weights.values()]
    weights = np.full((len(rows), max(len(row) for row in rows)), np.nan)
    for index, row in enumerate(rows):
        weights[index, : len(row)] = row

    tasks, experts = weights.shape
    figure = blank(2.6 + 0.72 * experts, 1.7 + 0.55 * tasks)
    axes = figure.subplots()
    top = float(np.nanmax(weights)) if np.isfinite(weights).any() else 1.0
    image = axes.imshow(np.ma.masked_invalid(weights), cmap="Blues", vmin=0, vmax=top or 1.0, aspect="auto")
    for task, expert in np.argwhere(np.isfinite(weights)):
        value = weights[task, expert]
        color = "white" if value > 0.6 * top else _INK
        axes.text(expert, task, f"{value:.2f}", ha="center", va="center", fontsize=9, color=color)
    _style_cells(axes, list(mean_gate_weights), experts)
    axes.set_title("Mean gate weight", loc="left", fontsize=13, fontweight="bold", color=_INK, pad=10)
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8, colors=_MUTED)
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
    for axes, task, color in zip(panels, tasks, SERIES * len(tasks), strict=False):
        plain(axes)
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
    axes = figure.subplots()
    plain(axes)
    axes.plot(*points[front][order].T, color=_LINE, marker="o", markersize=4, linewidth=1.4, label="front", zorder=2)
    axes.plot(*points[~front].T, color=_MUTED, marker="o", markersize=3, linestyle="none", label="dominated", zorder=1)
    ring: dict[str, Any] = {"markersize": 11, "markerfacecolor": "none", "markeredgewidth": 1.8, "linestyle": "none"}
    axes.plot(*points[:1].T, color=SERIES[1], marker="o", **ring, label="this model", zorder=3)
    axes.set_xlabel(f"NDCG@10 of {tasks[0]}")
    axes.set_ylabel(f"NDCG@10 of {tasks[1]}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.legend(frameon=False, fontsize=9, labelcolor=_INK)
    return figure


def _bin_arrays(bins: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean prediction, observed rate, and the ends of its interval (NaN where there is none), (bins,) each."""
    names = ("mean_predicted", "observed_rate", "low", "high")
    columns = np.array([[row[name] for name in names] for row in bins], dtype=np.float64).T
    return columns[0], columns[1], columns[2], columns[3]


def _draw_reliability(
    axes: Axes, predicted: np.ndarray, observed: np.ndarray, low: np.ndarray, high: np.ndarray
) -> None:
    is_log = bool(predicted.min() > 0 and predicted.max() > _LOG_SPAN * predicted.min())
    x_limits = _limits(predicted, is_log)
    y_limits = _limits(np.concatenate([predicted, observed, low, high]), is_log)
    for axis, limits, name in ((axes.xaxis, x_limits, "x"), (axes.yaxis, y_limits, "y")):
        axes.set(**{f"{name}scale": "log" if is_log else "linear", f"{name}lim": limits})
        decades = np.log10(limits[1] / limits[0]) if is_log else 0.0
        subs = (1, 2, 5) if decades < _DECADES_WITH_STEPS else (1,)
        axis.set_major_locator(LogLocator(subs=subs) if is_log else MaxNLocator(6))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.plot(x_limits, x_limits, color=_MUTED, linewidth=1, linestyle=(0, (4, 3)), label="perfect", zorder=1)
    shown = (observed > 0) | (not is_log)
    _draw_points(
        axes, predicted[shown], observed[shown], low[shown], high[shown], label="equal-mass bins, 95% interval"
    )
    if not shown.all():
        floor = np.full(int((~shown).sum()), y_limits[0])
        hollow: dict[str, Any] = {
            "marker": "o",
            "markersize": 5,
            "markerfacecolor": "white",
            "color": _LINE,
            "linestyle": "none",
        }
        axes.plot(predicted[~shown], floor, **hollow, clip_on=False, label="no positive row")
    axes.set_ylabel("observed rate")
    axes.legend(loc="upper left", frameon=False, fontsize=9, labelcolor=_INK)


def _limits(values: np.ndarray, is_log: bool) -> tuple[float, float]:
    """Ends of an axis that shows all values; on a logarithmic one, all positive values."""
    finite = values[np.isfinite(values) & ((values > 0) | (not is_log))]
    smallest, largest = float(finite.min()), float(finite.max())
    if is_log:
        return smallest / 1.3, largest * 1.3
    margin = 0.06 * (largest - smallest) or 0.05
    return smallest - margin, largest + margin


def _draw_points(
    axes: Axes, x: np.ndarray, y: np.ndarray, low: np.ndarray, high: np.ndarray, *, label: str | None = None
) -> None:
    reach = np.nan_to_num(np.maximum([y - low, high - y], 0.0))
    style: dict[str, Any] = {
        "color": _LINE,
        "marker": "o",
        "markersize": 5,
        "linewidth": 1.4,
        "elinewidth": 1.2,
        "capsize": 2.5,
    }
    axes.errorbar(x, y, yerr=reach, **style, label=label, zorder=3)


def _calibration_caption(group: GroupSummary) -> str:
    parts = [f"{group.counts['rows']:,} rows, {group.counts['positives']:,} positive"]
    ratio = group.get("calibration")
    if ratio.value is not None:
        ends = f" [{ratio.low:.3f}, {ratio.high:.3f}]" if ratio.low is not None else ""
        parts.append(f"predicted / observed {ratio.value:.3f}{ends}")
    parts.append(f"expected calibration error {group.details['ece']:.2g}")
    return "\n".join(parts)


def _style_cells(axes: Axes, tasks: list[str], experts: int) -> None:
    axes.set_xticks(range(experts), [str(expert) for expert in range(experts)])
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_xlabel("expert", color=_INK)
    axes.set_xticks(np.arange(experts + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(tasks) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="both", length=0, labelsize=9, labelcolor=_INK)
    axes.set_facecolor(COLOURS["soft"])
    for spine in axes.spines.values():
        spine.set_visible(False)
