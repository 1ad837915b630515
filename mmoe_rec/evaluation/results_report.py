"""Report of an evaluation with figures, and its numbers as files."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.figure import Figure as Drawing

from mmoe_rec.atomic import atomic_file, write_text
from mmoe_rec.evaluation import metrics as every
from mmoe_rec.evaluation.comparison import Comparison, Outcome, Results
from mmoe_rec.evaluation.intervals import ALPHA, Difference, Interval
from mmoe_rec.evaluation.messages import (
    describe_cautions,
    describe_excluded_tasks,
    describe_metrics,
    describe_slices,
    explain_group,
    explain_summary,
    find_suspicious_results,
)
from mmoe_rec.evaluation.metrics.metric import BaseMetric
from mmoe_rec.evaluation.slices import ALL_ROWS, SliceRecord, sort_worst_first
from mmoe_rec.evaluation.summary import CATALOG, SCORE, Summary, collect_metrics
from mmoe_rec.features.layout import Layout
from mmoe_rec.report.charts import COLORS, SERIES_COLORS, new_figure, style_axes, to_svg
from mmoe_rec.report.formatting import NO_VALUE, format_count, format_fixed, format_signed
from mmoe_rec.report.parts import Cell, Figure, Mark, Report, Row, Sentence, Table
from mmoe_rec.report.report_files import write_report
from mmoe_rec.tracking.runs import Run

_INK, _MUTED, _LINE = COLORS["ink"], COLORS["muted"], SERIES_COLORS[0]
_TITLE: dict[str, Any] = {"fontsize": 13, "fontweight": "bold", "color": _INK}
_SLICES = 12  # slices that are visible without unfolding the table
_MEASURES = {
    "Verdict": "A model is better if the interval of `evaluation.primary_metric` lies above that of the other model, "
    "no task lost more than `evaluation.max_metric_drop`, no slice of `evaluation.guardrail_slices` lost significantly "
    "more, and probabilities are not off by more than `evaluation.max_calibration_ratio`.",
    "Many differences": "Of twenty differences by chance alone, one is outside of its interval. So p-values are "
    "corrected by Holm's method: the probability of any false positive among the colored differences is below 5%.",
    "Metrics": "AUC and average precision are exact; GAUC is the mean AUC within users, or requests. `calibration` is "
    "the sum of the predictions over the sum of the labels, `ece` the mean distance of observed rates from predictions "
    "in ten bins of equal mass, `normalized_entropy` the logloss over the entropy of the base rate. NDCG, MRR, MAP, "
    "recall and hit rate are means over requests whose rows differ in relevance.",
    "Slices": "The AUC of a slice may be low because its rows are alike, not because the model is worse there. Compare "
    "models by the difference on the same slice. A range (1, 2] holds values above 1 and up to 2.",
}


def write_results(results: Results, out: Path) -> None:
    """Write the files of an evaluation, and replace the files of an earlier one.

        OUT/metrics.json                metrics of the first model. `against` has the metrics of other models, and
                                        `comparison` has differences and verdicts.
        OUT/slices.parquet              slices, if there are any
        OUT/report.json, report.html    report

    Args:
        results: Results of the evaluation.
        out: Folder for the files.

    Raises:
        UserError: The models were not measured on the same rows. Nothing is written then.
    """
    report = make_report(results)
    trees = {name: summary_to_dict(summary) for name, summary in results.summaries.items()}
    tree = trees.pop(results.name) | {"facts": results.facts, "against": trees}
    tree |= {} if results.comparison is None else {"comparison": comparison_to_dict(results.comparison)}
    write_text(out / "metrics.json", json.dumps(tree, indent=1))
    (out / "slices.parquet").unlink(missing_ok=True)
    if results.slices:
        with atomic_file(out / "slices.parquet") as file:
            pq.write_table(pa.Table.from_pylist([asdict(record) for record in results.slices]), file)
    write_report(report, out)


def make_report(results: Results) -> Report:
    """Build the report of an evaluation: verdicts, calibration curves, metrics, differences and slices."""
    comparison, findings, first = results.comparison, find_suspicious_results(results), results.first
    sentences = [] if findings else [Sentence("nothing suspicious found", "good")]
    for finding in findings:
        where = f"'{finding.model}': " if len(results.models) > 1 else ""
        sentences.append(Sentence(where + finding.message, finding.severity, finding.check))
    sentences += [Sentence(sentence) for sentence in describe_slices(results.slices)]
    headline, guardrails = "; ".join(describe_metrics(first.summary)), list[Sentence]()
    if comparison is not None:
        headline, *others = [verdict.message for verdict in comparison.verdicts.values()]
        sentences = [*map(Sentence, others), *sentences]
        for other, verdict in comparison.verdicts.items():
            for guard in verdict.guardrails:
                mark: Mark = "good" if guard.passed else "problem"
                label = "pass" if guard.passed else "fail"
                guardrails.append(Sentence(f"beside '{other}': {guard.message}", mark, label, page_only=True))
        sentences += [Sentence(sentence) for sentence in describe_excluded_tasks(comparison)]
    sentences += [Sentence(caution, "note") for caution in describe_cautions(results)]
    tables = [metrics_table(results.summaries)]
    tables += [] if comparison is None else [differences_table(comparison, first.summary)]
    slices = [_slice_cells(record) for record in sort_worst_first(results.slices)]
    heads = ("slice", "of", "metric", "minus", "rows", "value", "difference")
    if slices:
        tables.append(Table("Slices", heads, slices[:_SLICES], text_columns=4, folded=slices[_SLICES:], page_only=True))
    units = "rows" if results.one_row_per_user else "users"
    intervals = (
        f"95%, from a bootstrap over {units}. Fractions, such as AUC, use Jeffreys' intervals. Other metrics use "
        "percentiles, or Student's if few users decide. Differences use Student's, with the same resamples for models."
    )
    return Report(
        title=results.title,
        headline=headline,
        mark=_mark(results, "problem" in {finding.severity for finding in findings if finding.model == results.name}),
        about=_about(results),
        figures=list(_curves(results.summaries)),
        tables=tables,
        sentences=[*sentences, *guardrails],
        facts=results.facts,
        measures={"Intervals": intervals} | _MEASURES,
        identity={"model": results.facts["artifact"]} if "artifact" in results.facts else {},
    )


def _about(results: Results) -> str:
    models = " against ".join(model.address or name for name, model in results.models.items())
    summary = results.first.summary
    users = "" if results.one_row_per_user else f", {summary.requests:,} requests, {summary.users:,} users"
    return f"{models}: {summary.rows:,} rows{users}"


def _mark(results: Results, has_problem: bool) -> Any:
    kinds = [] if results.comparison is None else [verdict.kind for verdict in results.comparison.verdicts.values()]
    if Outcome.WORSE in kinds or has_problem:
        return "problem"
    return "warning" if find_suspicious_results(results) or any(kind != Outcome.BETTER for kind in kinds) else "good"


def metrics_table(summaries: Mapping[str, Summary]) -> Table:
    """Build the table of metrics, with a row for each metric and a column for each model.

    Metrics for which `Metric.is_shown` is false are in the table's `folded` rows, such as the NDCG of tasks. A value is
    followed by half the width of its interval. The best value of a row is bold.
    """
    main, more, models = list[Row](), list[Row](), list(summaries.values())
    for group in (*{name: None for summary in models for name in summary.tasks}, SCORE):
        rows = collect_metrics(models, group).items()
        counts = next(row.groups[group].counts for row in models if group in row.groups)
        _extend(main, _heading(group, counts), (row for row in rows if row[0].is_shown(group == SCORE)))
        _extend(more, group, (row for row in rows if not row[0].is_shown(group == SCORE)))
    shown = [metric for metric in every.CATALOG_METRICS if metric.is_headline]
    catalogs = [row.catalog or {} for row in models]
    if any(catalogs):
        values = [(metric, [Interval(catalog.get(metric.name)) for catalog in catalogs]) for metric in shown]
        _extend(main, CATALOG, values)
    units = "rows" if all(row.one_row_per_user for row in models) else "users"
    return Table("Metrics", ("", *summaries), main, f"± half the 95% interval, bootstrap over {units}", folded=more)


def _heading(group: str, counts: Mapping[str, int]) -> str:
    if "rows" not in counts:
        return group
    positive = f", {counts['positives']:,} positive" if "positives" in counts else ""
    return f"{group}: {counts['rows']:,} rows{positive}"


def _extend(rows: list[Row], heading: str, metrics: Iterable[tuple[BaseMetric, Sequence[Interval]]]) -> None:
    """Append a heading and a row for each metric to `rows`. Append nothing if there are no metrics."""
    metric_rows: list[Row] = [(metric.label, *_cells(metric, values)) for metric, values in metrics]
    rows += [(heading,), *metric_rows] if metric_rows else []


def _cells(metric: BaseMetric, intervals: Sequence[Interval]) -> Iterator[Cell]:
    losses = [float("inf") if interval.value is None else metric.loss(interval.value) for interval in intervals]
    best = min(losses) if len(intervals) > 1 else None
    for interval, loss in zip(intervals, losses, strict=True):
        if interval.value is None:
            yield Cell(NO_VALUE)
            continue
        low, high = interval.low, interval.high
        half = "" if low is None or high is None else f"±{metric.format((high - low) / 2)}"
        yield Cell(metric.format(interval.value), half, "best" if loss == best else "")


def differences_table(compared: Comparison, summary: Summary) -> Table:
    """Build the table of differences, with a row for each metric in main tables and a column for each reference model.

    A significant difference is green if the model is better, and red if it is worse. For a metric that should be 1, the
    cell also says whether the model is closer to 1 or further.

    Args:
        compared: The comparison.
        summary: Metrics of the compared model.
    """
    rows, others = list[Row](), [difference.groups for difference in compared.differences.values()]
    for group in dict.fromkeys(name for groups in others for name in groups):
        metric_rows = list[Row]()
        for metric in every.METRICS:
            differences = [groups.get(group, {}).get(metric.name) for groups in others]
            is_undefined = all(difference is None or difference.value is None for difference in differences)
            if any(differences) and metric.is_shown(group == SCORE) and not (metric.is_within_group and is_undefined):
                value = summary.groups[group].get(metric.name).value
                cells = [_difference_cell(difference, metric, value) for difference in differences]
                metric_rows.append((metric.label, *cells))
        rows += [(group,), *metric_rows] if metric_rows else []
    note = f"± half the 95% interval; colored: significant (p <  {ALPHA:g}, corrected)"
    return Table(f"Differences: {compared.model} minus", ("", *compared.differences), rows, note)


def _difference_cell(difference: Difference | None, metric: BaseMetric, value: float | None) -> Cell:
    if difference is None or difference.value is None or value is None:
        return Cell(NO_VALUE)
    is_gain = metric.loss(value) < metric.loss(value - difference.value)
    widths = [] if difference.high is None else [difference.high - difference.value]
    text, *half = format_signed(difference.value, *widths)
    if metric.better == "one" and difference.is_significant:
        text += " closer" if is_gain else " further"
    small = "".join(f"±{width.removeprefix('+')}" for width in half)
    return Cell(text, small, ("good" if is_gain else "problem") if difference.is_significant else "")


def _slice_cells(record: SliceRecord) -> Row:
    known = [end for end in (record.difference, record.low, record.high) if end is not None]
    value, *ends = format_signed(*known) or [NO_VALUE]
    mark = "problem" if record.is_worse else "good" if record.is_significant and record.difference else ""
    compared_to = record.compared_to if record.compared_to == ALL_ROWS else f"'{record.compared_to}' there"
    name = f"{record.by}: {record.slice}"
    difference = Cell(value, " to ".join(ends), mark)  # type: ignore[arg-type]
    rows, in_slice = format_count(record.rows), format_fixed(record.value, 4)
    return name, record.group, record.metric, compared_to, rows, in_slice, difference


def _curves(summaries: Mapping[str, Summary]) -> Iterator[Figure]:
    note = "observed rate against mean prediction in bins of equal mass; below, their ratio"
    for task in next(iter(summaries.values())).tasks:
        for name, summary in summaries.items():
            if task in summary.tasks and summary.tasks[task].details.get("calibration_bins"):
                label = f"predicted against observed probabilities of {task} by {name}"
                yield Figure(f"{task}, {name}", to_svg(calibration_figure(summary, task), label), note)


def summary_to_dict(summary: Summary) -> dict[str, Any]:
    """Return a summary in the format of `metrics.json`."""
    names = ("rows", "users", "requests", "resamples")
    tree: dict[str, Any] = {name: getattr(summary, name) for name in names} | {"tasks": {}}
    for name, group in summary.groups.items():
        kind = {} if name == SCORE else {"kind": group.kind}
        metrics = {metric: asdict(interval) for metric, interval in group.metrics.items()}
        part = kind | group.counts | metrics | _noted(explain_group(summary, name)) | group.details
        (tree if name == SCORE else tree["tasks"])[name] = part
    tree |= {} if summary.catalog is None else {"catalog": summary.catalog}
    return tree | _noted(explain_summary(summary)) | summary.facts


def _noted(note: str | None) -> dict[str, str]:
    return {} if note is None else {"note": note}


def comparison_to_dict(compared: Comparison) -> dict[str, Any]:
    """Return differences and verdicts in the format of `comparison` in `metrics.json`."""
    objective, differences = compared.objective, dict[str, Any]()
    for other, verdict in compared.verdicts.items():
        differences[other] = asdict(compared.differences[other]) | {"verdict": asdict(verdict)}
    return {
        "model": compared.model,
        "eligible_tasks": compared.eligible_tasks,
        "excluded_tasks": compared.excluded_tasks,
        "objective": None if objective is None else asdict(objective) | {"name": objective.name},
        "against": differences,
    }


def calibration_figure(summary: Summary, task: str) -> Drawing:
    """Plot observed rates against mean predictions in equal-mass bins, and their ratio below, with 95% intervals.

    Args:
        summary: Summary of the model.
        task: Binary task with observed labels.
    """
    names = ("mean_predicted", "observed_rate", "low", "high")
    bins = [[row[name] for name in names] for row in summary.tasks[task].details["calibration_bins"]]
    observed = np.array(bins, dtype=np.float64)
    predicted = observed[:, 0]
    relative = observed / np.where(predicted > 0, predicted, np.nan)[:, None]  # a prediction of 0 has no ratio
    figure = new_figure(5.6, 6.6)
    axes, ratios = map(style_axes, figure.subplots(2, 1, sharex=True, height_ratios=[3, 1]))
    style: dict[str, Any] = {"color": _LINE, "marker": "o", "markersize": 5, "linewidth": 1.4, "capsize": 2.5}
    for panel, values in ((axes, observed), (ratios, relative)):
        _, middle, low, high = values.T
        reach = np.nan_to_num(np.maximum([middle - low, high - middle], 0.0))
        panel.errorbar(predicted, middle, reach, **style, label="equal-mass bins, 95% interval", zorder=3)
    dashed: dict[str, Any] = {"color": _MUTED, "linewidth": 1, "linestyle": (0, (4, 3)), "zorder": 1}
    axes.plot(predicted[[0, -1]], predicted[[0, -1]], **dashed, label="perfect")
    ratios.axhline(1, **dashed)
    axes.set_ylabel("observed rate")
    axes.legend(loc="upper left", frameon=False, fontsize=9, labelcolor=_INK)
    ratios.set(ylabel="observed /\npredicted", xlabel="mean predicted probability")
    figure.suptitle(f"{task}: predicted against observed", x=0.03, ha="left", **_TITLE)
    return figure


def gate_weights_figure(mean_gate_weights: Mapping[str, np.ndarray]) -> Drawing:
    """Plot the mean gate weight of each task for each expert as a heat map with numbers.

    Args:
        mean_gate_weights: Task -> mean gate weights of E experts, shape (E,), in [0, 1]. NaN marks an expert that the
            task's gate does not see, and leaves the cell empty.
    """
    weights = np.array(list(mean_gate_weights.values()), dtype=np.float64)
    tasks, experts = weights.shape
    figure = new_figure(2.6 + 0.72 * experts, 1.7 + 0.55 * tasks)
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
    axes.set_frame_on(False)
    axes.set_title("Mean gate weight", loc="left", **_TITLE, pad=10)
    figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05).outline.set_visible(False)
    return figure


def log_gate_weights(run: Run, layout: Layout, experts: Any, name: str) -> None:
    """Log the figure of mean gate weights to a run. Ranks other than 0 log nothing.

    Args:
        run: Run of the training.
        layout: Layout with T tasks.
        experts: Object whose attribute `weights` is a tensor (T, E), the mean gate weight of each task for E experts.
        name: Name of the figure among the run's artifacts.
    """
    if run.run_id is not None:
        weights = {task.name: experts.weights[index].numpy() for index, task in enumerate(layout.tasks)}
        run.log_figure(gate_weights_figure(weights), name)
