"""Summaries side by side on the terminal."""

from typing import Any

from rich.table import Table
from rich.text import Text

_LOWER_IS_BETTER = ("logloss", "normalised_entropy", "ece", "rmse", "mae")
_HIGHER_IS_BETTER = ("auc", "gauc_user", "gauc_request", "r2", "ndcg_at_5", "ndcg_at_10", "mrr")
_ONE_IS_BEST = ("calibration",)
_SHOWN = (*_HIGHER_IS_BETTER[:3], *_LOWER_IS_BETTER[:2], *_ONE_IS_BEST, *_LOWER_IS_BETTER[2:], *_HIGHER_IS_BETTER[3:])


def results_table(columns: dict[str, dict[str, Any]]) -> Table:
    """One row a metric, one column a model; the best value of a row is bold. Three models fit into 80 columns.

    Values stand with half the width of their 95% interval; the summary has the exact ends, which need not lie evenly.

    Args:
        columns: name of the model -> its `summary.summarise`. A metric that a model lacks, or that is
            undefined, shows as a dash; `notes.told` says why.
    """
    caption = "± half the 95% interval, bootstrap over users"
    table = Table(show_header=True, header_style="bold", caption=caption)
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    sections = {name: None for summary in columns.values() for name in summary["tasks"]}
    for section in (*sections, "score"):
        groups = [_group(summary, section) for summary in columns.values()]
        shown = [metric for metric in _SHOWN if any(metric in group for group in groups)]
        table.add_row(Text(section, style="bold"))
        for metric in shown:
            table.add_row(f"  {_label(metric)}", *_cells(metric, groups), end_section=metric == shown[-1])
    return table


def _group(summary: dict[str, Any], section: str) -> dict[str, Any]:
    group: dict[str, Any] = summary["score"] if section == "score" else summary["tasks"].get(section, {})
    return group


def _value(group: dict[str, Any], metric: str) -> float | None:
    entry = group.get(metric)
    return entry["value"] if isinstance(entry, dict) else entry


def _label(metric: str) -> str:
    if metric in _ONE_IS_BEST:
        return f"{metric} → 1"
    return f"{metric} {'↓' if metric in _LOWER_IS_BETTER else '↑'}"


def _cells(metric: str, groups: list[dict[str, Any]]) -> list[Text]:
    losses = [_loss(metric, _value(group, metric)) for group in groups]
    best = min(losses) if len(groups) > 1 else None
    return [_cell(group.get(metric), loss == best) for group, loss in zip(groups, losses, strict=True)]


def _loss(metric: str, value: float | None) -> float:
    """A number that is smaller for better values."""
    if value is None:
        return float("inf")
    if metric in _ONE_IS_BEST:
        return abs(value - 1)
    return value if metric in _LOWER_IS_BETTER else -value


def _cell(entry: Any, is_best: bool) -> Text:
    interval = entry if isinstance(entry, dict) else {"value": entry, "low": None, "high": None}
    if interval["value"] is None:
        return Text("-", style="dim")
    text = Text(_number(interval["value"]), style="bold" if is_best else "")
    if interval["low"] is not None:
        text.append(f" ±{_number((interval['high'] - interval['low']) / 2)}", style="not bold dim")
    return text


def _number(value: float) -> str:
    return f"{value:.4f}" if 0.0005 <= abs(value) < 1000 else f"{value:.3g}"
