"""Encoded rows as plain arrays, which the peers' environment can read without this project.

FOLDER/inputs.json                       name -> table and its rows, of each input with ids; numbers; tasks
FOLDER/{train,validation,test}.NAME.npy  (N,) or, of a list, (N, L) int64 rows of the table, from 1 on; 0 pads lists
FOLDER/{train,validation,test}.numbers.npy, .labels.npy     (N, D) float32, (N, T) float32 with NaN where unobserved
"""

import json
from pathlib import Path

import numpy as np

from mmoe_rec.batches.encoded_rows import EncodedRows
from mmoe_rec.features.layout import Layout
from mmoe_rec.point_in_time.arrays import Ragged
from mmoe_rec.preprocessing.prepare import FeatureFolder
from mmoe_rec.settings.columns import SPLITS
from mmoe_rec.settings.schema import Remembering, Schema

LONGEST = 20
"""Of a list, the last so many ids: all of the shipped settings' histories."""
ROWS_AT_A_TIME = 65_536


def write_rows(prepared: FeatureFolder, schema: Schema, folder: Path, *, remembered: bool) -> None:
    """Writes all splits; remembered: with what counters and histories give, or only what a row itself says."""
    layout = prepared.layout
    left_out = set() if remembered else {n for n, each in schema.features.items() if isinstance(each, Remembering)}
    ids = [each for each in layout.ids if not each.placement and each.feature not in left_out]
    dense = [place for place, each in enumerate(layout.dense) if not each.placement and each.feature not in left_out]
    folder.mkdir(parents=True, exist_ok=True)
    tables = {table.name: table.rows for table in layout.tables}
    about = {
        "ids": {each.name: {"table": each.table, "rows": tables[each.table], "list": each.many} for each in ids},
        "numbers": len(dense),
        "tasks": [task.name for task in layout.tasks],
    }
    (folder / "inputs.json").write_text(json.dumps(about), encoding="utf-8")
    for split in SPLITS:
        for name, array in _columns(EncodedRows(prepared.split(split), layout), layout, dense).items():
            if name in ("numbers", "labels") or name in about["ids"]:  # type: ignore[operator]
                np.save(folder / f"{split}.{name}.npy", array)


def _columns(rows: EncodedRows, layout: Layout, dense: list[int]) -> dict[str, np.ndarray]:
    parts = [part for part, _ in rows.stream(ROWS_AT_A_TIME)]
    columns = {}
    for each in layout.ids:
        values = [part.encoded.ids[each.name] for part in parts]
        columns[each.name] = np.concatenate(
            [_padded(value) if isinstance(value, Ragged) else np.asarray(value, np.int64) + 1 for value in values]
        )
    columns["numbers"] = np.concatenate([part.encoded.dense[:, dense] for part in parts])
    columns["labels"] = np.concatenate([part.labels for part in parts]).astype(np.float32)
    return columns


def _padded(lists: Ragged) -> np.ndarray:
    """(N, LONGEST) int64, the last ids of each list, each 1 more than it was, then zeros."""
    lengths = np.asarray(lists.lengths, np.int64)
    ends, kept = np.cumsum(lengths), np.minimum(lengths, LONGEST)
    place = np.arange(LONGEST)
    source = (ends - kept)[:, None] + place
    inside = place < kept[:, None]
    values = np.append(np.asarray(lists.values, np.int64), 0)
    return np.where(inside, values[np.where(inside, source, -1)] + 1, 0)
