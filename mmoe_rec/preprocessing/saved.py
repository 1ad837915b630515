"""What a build keeps beside its features: counts for later days, latest values, and its manifest."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.features.latest import LatestParts
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.log.checks import format_time
from mmoe_rec.log.columns import UTC_MICROSECONDS
from mmoe_rec.log.rows import LogRows
from mmoe_rec.preprocessing.added.taken import Taken
from mmoe_rec.preprocessing.count import Counted, merged
from mmoe_rec.preprocessing.logs import Logs
from mmoe_rec.preprocessing.requests import Requests
from mmoe_rec.preprocessing.splits import SplitCounts
from mmoe_rec.settings.schema import Schema

# For those that come while features are built, and for those who would build them while they are read.
BUILD, ADVICE = "a build of features", "set `data.work` to another folder"


def save_counts(pipeline: FeaturePipeline, folder: Path) -> None:
    """Writes what a pipeline was fitted from, one file each."""
    for name, counts in pipeline.counts.items():
        pq.write_table(counts.to_table(), folder / f"{name}.parquet", compression="zstd")


def load_counts(pipeline: FeaturePipeline, folder: Path) -> None:
    """Adds what `save_counts` wrote to the counts of a pipeline of the same schema."""
    for name, counts in pipeline.counts.items():
        counts.merge(type(counts).from_table(pq.read_table(folder / f"{name}.parquet")))


def save_latest(counted: Counted, folder: Path) -> None:
    """Writes the latest attributes of users and candidates, and beside them the time of each."""
    for name, parts in (("user", counted.users), ("candidate", counted.candidates)):
        assert parts is not None
        latest = parts.finish()
        pq.write_table(latest.table, folder / f"latest.{name}.parquet", compression="zstd")
        times = pa.table({"time": pa.array(latest.times)})
        pq.write_table(times, folder / f"latest.{name}.times.parquet", compression="zstd")


def add_latest(counted: Counted, schema: Schema, folder: Path, last: int) -> None:
    """Adds the latest attributes that `save_latest` wrote to what was counted since.

    last: microseconds of the last request before: their time where there is none, as an earlier version wrote none.
    """
    for role in ("user", "candidate"):
        old = pq.read_table(folder / f"latest.{role}.parquet")
        path = folder / f"latest.{role}.times.parquet"
        times = pq.read_table(path)["time"].to_numpy() if path.is_file() else np.full(old.num_rows, last)
        earlier = LatestParts(schema, role)
        moments = pa.array(times).cast(UTC_MICROSECONDS)
        earlier.add(LogRows(old.append_column(schema.columns.time, moments), schema))
        if role == "user":
            counted.users = merged(counted.users, earlier)
        else:
            counted.candidates = merged(counted.candidates, earlier)


def describe(
    logs: Logs, taken: Taken, counted: Counted, requests: Requests, splits: dict[str, SplitCounts]
) -> dict[str, Any]:
    """What a manifest says of the logs, as far as they were taken in, and of what was encoded."""
    log, *events = taken.logs
    return {
        "log": logs.log.source,
        "digest": log.digest,
        "files": len(log.files),
        "rows": log.rows,
        "events": {
            each.name: {"files": len(its.files), "rows": its.rows}
            for each, its in zip(logs.events, events, strict=True)
        },
        "left_out": [{"file": each.address, "reason": each.reason} for each in taken.left_out],
        "unchecked": logs.options.unchecked,
        "first_request": format_time(counted.first[0]) if logs.schema.columns.has_time else None,
        "last_request": format_time(counted.last[0]) if logs.schema.columns.has_time else None,
        "request_microseconds": [counted.first[0], counted.last[0]],
        "requests": None if logs.schema.columns.request is None else requests.describe(),
        "splits": {name: asdict(each) for name, each in splits.items()},
    }


def vocabularies(pipeline: FeaturePipeline) -> dict[str, dict[str, int]]:
    """Of each vocabulary, the ids that training rows held and those that have a row of their own."""
    return {
        name: {"distinct": owner.counts.to_table().num_rows, "known": len(owner.vocabulary.ids)}
        for name, owner in pipeline.owners.items()
    }
