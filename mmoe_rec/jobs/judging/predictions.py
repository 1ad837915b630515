"""Rows with what a model predicts for them, as Parquet, for one's own metrics."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.atomic import atomic_file
from mmoe_rec.errors import UserError
from mmoe_rec.inference.ranking import ROW
from mmoe_rec.settings.columns import Columns

if TYPE_CHECKING:
    from mmoe_rec.evaluation.scoring import ScoredRows

FILE = "rows.parquet"


def check_predictions(folder: Path) -> None:
    """Raises UserError where a folder for predictions is a file, or holds others, which would be read along."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--predictions '{folder}' is a file; name a folder")
    others = [file.name for file in (folder.iterdir() if folder.is_dir() else ()) if file.name != FILE]
    if others:
        raise UserError(f"--predictions '{folder}' holds other files, such as '{others[0]}'; name another folder")


def write_predictions(scored: ScoredRows, columns: Columns, folder: Path) -> None:
    """Writes `user`, `request`, `candidate`, of each task and outcome `predicted_NAME` and `label_NAME` (null where it
    is not known), `score`, and `weight` where rows have one: what the command `metrics` reads.

    columns: of the log. What it does not have is left out: without candidates, `row` is the number of each in its log.
    """
    from mmoe_rec.model.score import from_logs, with_outcomes

    written = {} if scored.row is None else {ROW: scored.row}
    if columns.has_user:
        written["user"] = scored.users
    if columns.has_user or columns.request is not None:
        written["request"] = scored.requests
    if scored.candidates is not None:
        written["candidate"] = scored.candidates
    for name, values in with_outcomes(scored.predictions, scored.layout).items():
        written[f"predicted_{name}"] = pa.array(values)
    names = [*(task.name for task in scored.layout.tasks), *scored.layout.outcomes]
    for name, values in zip(names, [*scored.labels.T, *scored.outcomes.values()], strict=True):
        written[f"label_{name}"] = pa.array(values, from_pandas=True)
    written["score"] = pa.array(from_logs(scored.score))
    if scored.weights is not None:
        written["weight"] = pa.array(scored.weights)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / FILE) as path:
        pq.write_table(pa.table(written), path, compression="zstd")
