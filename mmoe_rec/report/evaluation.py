"""An evaluation as a page of its own: the verdict first, then what it rests on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmoe_rec.evaluation import metrics as every
from mmoe_rec.evaluation.comparison import BETTER, WORSE, Comparison
from mmoe_rec.evaluation.intervals import UNDEFINED, Difference, Interval
from mmoe_rec.evaluation.metrics.metric import Named
from mmoe_rec.evaluation.results import PlacementRecord, Results
from mmoe_rec.evaluation.slices import ALL, SliceRecord, sort_worst_first
from mmoe_rec.evaluation.summary import CATALOGUE, SCORE, Summary
from mmoe_rec.report.evaluation_figures import calibration_figure, placement_figure, tradeoff_figure
from mmoe_rec.report.explanations import EVALUATION, EVALUATION_OF_ROWS
from mmoe_rec.report.findings import Finding, find_all
from mmoe_rec.report.formatting import NONE, signed
from mmoe_rec.report.pages import render
from mmoe_rec.report.sentences import describe_guard, describe_metrics, describe_notes, describe_verdict
from mmoe_rec.report.style import svg

if TYPE_CHECKING:
    from mmoe_rec.evaluation.tradeoffs import WeightsRecord

_SHOWN_SLICES = 12
_NDCG = next(each for each in every.METRICS if each.name == "ndcg_at_10")


def page(results: Results) -> str:
    """The whole page."""
    summaries, comparison, findings = results.summaries, results.comparison, find_all(results)
    first, models = results.first, results.models
    against = {} if comparison is None else comparison.against
    slices = [_slice_row(each) for each in sort_worst_first(results.slices)]
    values = {
        "title": results.title,
        "models": {name: each.address for name, each in models.items()},
        "summary": first.summary,
        "verdicts": [describe_verdict(comparison, other, first.summary) for other in against] if comparison else [],
        "severity": _severity(results, findings),
        "judged": None if comparison is None else comparison.objective,
        "guards": [] if comparison is None else list(_guards(comparison)),
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
        "measures": EVALUATION_OF_ROWS if results.each_row_is_a_user else EVALUATION,
    }
    return render("evaluation.html.j2", values)


def _guards(comparison: Comparison) -> Iterator[dict[str, Any]]:
    for other, each in comparison.against.items():
        for guard in () if each.verdict is None else each.verdict.guards:
            sentence = describe_guard(guard, other, comparison.rule)
            yield {"passed": guard.passed, "sentence": sentence, "other": other}


def _severity(results: Results, findings: Sequence[Finding]) -> str:
    """The class of the verdict's card."""
    against = [] if results.comparison is None else list(results.comparison.against.values())
    kinds = [each.verdict.kind for each in against if each.verdict is not None]
    own = next((each.model for each in findings), "") if results.comparison is None else results.name
    if any(each.severity == "problem" and each.model == own for each in findings) or WORSE in kinds:
        return "problem"
    return "warning" if findings or any(kind != BETTER for kind in kinds) else ""


def _groups(results: Results) -> Iterator[dict[str, Any]]:
    """Tables of metrics: one a task, of the score, and of the catalogue."""
    summaries, against = (
        list(results.summaries.values()),
        {} if results.comparison is None else results.comparison.against,
    )
    for group, first in summaries[0].groups.items():
        rows = []
        for metric in every.METRICS:
            if first.kind not in metric.kinds or (results.each_row_is_a_user and metric.ranks_within):
                continue
            groups = [each.groups.get(group) for each in summaries]
            if any(each is not None and each.has(metric) for each in groups):
                cells = [_cell(metric, UNDEFINED if each is None else each.get(metric.name)) for each in groups]
                differences = [versus.groups.get(group, {}).get(metric.name) for versus in against.values()]
                is_main = metric.is_shown(group == SCORE)
                apart = [difference_cell(metric, each) for each in differences]
                rows.append({"label": metric.label, "main": is_main, "cells": cells, "apart": apart})
        told = f"{first.counts['rows']:,} rows" if "rows" in first.counts else ""
        told += f", {first.counts['positives']:,} positive" if "positives" in first.counts else ""
        if rows:
            yield {"name": group, "told": told, "rows": rows, "others": list(against)}
    if summaries[0].catalogue is not None:
        catalogues = [each.catalogue or {} for each in summaries]
        rows = [
            {"label": metric.label, "main": metric.is_headline, "apart": []}
            | {"cells": [_cell(metric, Interval(each.get(metric.name))) for each in catalogues]}
            for metric in every.CATALOGUE_METRICS
        ]
        # What requests show together has no interval, and so no differences.
        yield {"name": CATALOGUE, "told": "", "rows": rows, "others": []}


def _cell(metric: Named, each: Interval) -> dict[str, str]:
    if each.value is None:
        return {"value": NONE, "interval": ""}
    has_ends = each.low is not None and each.high is not None
    ends = f"{metric.shown(each.low or 0.0)} to {metric.shown(each.high or 0.0)}" if has_ends else ""
    return {"value": metric.shown(each.value), "interval": ends}


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
                yield {"task": task, "model": name, "figure": svg(calibration_figure(summary, task), label, {})}


def _placement(records: Sequence[PlacementRecord], summary: Summary) -> Iterator[dict[str, Any]]:
    """Of each feature of placement, a table and a figure of what its values do to each task."""
    kinds = {name: task.kind for name, task in summary.tasks.items()}
    for feature in dict.fromkeys(each.feature for each in records):
        mine = [each for each in records if each.feature == feature]
        tasks = list(mine[0].effects)
        yield {
            "feature": feature,
            "tasks": {task: "odds" if kinds.get(task) == "binary" else "added" for task in tasks},
            "rows": [
                {"value": each.value, "rows": each.rows, "effects": [f"{each.effects[task]:.3g}" for task in tasks]}
                for each in mine
            ],
            "figure": svg(placement_figure(mine, kinds), f"what values of {feature} do to each task", {}),
        }


def _tradeoffs(records: Sequence[WeightsRecord]) -> dict[str, Any] | None:
    """The front of weights, in the order of the first task's, with the model's own; and a figure of two tasks."""
    if not records:
        return None
    shown = [each for number, each in enumerate(records) if number == 0 or each.dominated_by is None]
    marks = {"this model": lambda each: each is records[0], "(dominated)": lambda each: each.dominated_by is not None}
    rows = [
        {
            "weights": " : ".join(f"{weight:.2g}" for weight in each.weights.values()),
            "values": [_cell(_NDCG, value) for value in each.values.values()],
            "said": " ".join(words for words, holds in marks.items() if holds(each)),
        }
        for each in sorted(shown, key=lambda each: -next(iter(each.weights.values())))
    ]
    tasks, figure = list(records[0].values), ""
    if len(tasks) == 2 and all(value.value is not None for each in records for value in each.values.values()):
        figure = svg(tradeoff_figure(records), f"NDCG@10 of {tasks[0]} and {tasks[1]} by weights in the score", {})
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
