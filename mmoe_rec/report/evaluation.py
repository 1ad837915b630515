"""An evaluation as a page of its own: the verdict first, then what it rests on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.atomic import atomic_file
from mmoe_rec.evaluation import metrics as registered
from mmoe_rec.evaluation.comparison import BETTER, LEVEL, WORSE
from mmoe_rec.evaluation.metrics.metric import Named
from mmoe_rec.evaluation.notes import are_alone, told
from mmoe_rec.evaluation.numbers import numbers
from mmoe_rec.evaluation.slices import ALL, is_worse, worst_first
from mmoe_rec.report.evaluation_figures import calibration_figure, placement_figure, tradeoff_figure
from mmoe_rec.report.explanations import EVALUATION, EVALUATION_OF_ROWS
from mmoe_rec.report.pages import render
from mmoe_rec.report.style import svg

_SHOWN_SLICES = 12
_SEVERITY = {"calibration": "warning", "users": "warning"}
"""Of findings, by their check; all others are problems."""
SCORE, CATALOGUE = "score", "catalogue"
_NDCG = next(each for each in registered.METRICS if each.name == "ndcg_at_10")


@dataclass(frozen=True)
class Made:
    """What is written of a report: the page, and its figures."""

    page: str
    metrics: pa.Table
    slices: pa.Table | None

    @staticmethod
    def of(report: Mapping[str, Any]) -> Made:
        """Makes all of it. report: see `page`."""
        slices = pa.Table.from_pylist(report["slices"]) if report["slices"] else None
        return Made(page(report), metrics_table(report), slices)

    def write(self, folder: Path) -> None:
        """Writes `metrics.parquet`, `slices.parquet` where there are any, and last `report.html`."""
        (folder / "slices.parquet").unlink(missing_ok=True)
        for name, table in (("metrics", self.metrics), ("slices", self.slices)):
            if table is not None:
                with atomic_file(folder / f"{name}.parquet") as file:
                    pq.write_table(table, file)
        with atomic_file(folder / "report.html") as file:
            file.write_text(self.page, encoding="utf-8")


def page(report: Mapping[str, Any]) -> str:
    """The whole page.

    report: `title`; `models`, name -> `address`, `summary` and `gates` (task -> mean weight of each expert, or None);
    the first is the one in question; `comparison` (of `compare`) or None; `findings`, each with `model`, `check` and
    `message`; `slices`, records of `sliced`; `tradeoffs`, records of `told_of_sweep` of the first model; `placement`,
    of what it has learnt of that, each with `feature`, `value`, `rows` and `effects`; and `facts`,
    name -> text.
    """
    summaries = {name: each["summary"] for name, each in report["models"].items()}
    comparison = report["comparison"]
    findings = [each | {"severity": _SEVERITY.get(each["check"], "problem")} for each in report["findings"]]
    first, alone = next(iter(summaries.values())), all(map(are_alone, summaries.values()))
    values = {
        "title": report["title"],
        "models": {name: each["address"] for name, each in report["models"].items()},
        "summary": first,
        "verdicts": _verdicts(comparison),
        "severity": _severity(comparison, findings),
        "judged": None if comparison is None else comparison["objective"],
        "guards": _guards(comparison),
        "alone": told_alone(first),
        "redrawn": "rows" if alone else "users",
        "findings": findings,
        "notes": told(list(summaries.values())),
        "groups": list(_groups(summaries, comparison)),
        "curves": list(_curves(summaries)),
        "gates": _gates(report["models"]),
        "tradeoffs": _tradeoffs(report["tradeoffs"]),
        "placement": list(_placement(report["placement"], first)),
        "slices": (slices := _slices(report["slices"]))[:_SHOWN_SLICES],
        "more_slices": slices[_SHOWN_SLICES:],
        "few": len({(each["by"], each["slice"], each["group"]) for each in report["slices"] if each["value"] is None}),
        "facts": report["facts"],
        "measures": EVALUATION_OF_ROWS if alone else EVALUATION,
    }
    return render("evaluation.html.j2", values)


def metrics_table(report: Mapping[str, Any]) -> pa.Table:
    """A row for each model, task (`score`, `catalogue`) and metric, with its interval; and for each difference from
    another model, whose name stands in `less`."""
    rows = [
        {"model": name, "less": None, "group": group, "metric": metric, **_entry(value)}
        for name, each in report["models"].items()
        for group, metrics in _all_groups(each["summary"]).items()
        for metric, value in metrics.items()
        if _is_number(value)
    ]
    comparison = report["comparison"]
    for other, each in ({} if comparison is None else comparison["against"]).items():
        for group, metrics in {"objective": {"objective": each["objective"]}, **each["groups"]}.items():
            for metric, apart in metrics.items():
                rows.append({"model": comparison["model"], "less": other, "group": group, "metric": metric, **apart})
    kinds = [(name, pa.string()) for name in ("model", "less", "group", "metric")]
    kinds += [(name, pa.float64()) for name in ("value", "low", "high", "error", "p", "p_corrected", "detectable")]
    return pa.Table.from_pylist(rows, pa.schema(kinds))


def _entry(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {"value": float(value)}


def _is_number(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "low" in value
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _all_groups(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {**summary["tasks"], SCORE: summary["score"], CATALOGUE: summary.get("catalogue", {})}


def _verdicts(comparison: Mapping[str, Any] | None) -> list[str]:
    return [] if comparison is None else [each["verdict"]["sentence"] for each in comparison["against"].values()]


def _guards(comparison: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    if comparison is None:
        return []
    return [
        {**guard, "other": other}
        for other, each in comparison["against"].items()
        for guard in each["verdict"]["guards"]
    ]


def _severity(comparison: Mapping[str, Any] | None, findings: Sequence[Mapping[str, Any]]) -> str:
    """The class of the verdict's card."""
    kinds = [] if comparison is None else [each["verdict"]["kind"] for each in comparison["against"].values()]
    own = next(iter(findings), {"model": ""})["model"] if comparison is None else comparison["model"]
    if any(each["severity"] == "problem" and each["model"] == own for each in findings) or WORSE in kinds:
        return "problem"
    return "warning" if findings or any(kind != BETTER for kind in kinds) else ""


