"""What tests of scoring share."""

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.inference.batch_scoring import ScoredLog, score_log


def write_finely(folder: Path, *tables: pa.Table) -> Path:
    """One Parquet file a table, in row groups of few rows."""
    folder.mkdir(parents=True)
    for index, table in enumerate(tables):
        pq.write_table(table, folder / f"{index}.parquet", row_group_size=30)
    return folder


def read(folder: Path) -> pd.DataFrame:
    """The scored rows, in order."""
    return pd.concat([pq.read_table(path).to_pandas() for path in sorted(folder.glob("part-*.parquet"))])


def scored(*arguments: Any, **options: Any) -> tuple[pd.DataFrame, ScoredLog]:
    """The rows that `score_log` writes."""
    done = score_log(*arguments, **options)
    return read(done.folder), done
