"""Figures of an evaluation: calibration curves, and how much each task draws on each expert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from mmoe_rec.evaluation.summary import Summary
from mmoe_rec.report.charts import COLORS, SERIES, blank, plain

if TYPE_CHECKING:
    from mmoe_rec.features.layout import Layout
    from mmoe_rec.model.utilisation import Utilisation
    from mmoe_rec.tracking.runs import Run

_INK, _MUTED, _LINE = COLORS["ink"], COLORS["muted"], SERIES[0]
_TITLE: dict[str, Any] = {"fontsize": 13, "fontweight": "bold", "color": _INK}
_LOG_SPAN = 20  # Axes are logarithmic if the largest mean prediction is more than this many times the smallest.


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
    relative = bins / np.where(predicted > 0, predicted, np.nan)[:, None]  # a prediction of 0 has no ratio
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
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        # So few that their labels do not overlap.
        subs = (1, 2, 5) if high < 100 * low else (1, 3) if high < 10_000 * low else (1,)
        axis.set_major_locator(LogLocator(subs=subs) if is_log else MaxNLocator(6))
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
    axes.set_facecolor(COLORS["soft"])
    axes.set_frame_on(False)
    axes.set_title("Mean gate weight", loc="left", **_TITLE, pad=10)
    figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05).outline.set_visible(False)
    return figure


def log_gates(run: Run, layout: Layout, experts: Utilisation, name: str) -> None:
    """Log the figure of the mean gate weights to a run. Ranks other than the first log nothing."""
    if run.run_id is not None:
        weights = {task.name: experts.weights[index].numpy() for index, task in enumerate(layout.tasks)}
        run.log_figure(gate_weights_figure(weights), name)
