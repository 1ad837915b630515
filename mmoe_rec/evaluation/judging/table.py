"""Differences from other models on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from mmoe_rec.evaluation.judging.differences import LEVEL
from mmoe_rec.evaluation.judging.numbers import number, numbers
from mmoe_rec.evaluation.judging.objective import SCORE
from mmoe_rec.evaluation.metrics import registered


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
            cells = [_cell(each.get(group, {}).get(metric.name), metric.better) for each in others]
            table.add_row(f"  {metric.label}", *cells, end_section=metric == rows[-1])
    return table


def _is_undefined(apart: Mapping[str, Any] | None) -> bool:
    return apart is None or apart["value"] is None


def _cell(apart: Mapping[str, Any] | None, better: str) -> Text:
    if apart is None or apart["value"] is None:
        return Text("-", style="dim")
    shown = apart["p_corrected"] is not None and apart["p_corrected"] < LEVEL
    is_gain = (apart["value"] > 0) == (better == "higher")
    style = "" if not shown else "bold" if better == "one" else f"bold {'green' if is_gain else 'red'}"
    if apart["high"] is None:
        return Text(number(apart["value"]), style=style)
    value, half = numbers(apart["value"], apart["high"] - apart["value"])
    return Text(value, style=style).append(f" ±{half.removeprefix('+')}", style="not bold dim")