def told_alone(summary: Mapping[str, Any]) -> list[str]:
    """How well each task is predicted, and the score ranks, in a sentence each."""
    found = []
    for name, metric in [*((name, _first_of(task)) for name, task in summary["tasks"].items()), (SCORE, "ndcg_at_10")]:
        each = _all_groups(summary)[name].get(metric, {"value": None})
        if each["value"] is not None:
            interval = "" if each["low"] is None else f" ({each['low']:.4f} to {each['high']:.4f})"
            found.append(f"{name}: {metric} {each['value']:.4f}{interval}")
    return found


def _first_of(task: Mapping[str, Any]) -> str:
    return "auc" if task["kind"] == "binary" else "r2"


def _groups(
    summaries: Mapping[str, Mapping[str, Any]], comparison: Mapping[str, Any] | None
) -> Iterable[dict[str, Any]]:
    """Tables of metrics: one a task, of the score, and of the catalogue."""
    first = next(iter(summaries.values()))
    alone = all(map(are_alone, summaries.values()))
    for group in _all_groups(first):
        mine = [_all_groups(each).get(group, {}) for each in summaries.values()]
        metrics: list[Named] = (
            list(registered.CATALOGUE_METRICS)
            if group == CATALOGUE
            else [each for each in registered.METRICS if _fits(each, mine[0]) and not (alone and each.ranks_within)]
        )
        rows = [
            _row(metric, group, mine, comparison) for metric in metrics if any(metric.name in each for each in mine)
        ]
        if rows:
            of = mine[0]
            told_of = f"{of['rows']:,} rows" if "rows" in of else ""
            told_of += f", {of['positives']:,} positive" if "positives" in of else ""
            yield {"name": group, "told": told_of, "rows": rows, "others": _others(group, comparison)}


def _others(group: str, comparison: Mapping[str, Any] | None) -> list[str]:
    """Those from which there are differences; what requests show together has no interval."""
    return [] if comparison is None or group == CATALOGUE else list(comparison["against"])


def _fits(metric: Any, mine: Mapping[str, Any]) -> bool:
    return mine.get("kind", SCORE) in metric.kinds


def _row(
    metric: Named, group: str, mine: Sequence[Mapping[str, Any]], comparison: Mapping[str, Any] | None
) -> dict[str, Any]:
    cells = [_cell(metric, each.get(metric.name)) for each in mine]
    against = {} if comparison is None else comparison["against"]
    others = _others(group, comparison)
    apart = [apart_cell(metric, against[other]["groups"].get(group, {}).get(metric.name)) for other in others]
    of_lists = group not in (SCORE, CATALOGUE) and getattr(metric, "of_lists", False)
    return {"label": metric.label, "main": metric.is_headline and not of_lists, "cells": cells, "apart": apart}


