"""Summaries side by side on the terminal.

Differences from other models on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from mmoe_rec.evaluation import metrics as registered
from mmoe_rec.evaluation.comparison import LEVEL, SCORE
from mmoe_rec.evaluation.metrics.metric import Metric, Named
from mmoe_rec.evaluation.notes import are_alone
from mmoe_rec.evaluation.numbers import number, numbers


def results_table(columns: dict[str, dict[str, Any]]) -> Table:
    """One row a headline metric, one column a model; the best value of a row is bold. Three models fit into 80 columns.

    Of how well a task's prediction ranks each request's rows there is only GAUC; `metrics.json` has all.

    Values stand with half the width of their 95% interval; the summary has the exact ends, which need not lie evenly.

    Args:
        columns: name of the model -> its `summary.summarise`. A metric that a model lacks, or that is
            undefined, shows as a dash; `notes.told` says why. Where each row is a user of its own, how well rows are
            ranked within users and requests is left out.
    """
    alone = all(map(are_alone, columns.values()))
    caption = f"± half the 95% interval, bootstrap over {'rows' if alone else 'users'}"
    table = Table(show_header=True, header_style="bold", caption=caption)
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(Text(name), justify="right", no_wrap=True)
    sections = {name: None for summary in columns.values() for name in summary["tasks"]}
    for section in (*sections, "score"):
        groups = [_group(summary, section) for summary in columns.values()]
        shown = [
            metric
            for metric in registered.METRICS
            if metric.is_shown(section == "score")
            if any(_has(group, metric) for group in groups) and not (alone and metric.ranks_within)
        ]
        if not shown:
            continue
        table.add_row(Text(section, style="bold"))
        for metric in shown:
            table.add_row(f"  {metric.label}", *_cells(metric, groups), end_section=metric == shown[-1])
    if any("catalogue" in summary for summary in columns.values()):
        table.add_row(Text("catalogue", style="bold"))
        for each in registered.CATALOGUE_METRICS:
            if not each.is_headline:
                continue
            table.add_row(f"  {each.label}", *_cells(each, [_group(one, "catalogue") for one in columns.values()]))
    return table


def _group(summary: dict[str, Any], section: str) -> dict[str, Any]:
    groups = {**summary["tasks"], "score": summary["score"], "catalogue": summary.get("catalogue", {})}
    group: dict[str, Any] = groups.get(section, {})
    return group


def _has(group: dict[str, Any], metric: Metric[Any]) -> bool:
    return metric.name in group and group.get("kind", "score") in metric.kinds


def _cells(metric: Named, groups: list[dict[str, Any]]) -> list[Text]:
    entries = [group.get(metric.name) for group in groups]
    intervals = [each if isinstance(each, dict) else {"value": each, "low": None, "high": None} for each in entries]
    losses = [float("inf") if each["value"] is None else metric.loss(each["value"]) for each in intervals]
    best = min(losses) if len(groups) > 1 else None
    return [_cell(metric, each, loss == best) for each, loss in zip(intervals, losses, strict=True)]


def _cell(metric: Named, interval: dict[str, Any], is_best: bool) -> Text:
    if interval["value"] is None:
        return Text("-", style="dim")
    text = Text(metric.shown(interval["value"]), style="bold" if is_best else "")
    if interval["low"] is not None:
        text.append(f" ±{metric.shown((interval['high'] - interval['low']) / 2)}", style="not bold dim")
    return text


def differences_table(compared: Mapping[str, Any]) -> Table:
    """One row a headline metric, one column another model. compared: of `differences`.

    A difference that is shown, its p-value corrected, is bold: green where the model is better, red where it is worse.
    """
    table = Table(
        title=Text(f"Differences: {compared['model']} minus"),
        title_justify="left",
        title_style="bold",
        caption=f"± half the 95% interval; bold: shown (p < {LEVEL:g}, corrected)",
    )
    table.add_column("", no_wrap=True)
    for other in compared["against"]:
        table.add_column(Text(other), justify="right", no_wrap=True)
    others = [each["groups"] for each in compared["against"].values()]
    for group in dict.fromkeys(name for each in others for name in each):
        rows = [
            metric
            for metric in registered.METRICS
            if metric.is_shown(group == SCORE) and any(metric.name in each.get(group, {}) for each in others)
            if not (metric.ranks_within and all(_is_undefined(each.get(group, {}).get(metric.name)) for each in others))
        ]
        if not rows:
            continue
        table.add_row(Text(group, style="bold"))
        for metric in rows:
            cells = [_apart_cell(each.get(group, {}).get(metric.name), metric.better) for each in others]
            table.add_row(f"  {metric.label}", *cells, end_section=metric == rows[-1])
    return table


def _is_undefined(apart: Mapping[str, Any] | None) -> bool:
    return apart is None or apart["value"] is None


def _apart_cell(apart: Mapping[str, Any] | None, better: str) -> Text:
    if apart is None or apart["value"] is None:
        return Text("-", style="dim")
    shown = apart["p_corrected"] is not None and apart["p_corrected"] < LEVEL
    is_gain = (apart["value"] > 0) == (better == "higher")
    style = "" if not shown else "bold" if better == "one" else f"bold {'green' if is_gain else 'red'}"
    if apart["high"] is None:
        return Text(number(apart["value"]), style=style)
    value, half = numbers(apart["value"], apart["high"] - apart["value"])
    return Text(value, style=style).append(f" ±{half.removeprefix('+')}", style="not bold dim")
