"""What a row of an embedding table is called."""

from __future__ import annotations

import calendar
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.inspection.ids import Meaning
from mmoe_rec.inspection.inputs import FeatureInputs


def row_names(feature: FeatureInputs, table: str, meaning: Meaning, rows: list[int | str], fitted: Path) -> list[str]:
    """Names for a reader of `rows`, numbers of table rows or words; fitted: folder of the fitted features."""
    numbers = [row for row in rows if isinstance(row, int)]
    known = {row: _plain(feature, table, row) for row in numbers}
    if feature.kind in ("id", "ids", "history"):
        known |= _ids(fitted / f"{table}.vocabulary.parquet", meaning, numbers)
    return [known[row] if isinstance(row, int) else row for row in rows]


def _plain(feature: FeatureInputs, table: str, row: int) -> str:
    if feature.kind == "time":
        return calendar.day_abbr[row - 1] if table.endswith("_weekday") else f"{row - 1}:00"
    return f"bucket {row}" if feature.kind in ("cross", "numeric") else f"row {row}"


def _ids(vocabulary: Path, meaning: Meaning, rows: list[int]) -> dict[int, str]:
    """Table row -> the id itself, where the vocabulary is at hand; a row's number is name enough otherwise."""
    try:
        known = pq.read_table(vocabulary, columns=["id"]).column("id")
        found = known.take(pa.array([row - meaning.first_known for row in rows], pa.int64())).to_pylist()
    except (OSError, pa.ArrowException, KeyError):
        return {}
    return {row: str(value) for row, value in zip(rows, found, strict=True)}
