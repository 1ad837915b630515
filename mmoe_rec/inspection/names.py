"""What a row of an embedding table is called."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.settings.schema import Meaning


def row_names(meaning: Meaning, table: str, rows: list[int | str], fitted: Path) -> list[str]:
    """Names for a reader of `rows`, numbers of table rows or words; fitted: folder of the fitted features."""
    numbers = [row for row in rows if isinstance(row, int)]
    if meaning.row_name is not None:
        known = {row: meaning.row_name(table, row) for row in numbers}
    else:
        known = {row: f"row {row}" for row in numbers} | _ids(fitted / f"{table}.vocabulary.parquet", meaning, numbers)
    return [known[row] if isinstance(row, int) else row for row in rows]


def _ids(vocabulary: Path, meaning: Meaning, rows: list[int]) -> dict[int, str]:
    """Table row -> the id itself, where the vocabulary can be read; otherwise the row's number is name enough."""
    try:
        known = pq.read_table(vocabulary, columns=["id"]).column("id")
        found = known.take(pa.array([row - meaning.first_known for row in rows], pa.int64())).to_pylist()
    except (OSError, pa.ArrowException, KeyError):
        return {}
    return {row: str(value) for row, value in zip(rows, found, strict=True)}
