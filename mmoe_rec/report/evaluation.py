"""An evaluation as a page of its own, the verdict first, then what it rests on; as files; and its figures, as
`matplotlib.figure.Figure`: save with `figure.savefig`, or log to MLflow."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from mmoe_rec.atomic import atomic_file, write_text
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.comparison import BETTER, WORSE, Comparison, Results
from mmoe_rec.evaluation.slices import sort_worst_first
from mmoe_rec.evaluation.summary import CATALOGUE, SCORE, Summary, rows_of_catalogue, rows_of_metrics
from mmoe_rec.report.findings import Finding, find_all
from mmoe_rec.report.pages import COLOURS, SERIES, blank, plain, render, svg
from mmoe_rec.report.sentences import (
    describe_guard,
    describe_metrics,
    describe_notes,
    describe_verdict,
    describe_verdicts,
    note_of,
    note_of_group,
)

_DIFFERENCE = ("value", "low", "high", "error", "p", "p_corrected", "detectable")
_INK, _MUTED, _LINE = COLOURS["ink"], COLOURS["muted"], SERIES[0]
_TITLE: dict[str, Any] = {"fontsize": 13, "fontweight": "bold", "color": _INK}
_LOG_SPAN = 20  # axes are logarithmic when the largest mean prediction is more than this many times the smallest


def write_results(results: Results, out: Path) -> None:
    """Writes the files of an evaluation, replacing those of one before; the page last.

    OUT/metrics.json, metrics.parquet   of the model in question, with the verdicts as `sentences`, and the facts
    OUT/slices.parquet                  where there are slices
    OUT/against/1/metrics.json, ...     of each model that it is compared with
    OUT/comparison.json                 differences and verdicts, where there are others
    OUT/report.html                     the page

    Raises UserError, before anything is written, where the rows are not the same, or other files are in the way.
    """
    text, comparison, against = page(results), results.comparison, out / "against"
    sentences = describe_verdicts(results)
    for finding in find_all(results):
        of = f"'{finding.model}': " if len(results.models) > 1 else ""
        sentences.append(f"{of}{finding.message}")
    for each in against.iterdir() if against.is_dir() else ():
        if not (each.name.isdigit() and {path.name for path in each.iterdir()} <= {"sums", "metrics.json"}):
            raise UserError(f"'{each}' lies where results go, and belongs to no evaluation: give another --out")
    (out / "report.html").unlink(missing_ok=True)  # it would tell of other numbers than lie beside it
    shutil.rmtree(against, ignore_errors=True)
    for name in ("comparison.json", "slices.parquet", *(f"calibration_{task}.png" for task in results.tasks)):
        (out / name).unlink(missing_ok=True)
    for place, model in enumerate(results.models.values()):
        tree, folder = summary_tree(model.summary), against / str(place) if place else out
        tree |= {} if place else {"sentences": sentences, "facts": results.facts}
        write_text(folder / "metrics.json", json.dumps(tree, indent=1))
    if comparison is not None:
        write_text(out / "comparison.json", json.dumps(comparison_tree(comparison, results.first.summary), indent=1))
    tables = {"metrics": metrics_table(results)}
    tables |= {"slices": pa.Table.from_pylist([asdict(each) for each in results.slices])} if results.slices else {}
    for name, table in tables.items():
        with atomic_file(out / f"{name}.parquet") as file:
            pq.write_table(table, file)
    write_text(out / "report.html", text)


def page(results: Results) -> str:
    """The whole page."""
    summaries, comparison, findings = results.summaries, results.comparison, find_all(results)
    first, others = results.first.summary, [] if comparison is None else list(comparison.against)
    values = {
        "title": results.title,
        "results": results,
        "verdicts": {} if comparison is None else {each: describe_verdict(comparison, each, first) for each in others},
        "describe_guard": describe_guard,
        "severity": _severity(results, findings),
        "alone": describe_metrics(first),
        "redrawn": "rows" if results.each_row_is_a_user else "users",
        "findings": findings,
        "notes": describe_notes(list(summaries.values())),
        "groups": list(_groups(results)),
        "curves": list(_curves(summaries)),
        "slices": sort_worst_first(results.slices),
        "few": len({(each.by, each.slice, each.group) for each in results.slices if each.value is None}),
    }
    return render("evaluation.html.j2", values)


def _severity(results: Results, findings: Sequence[Finding]) -> str:
    """The class of the verdict's card."""
    kinds = [] if results.comparison is None else [each.kind for each in results.comparison.verdicts.values()]
    if WORSE in kinds or any(each.severity == "problem" and each.model == results.name for each in findings):
        return "problem"
    return "warning" if findings or any(kind != BETTER for kind in kinds) else ""