def _cell(metric: Named, value: Any) -> dict[str, str]:
    each = value if isinstance(value, Mapping) else {"value": value, "low": None}
    if each["value"] is None:
        return {"value": "–", "interval": ""}  # noqa: RUF001 - a dash stands for a number that does not exist
    interval = "" if each["low"] is None else f"{metric.shown(each['low'])} to {metric.shown(each['high'])}"
    return {"value": metric.shown(each["value"]), "interval": interval}


def apart_cell(metric: Named, apart: Mapping[str, Any] | None) -> dict[str, str]:
    """A difference of a metric for a table: `value`, `interval`, and the class of its `badge` where it is shown."""
    if apart is None or apart["value"] is None:
        return {"value": "–", "interval": "", "badge": ""}  # noqa: RUF001
    value, *ends = numbers(*(apart[name] for name in ("value", "low", "high") if apart[name] is not None))
    shown = apart["p_corrected"] is not None and apart["p_corrected"] < LEVEL
    gain = (apart["value"] > 0) == (metric.better == "higher")
    badge = "" if not shown or metric.better == "one" else "good" if gain else "problem"
    return {"value": value, "interval": " to ".join(ends), "badge": badge}


def _curves(summaries: Mapping[str, Mapping[str, Any]]) -> Iterable[dict[str, str]]:
    for task in next(iter(summaries.values()))["tasks"]:
        for name, summary in summaries.items():
            if summary["tasks"].get(task, {}).get("calibration_bins"):
                label = f"predicted against observed probabilities of {task} by {name}"
                yield {"task": task, "model": name, "figure": svg(calibration_figure(summary, task), label, {})}


def _gates(models: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{"model": name, "tasks": each["gates"]} for name, each in models.items() if each["gates"]]


def _placement(records: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """Of each feature of placement, a table and a figure of what its values do to each task."""
    kinds = {name: task["kind"] for name, task in summary["tasks"].items()}
    for feature in dict.fromkeys(each["feature"] for each in records):
        mine = [each for each in records if each["feature"] == feature]
        tasks = list(mine[0]["effects"])
        label = f"what values of {feature} do to each task"
        yield {
            "feature": feature,
            "tasks": {task: "odds" if kinds.get(task) == "binary" else "added" for task in tasks},
            "rows": [
                {"value": each["value"], "rows": each["rows"], "effects": [f"{each['effects'][t]:.3g}" for t in tasks]}
                for each in mine
            ],
            "figure": svg(placement_figure(mine, kinds), label, {}),
        }


def _tradeoffs(records: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The front of weights, in the order of the first task's, with the model's own; and a figure of two tasks."""
    if not records:
        return None
    shown = [each for number, each in enumerate(records) if number == 0 or each["dominated_by"] is None]
    rows = [
        {
            "weights": " : ".join(f"{weight:.2g}" for weight in each["weights"].values()),
            "values": [_cell(_NDCG, value) for value in each["values"].values()],
            "said": " ".join(filter(None, ("this model" if each is records[0] else "", _dominated(each)))),
        }
        for each in sorted(shown, key=lambda each: -next(iter(each["weights"].values())))
    ]
    tasks, figure = list(records[0]["values"]), ""
    defined = all(value["value"] is not None for each in records for value in each["values"].values())
    if len(tasks) == 2 and defined:
        figure = svg(tradeoff_figure(records), f"NDCG@10 of {tasks[0]} and {tasks[1]} by weights in the score", {})
    return {"tasks": tasks, "rows": rows, "tried": len(records), "figure": figure}


def _dominated(record: Mapping[str, Any]) -> str:
    return "" if record["dominated_by"] is None else "(dominated)"


def _slices(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The worst, then others, with what they are compared with."""
    found = []
    for each in worst_first(records, LEVEL):
        worse = is_worse(each, LEVEL)
        better = not worse and each["p_corrected"] is not None and each["p_corrected"] < LEVEL and each["apart"] != 0
        apart, *ends = numbers(*(each[name] for name in ("apart", "low", "high") if each[name] is not None)) or ["–"]  # noqa: RUF001
        beside = ALL if each["beside"] == ALL else f"'{each['beside']}' there"
        found.append(
            {
                "slice": f"{each['by']}: {each['slice']}",
                "group": each["group"],
                "metric": each["metric"],
                "rows": each["rows"],
                "value": f"{each['value']:.4f}",
                "beside": beside,
                "apart": apart,
                "interval": " to ".join(ends),
                "badge": "problem" if worse else "good" if better else "",
            }
        )
    return found
