"""The page's table of features, each with its inputs below it."""

from __future__ import annotations

from typing import Any

from mmoe_rec.inspection.explanations import COLUMNS
from mmoe_rec.inspection.findings import DRIFT, LEAK_AUC, STRONG_DRIFT, flags_of
from mmoe_rec.inspection.formatting import NONE, count, fixed, percent
from mmoe_rec.inspection.markup import Markup, breakable, joined, tag
from mmoe_rec.inspection.tables import meter

_PARTS = 12  # inputs of a feature that are shown; a vector may have hundreds


def feature_table(health: dict[str, Any]) -> Markup:
    """Features in the order of the settings."""
    tasks = list(next(iter(health["overview"]["splits"].values()))["tasks"])
    head = [tag("th", "feature"), tag("th", "role", title=COLUMNS["role"])]
    head += [
        tag("th", name, title=COLUMNS[key], class_="number")
        for name, key in (
            ("has value", "has value"),
            ("in test", "has value"),
            ("distinct", "distinct"),
            ("unknown", "unknown"),
            ("in test", "unknown"),
            ("PSI", "PSI"),
            *((f"AUC {task}", "AUC") for task in tasks),
        )
    ]
    head.append(tag("th", "flags", title="Checks that found something, see the top of the page"))
    rows = [row for feature in health["features"] for row in _rows(feature, flags_of(health, feature["name"]))]
    note = "Point at a column's name for what it means. Inputs of a feature that has several stand below it."
    table = tag("table", tag("thead", tag("tr", *head)), tag("tbody", *rows))
    body = tag("div", tag("div", table, class_="scroll"), class_="card")
    return joined(tag("p", note, class_="muted small"), body)


def psi_badge(psi: float | None, before: str = "") -> Markup:
    """PSI in the colour of its usual reading."""
    if psi is None:
        return Markup(NONE)
    level = "problem" if psi > STRONG_DRIFT else "warning" if psi > DRIFT else "good"
    return tag("span", f"{before}{psi:.2f}", class_=f"badge {level}")


def _rows(feature: dict[str, Any], flags: list[str]) -> list[Markup]:
    parts = feature["inputs"] if len(feature["inputs"]) > 1 else []
    shown = sorted(parts, key=lambda each: -(each["psi"] or 0))[:_PARTS] if len(parts) > _PARTS else parts
    about = breakable(f"{feature['kind']} of {', '.join(feature['columns'])}")
    name = tag("td", breakable(feature["name"]), tag("small", about), class_="name")
    badges = [tag("span", each, class_=f"badge {'problem' if each == 'leak' else 'warning'}") for each in flags]
    distinct = f"{len(parts)} inputs" if parts else _distinct(feature)
    cells = _cells(feature, distinct, feature["unknown"])
    last = tag("td", *(joined(each, " ") for each in badges))
    rows = [tag("tr", name, tag("td", feature["role"]), *cells, last, class_="has-parts" if parts else None)]
    for place, each in enumerate(shown):
        more = f" and {len(parts) - _PARTS} more" if place == _PARTS - 1 and len(parts) > _PARTS else ""
        ending = each["name"].removeprefix(f"{feature['name']}_") + more
        label = tag("td", breakable(ending), class_="name", title=each["name"])
        cells = _cells(each, count(each["distinct"]), each["unknown"], meters=False)
        kind = "part last" if place == len(shown) - 1 else "part"
        rows.append(tag("tr", label, tag("td"), *cells, tag("td"), class_=kind))
    return rows


def _distinct(feature: dict[str, Any]) -> str:
    vocabulary = feature["vocabulary"] or {}
    if vocabulary.get("distinct", 0) > vocabulary.get("known", 0):
        return f"{count(feature['distinct'])} of {vocabulary['distinct']:,}"
    return count(feature["distinct"])


def _cells(each: dict[str, Any], distinct: str, unknown: dict[str, float | None], meters: bool = True) -> list[Markup]:
    coverage = each["coverage"]
    bar = [meter(coverage["train"])] if coverage["train"] is not None and meters else []
    cells = [
        joined(percent(coverage["train"]), *bar),
        percent(coverage["test"]),
        distinct,
        percent(unknown["train"]),
        percent(unknown["test"]),
        psi_badge(each["psi"]),
        *(_auc(value, meters) for value in each["auc"].values()),
    ]
    return [tag("td", cell, class_="number") for cell in cells]


def _auc(value: float | None, meters: bool) -> str:
    if value is None:
        return NONE
    return joined(fixed(value), meter(2 * value - 1, hot=value > LEAK_AUC)) if meters else fixed(value)
