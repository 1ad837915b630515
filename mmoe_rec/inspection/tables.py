"""Tables of the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmoe_rec.inspection.formatting import percent, size
from mmoe_rec.inspection.markup import Markup, breakable, joined, tag


def grid(columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]], numbers_from: int | None = None) -> Markup:
    """A table of (name, explanation) columns; those from `numbers_from` on are set to the right."""
    kinds = [None if numbers_from is None or place < numbers_from else "number" for place in range(len(columns))]
    head = [tag("th", name, title=hint or None, class_=kind) for (name, hint), kind in zip(columns, kinds, strict=True)]
    body = [tag("tr", *(tag("td", cell, class_=kind) for cell, kind in zip(row, kinds, strict=True))) for row in rows]
    return tag("div", tag("table", tag("thead", tag("tr", *head)), tag("tbody", *body)), class_="scroll")


def meter(share: float, hot: bool = False) -> Markup:
    """A bar as long as a share of its place."""
    width = f"width:{100 * min(max(share, 0.0), 1.0):.1f}%"
    return tag("span", tag("i", style=width, class_="hot" if hot else None), class_="meter")


def embedding_tables(tables: list[dict[str, Any]]) -> Markup:
    """Sizes of the embedding tables, the largest first."""
    if not tables:
        return tag("p", "The model has no embedding table.", class_="muted")
    largest = max(each["bytes"] + each["optimizer_bytes"] for each in tables)
    total, optimizer = sum(each["bytes"] for each in tables), sum(each["optimizer_bytes"] for each in tables)
    columns = [
        ("table", ""),
        ("inputs", "Model inputs that look up rows of the table"),
        ("rows", "Missing and unknown ids' rows included"),
        ("dim", "Numbers a row"),
        ("float32", "Bytes of the table"),
        ("optimizer", "Bytes of row-wise Adagrad's state: 4 a row"),
        ("seen in training", "Share of the rows that training looks up at least once"),
    ]
    rows = [
        [
            tag("b", breakable(each["name"])),
            breakable(", ".join(each["inputs"])),
            f"{each['rows']:,}",
            str(each["dim"]),
            joined(size(each["bytes"]), meter((each["bytes"] + each["optimizer_bytes"]) / largest)),
            size(each["optimizer_bytes"]),
            percent(1 - each["never_seen"]),
        ]
        for each in sorted(tables, key=lambda each: -each["bytes"])
    ]
    note = f"{len(tables)} tables, {size(total)}, and {size(optimizer)} of the optimizer's state."
    return joined(tag("p", note, class_="muted small"), tag("div", grid(columns, rows, numbers_from=2), class_="card"))
