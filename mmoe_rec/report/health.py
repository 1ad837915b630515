"""The health of a data set as a page of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmoe_rec.atomic import atomic_file
from mmoe_rec.inspection.findings import (
    DRIFT,
    LEAK_AUC,
    STRONG_DRIFT,
    drift_beyond_noise,
    flags_of,
    moved,
    shown_and_folded,
)
from mmoe_rec.report.explanations import CHECKS, COLUMNS, MEASURES
from mmoe_rec.report.formatting import count, requests_told, unmatured_told
from mmoe_rec.report.health_figures import shares_figure, shown_bins, weeks_figure
from mmoe_rec.report.pages import render

_DRAWN = 12  # features whose drift is drawn
_PARTS = 12  # inputs of a feature that are shown; a vector may have hundreds


def write(health: dict[str, Any], folder: Path) -> None:
    """Writes `health.json` and `health.html`. Raises UserError where the folder can't be made."""
    texts = {"health.json": json.dumps(health, indent=1, allow_nan=False), "health.html": page(health)}
    for name, text in texts.items():
        with atomic_file(folder / name) as file:
            file.write_text(text, encoding="utf-8")


def page(health: dict[str, Any]) -> str:
    """The whole page of a health as `mmoe_rec.inspection.health` describes it."""
    overview, findings = health["overview"], health["findings"]
    tasks = next(iter(overview["splits"].values()))["tasks"]
    shown, folded = shown_and_folded(findings)
    numbers = {word: sum(each["severity"] == word for each in findings) for word in ("problem", "warning")}
    said = [f"{number} {word}{'s' * (number != 1)}" for word, number in numbers.items() if number]
    values = {
        "title": f"Data set health: {health['name']}",
        "overview": overview,
        "tasks": tasks,
        "found": " and ".join(said),
        "shown": _by_check(shown),
        "folded": _by_check(folded),
        "notes": _notes(overview),
        "weeks": {task: weeks_figure(health["weeks"], task) for task in (tasks if health["weeks"] else ())},
        "features": [_feature(each) | {"flags": flags_of(health, each["name"])} for each in health["features"]],
        "drift": _drift(health["features"]),
        "tables": sorted(health["tables"], key=lambda each: -each["bytes"]),
        "largest": max((each["bytes"] + each["optimizer_bytes"] for each in health["tables"]), default=1),
        "checks": CHECKS,
        "columns": COLUMNS,
        "measures": MEASURES,
        "limits": {"drift": DRIFT, "strong": STRONG_DRIFT, "leak": LEAK_AUC},
    }
    return render("health.html.j2", values)


def _by_check(findings: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    names = dict.fromkeys(each["check"] for each in findings)
    return {name: [each for each in findings if each["check"] == name] for name in names}


def _notes(overview: dict[str, Any]) -> list[str]:
    """What to know of the rows that the totals do not show."""
    told = requests_told(overview["requests"])
    return [each for each in (told,) if each] + [
        f"{name}: {unmatured_told(task, number, split['labels_known_by'])}"
        for name, split in overview["splits"].items()
        for task, number in split["unmatured"].items()
    ]


def _feature(feature: dict[str, Any]) -> dict[str, Any]:
    """A feature with those of its inputs that are shown, the most drifted of many, and how many are left out."""
    inputs = feature["inputs"]
    parts = inputs if 1 < len(inputs) <= _PARTS else sorted(inputs, key=lambda each: -(each["psi"] or 0))[:_PARTS]
    parts, told = (parts, f"{len(inputs)} inputs") if len(inputs) > 1 else ([], count(feature["distinct"]))
    vocabulary = feature["vocabulary"] or {}
    if not parts and vocabulary.get("distinct", 0) > vocabulary.get("known", 0):
        told += f" of {vocabulary['distinct']:,}"
    return feature | {"parts": parts, "left": len(inputs) - len(parts), "distinct_told": told}


def _drift(features: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The features that drift most, each by its worst input."""
    worst = [
        max((each for each in feature["inputs"] if each["psi"] is not None), key=drift_beyond_noise, default=None)
        for feature in features
    ]
    inputs = sorted((each for each in worst if each is not None), key=lambda each: -drift_beyond_noise(each))
    return [_drifting(each) for each in inputs[:_DRAWN]]


def _drifting(each: dict[str, Any]) -> dict[str, Any]:
    """An input with its figure, and what its first and its last bins are called."""
    ordered = each["table"] is None
    bins, told = shown_bins(each["bins"], ordered), moved(each)
    named = [part["bin"] for part in bins if part["bin"] in ("all others", "unknown", "missing")]
    ends = [bins[0]["bin"], ", ".join(named) or bins[-1]["bin"]] if len(bins) > 1 else [bins[0]["bin"]]
    if ordered and len(bins) > 2:
        ends = ["low values", "high values, then missing" if ends[1] == "missing" else "high values"]
    label = f"shares of training and test rows in the bins of {each['name']}: {told}"
    return {"name": each["name"], "psi": each["psi"], "moved": told, "ends": ends, "figure": shares_figure(bins, label)}