def _groups(results: Results) -> Iterator[dict[str, Any]]:
    """Tables of metrics: one a task, of the score, and of the catalogue; others: models that differences are from."""
    summaries = list(results.summaries.values())
    others = {} if results.comparison is None else results.comparison.against
    for name, first in summaries[0].groups.items():
        measured = rows_of_metrics(summaries, name).items()
        rows = [{"metric": each, "main": each.is_shown(name == SCORE), "intervals": its} for each, its in measured]
        if rows:
            yield {"name": name, "counts": first.counts, "rows": rows, "others": others}
    # What requests show together has no interval, and so no differences.
    shown = rows_of_catalogue(summaries).items()
    rows = [{"metric": each, "main": each.is_headline, "intervals": intervals} for each, intervals in shown]
    if rows:
        yield {"name": CATALOGUE, "counts": {}, "rows": rows, "others": {}}


def _curves(summaries: Mapping[str, Summary]) -> Iterator[dict[str, str]]:
    for task in next(iter(summaries.values())).tasks:
        for name, summary in summaries.items():
            if task in summary.tasks and summary.tasks[task].details.get("calibration_bins"):
                label = f"predicted against observed probabilities of {task} by {name}"
                yield {"task": task, "model": name, "figure": svg(calibration_figure(summary, task), label)}


def summary_tree(summary: Summary) -> dict[str, Any]:
    """`metrics.json`."""
    names = ("rows", "users", "requests", "resamples")
    tree: dict[str, Any] = {name: getattr(summary, name) for name in names} | {"tasks": {}}
    for name, group in summary.groups.items():
        kind = {} if name == SCORE else {"kind": group.kind}
        metrics = {metric: asdict(each) for metric, each in group.metrics.items()}
        part = kind | group.counts | metrics | _noted(note_of_group(summary, name)) | group.details
        (tree if name == SCORE else tree["tasks"])[name] = part
    tree |= {} if summary.catalogue is None else {"catalogue": summary.catalogue}
    return tree | _noted(note_of(summary)) | summary.facts


def _noted(note: str | None) -> dict[str, str]:
    return {} if note is None else {"note": note}


def comparison_tree(compared: Comparison, summary: Summary) -> dict[str, Any]:
    """`comparison.json`. summary: of the model."""
    objective, against = compared.objective, dict[str, Any]()
    for other, verdict in compared.verdicts.items():
        guards = [
            {"task": each.task, "metric": each.metric, "passed": each.passed}
            | {"sentence": describe_guard(each, other, compared.rules)}
            for each in verdict.guards
        ]
        told = {"kind": verdict.kind, "sentence": describe_verdict(compared, other, summary), "guards": guards}
        against[other] = asdict(compared.against[other]) | {"verdict": told | {"detectable": verdict.detectable}}
    names = ("model", "units", "effective_users", "judged", "left_out")
    return {name: getattr(compared, name) for name in names} | {
        "resamples": compared.rules.resamples,
        "objective": None if objective is None else asdict(objective) | {"name": objective.name},
        "against": against,
    }


def metrics_table(results: Results) -> pa.Table:
    """`metrics.parquet`: a row for each model, task (`score`, `catalogue`) and metric, with its interval; and for each
    difference from another model, whose name stands in `less`."""
    rows: list[dict[str, Any]] = []
    for name, summary in results.summaries.items():
        tree = summary_tree(summary)
        for group, metrics in {**tree["tasks"], SCORE: tree[SCORE], "catalogue": tree.get("catalogue", {})}.items():
            for metric, value in metrics.items():
                ends = value if isinstance(value, dict) and "low" in value else {"value": value}
                if isinstance(ends["value"], (int, float)) or ends is value:
                    rows.append({"model": name, "less": None, "group": group, "metric": metric, **ends})
    comparison = results.comparison
    for other, versus in ({} if comparison is None else comparison.against).items():
        for group, differences in {"objective": {"objective": versus.objective}, **versus.groups}.items():
            for metric, apart in differences.items():
                keys = {"model": results.name, "less": other, "group": group, "metric": metric}
                rows.append(keys | {end: getattr(apart, end) for end in _DIFFERENCE})
    kinds = [(name, pa.string()) for name in ("model", "less", "group", "metric")]
    return pa.Table.from_pylist(rows, pa.schema([*kinds, *((name, pa.float64()) for name in _DIFFERENCE)]))


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
    axes.set_facecolor(COLOURS["soft"])
    axes.set_frame_on(False)
    axes.set_title("Mean gate weight", loc="left", **_TITLE, pad=10)
    figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05).outline.set_visible(False)
    return figure
