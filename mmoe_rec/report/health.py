"""The health of a data set as a page of its own."""

from __future__ import annotations

import json
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

from matplotlib.ticker import FuncFormatter, MaxNLocator

from mmoe_rec.atomic import write_text
from mmoe_rec.profiling import health_findings
from mmoe_rec.profiling.advice import NOTE
from mmoe_rec.profiling.health_counts import FREQUENT, RATE_SMOOTHING
from mmoe_rec.profiling.health_findings import describe_move, drift_beyond_noise, flags_of, split_findings
from mmoe_rec.report.pages import COLOURS, blank, plain, render, svg
from mmoe_rec.report.sentences import describe_rows
from mmoe_rec.task_kinds import KINDS

_DRAWN = 12  # features whose drift is drawn


def write(health: dict[str, Any], folder: Path) -> None:
    """Writes `health.json` and `health.html`. Raises UserError where the folder can't be made."""
    text = page(health)
    write_text(folder / "health.json", json.dumps(health, indent=1, allow_nan=False))
    write_text(folder / "health.html", text)


def page(health: dict[str, Any]) -> str:
    """The whole page of a health as `mmoe_rec.profiling.data_health` describes it."""
    overview = health["overview"]
    tasks = next(iter(overview["splits"].values()))["tasks"]
    shown, folded = split_findings(health["findings"])
    values = {
        "title": f"Data set health: {health['name']}",
        "overview": overview,
        "tasks": tasks,
        "found": health["sentences"][0].partition(";")[0],
        "quick_models": {name: each or {} for name, each in health["quick_models"].items()},
        "shown": shown,
        "folded": folded,
        "notes": describe_rows(overview),
        "weeks": {task: weeks_figure(health["weeks"], task) for task in (tasks if health["weeks"] else ())},
        "features": [each | {"flags": flags_of(health, each["name"])} for each in health["features"]],
        "drift": _drift(health["features"]),
        "tables": sorted(health["tables"], key=lambda each: -each["bytes"]),
        "largest": max((each["bytes"] + each["optimizer_bytes"] for each in health["tables"]), default=1),
        "limits": health_findings,
        "note": NOTE,
        "frequent": FREQUENT,
        "smoothing": RATE_SMOOTHING,
    }
    return render("health.html.j2", values)


def weeks_figure(weeks: list[dict[str, Any]], task: str) -> str:
    """Rate of a task's label by week, its observed rows below, a colour a split."""
    figure = blank(12.8, 3.6)
    line, bars = map(plain, figure.subplots(2, 1, sharex=True, height_ratios=[4, 1]))
    below, rates, kind = Counter[int](), list[float](), ""
    for split in dict.fromkeys(split for week in weeks for split in week["splits"]):
        labels = {
            place: week["splits"][split]["tasks"][task] for place, week in enumerate(weeks) if split in week["splits"]
        }
        known = {place: each["rate"] for place, each in labels.items() if each["rate"] is not None}
        rows = {place: each["observed"] for place, each in labels.items()}
        line.plot(list(known), list(known.values()), color=COLOURS[split], linewidth=2, marker="o", label=split)
        line.axvspan(min(rows) - 0.5, max(rows) + 0.5, color=COLOURS[split], alpha=0.08, linewidth=0)
        bottom = [below[place] for place in rows]
        bars.bar(list(rows), list(rows.values()), 0.72, bottom, color=COLOURS[split], alpha=0.45)
        below.update(rows)
        rates += known.values()
        kind = next(iter(labels.values()))["kind"]
    # At least a fifth of the rates between the ends: noise must not look like news.
    low, high = (min(rates), max(rates)) if rates else (0.0, 1.0)
    middle, span = (low + high) / 2, max(high - low, 0.1 * abs(low + high), 1e-9)
    line.set_ylim(middle - 0.6 * span if low < 0 else max(middle - 0.6 * span, 0.0), middle + 0.7 * span)
    line.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    shown = (lambda rate, _: f"{100 * rate:.3g}%") if KINDS[kind].is_binary else (lambda rate, _: f"{rate:.4g}")
    line.yaxis.set_major_formatter(FuncFormatter(shown))
    line.legend(loc="upper left", ncols=3, frameon=False, fontsize=9, labelcolor="linecolor")
    most = max([*below.values(), 1])
    bars.set_yticks([0, most], ["rows", f"{most:,}"])
    every = range(0, len(weeks), -(-len(weeks) // 12))
    bars.set_xticks(every, [date.fromisoformat(weeks[place]["week"]).strftime("%-d %b %y") for place in every])
    return svg(figure, f"rate of {task} by week")


def _drift(features: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The features that drift most, each by its worst input, with its bins, the ends of which have names."""
    known = [[each for each in feature["inputs"] if each["psi"] is not None] for feature in features]
    worst = [max(inputs, key=drift_beyond_noise, default=None) for inputs in known]
    drawn = []
    for each in sorted(filter(None, worst), key=lambda each: -drift_beyond_noise(each))[:_DRAWN]:
        bins = each["bins"]
        named = [part["bin"] for part in bins if part["bin"] in ("all others", "unknown", "missing")]
        ends = [bins[0]["bin"], ", ".join(named) or bins[-1]["bin"]] if len(bins) > 1 else [bins[0]["bin"]]
        if each["table"] is None and len(bins) > 2:
            ends = ["low values", "high values, then missing" if ends[1] == "missing" else "high values"]
        most = max(*(part[split] for part in bins for split in ("train", "test")), 1e-9)
        drawn.append({**each, "moved": describe_move(each), "ends": ends, "most": most})
    return drawn
