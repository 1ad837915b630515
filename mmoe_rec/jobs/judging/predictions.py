"""Rows with what a model predicts for them, as Parquet, for one's own metrics."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.atomic import atomic_file
from mmoe_rec.errors import UserError

if TYPE_CHECKING:
    from mmoe_rec.evaluation.scoring import Scored

FILE = "rows.parquet"


def check_predictions(folder: Path) -> None:
    """Raises UserError where a folder for predictions is a file, or holds others, which would be read along."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--predictions '{folder}' is a file; name a folder")
    others = [file.name for file in (folder.iterdir() if folder.is_dir() else ()) if file.name != FILE]
    if others:
        raise UserError(f"--predictions '{folder}' holds other files, such as '{others[0]}'; name another folder")


def write_predictions(scored: Scored, folder: Path) -> None:
    """Writes `user`, `request`, `candidate` (where there is one), of each task and outcome `predicted_NAME` and
    `label_NAME` (null where it is not known), `score`, and `weight` where rows have one: what the command `metrics`
    reads."""
    from mmoe_rec.model.score import from_logs, with_outcomes

    columns = {"user": scored.users, "request": scored.requests}
    if scored.candidates is not None:
        columns["candidate"] = scored.candidates
    for name, values in with_outcomes(scored.predictions, scored.layout).items():
        columns[f"predicted_{name}"] = pa.array(values)
    names = [*(task.name for task in scored.layout.tasks), *scored.layout.outcomes]
    for name, values in zip(names, [*scored.labels.T, *scored.outcomes.values()], strict=True):
        columns[f"label_{name}"] = pa.array(values, from_pandas=True)
    columns["score"] = pa.array(from_logs(scored.score))
    if scored.weights is not None:
        columns["weight"] = pa.array(scored.weights)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / FILE) as path:
        pq.write_table(pa.table(columns), path, compression="zstd")
