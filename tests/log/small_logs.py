"""Small random interaction logs, and the shortest way from one to a fitted pipeline."""

from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.features import kinds
from mmoe_rec.features.encoder import Inputs, PointInTimeEncoder
from mmoe_rec.features.layout import EncodedInputs
from mmoe_rec.features.pipeline import FeaturePipeline, write_event_store
from mmoe_rec.log.columns import UTC_MICROSECONDS, canonicalize, column_uses
from mmoe_rec.log.rows import LogRows
from mmoe_rec.point_in_time.arrays import Ragged
from mmoe_rec.point_in_time.join import Window, in_window
from mmoe_rec.settings.schema import Schema

DAY = 86_400_000_000
START = 1_700_000_000_000_000
LATE_DAYS = 2.5

BASE: dict[str, Any] = {
    "columns": {"user": "user", "candidate": "item", "time": "time"},
    "roles": {"user": ["age"], "candidate": ["brand", "price", "tags"], "context": ["born"], "placement": ["slot"]},
    "tasks": {
        "click": {"label": "click", "objective": "engagement"},
        "liked": {
            "label": "liked",
            "objective": "satisfaction",
            "observed_when": {"column": "click", "equals": 1},
            "label_delay_days": LATE_DAYS,
        },
        "spent": {"label": "spent", "kind": "regression", "objective": "engagement"},
    },
}

ALL_KINDS: dict[str, Any] = {
    "item": {"kind": "id", "column": "item", "min_count": 3, "oov_buckets": 4},
    "brand": {"kind": "id", "column": "brand", "min_count": 1, "oov_buckets": 2},
    "tags": {"kind": "ids", "column": "tags", "min_count": 1, "max_length": 2},
    "price": {"kind": "numeric", "column": "price"},
    "price_log": {"kind": "numeric", "column": "price", "transform": "log"},
    "price_bucket": {"kind": "numeric", "column": "price", "transform": "buckets", "buckets": 5},
    "when": {"kind": "time", "timezone": "Europe/Berlin"},
    "born": {"kind": "time", "column": "born", "parts": ["age", "weekday"]},
    "user_brand": {"kind": "cross", "columns": ["user", "brand"], "buckets": 50},
    "slot": {"kind": "id", "column": "slot", "min_count": 1},
    "clicked": {"kind": "history", "task": "click", "of": "item", "length": 3},
    "liked_items": {"kind": "history", "task": "liked", "of": "item", "length": 2},
    "item_click": {
        "kind": "counter",
        "task": "click",
        "by": ["item"],
        "outputs": ["log_sum", "log_count", "rate", "recency"],
        "window_days": [None, 1, 3.5],
    },
    "user_brand_liked": {
        "kind": "counter",
        "task": "liked",
        "by": ["user", "brand"],
        "outputs": ["log_sum", "log_count", "rate", "recency"],
        "window_days": [None, 2],
    },
    "brand_spent": {"kind": "counter", "task": "spent", "by": ["brand"], "outputs": ["log_sum", "rate"]},
    "among": {
        "kind": "relative",
        "columns": ["price"],
        "counters": ["item_click_rate", "item_click_recency", "brand_spent_rate"],
        "outputs": ["rank", "fraction", "z_score", "below_max", "above_min", "length"],
        "sampled_lists": True,  # Some logs have sampling rates.
    },
    "clicked_together": {"kind": "cooccurrence", "task": "click", "last": 3, "max_events": 6, "window_days": 7},
}


def schema_of(features: dict[str, Any], **sections: Any) -> Schema:
    """A schema over the columns of `random_log`; `sections` replace those of `BASE`."""
    return kinds.parse_schema({**BASE, **sections, "features": features})


CLICKS = {"click": {"label": "click", "objective": "engagement"}}


def two_ids(**sections: Any) -> Schema:
    """A schema of two features, and of one task unless `sections` say otherwise."""
    return schema_of({"item": ALL_KINDS["item"], "brand": ALL_KINDS["brand"]}, **{"tasks": CLICKS, **sections})


def windows_of(first: float, second: float, start: float = 0) -> dict[str, tuple[int, int | None]]:
    """Training from day `start` to day `first`, validation to day `second`, test afterwards."""
    zero, left, two = (START + int(day * DAY) for day in (start, first, second))
    return {"train": (zero, left), "validation": (left, two), "test": (two, None)}


def _distinct_items(times: np.ndarray, users: np.ndarray, items: np.ndarray) -> np.ndarray:
    """The items, from -4 to 7, with the next one wherever a user would see one twice at a time."""
    seen: set[tuple[int, int, int]] = set()
    for row, place in enumerate(zip(times.tolist(), users.tolist(), strict=True)):
        while (*place, int(items[row])) in seen:
            items[row] = (items[row] + 5) % 12 - 4
        seen.add((*place, int(items[row])))
    return items


def random_log(seed: int, rows: int = 300, strings: bool = False, days: float = 10.0) -> pa.Table:
    """A log of few users and items over `days`, sorted by time, with ties in time and nulls wherever they may be."""
    rng = np.random.default_rng(seed)
    # Few distinct times, some exactly the late label's maturity apart, so that boundaries are met.
    grid = np.concatenate([rng.uniform(0, days, rows // 4), np.arange(0, days, LATE_DAYS), np.arange(0, days, 1.0)])
    times = START + np.sort((rng.choice(grid, rows) * DAY).astype(np.int64))
    users = rng.choice(np.array([-(2**63), -7, 0, 5, 2**62]), rows)
    items = _distinct_items(times, users, rng.integers(-4, 8, rows)) * 10**17
    as_id = (lambda values: pa.array([f"id {value}" for value in values])) if strings else pa.array
    click = rng.integers(0, 2, rows).astype(np.float64)
    return pa.table(
        {
            "user": as_id(users),
            "item": as_id(items),
            "time": pa.array(times).cast(UTC_MICROSECONDS),
            "click": pa.array(click, mask=rng.random(rows) < 0.1),
            "liked": pa.array(rng.integers(0, 2, rows), mask=rng.random(rows) < 0.5),
            "spent": pa.array(rng.normal(size=rows), mask=rng.random(rows) < 0.2),
            "age": pa.array(rng.integers(0, 3, rows)),
            "brand": pa.array(rng.choice(["a", "b", "ç"], rows), mask=rng.random(rows) < 0.2),
            "price": pa.array(np.exp(rng.normal(size=rows)), mask=rng.random(rows) < 0.1),
            "tags": pa.array(
                [[["x", "y", None, "z"][i] for i in rng.integers(0, 4, n)] for n in rng.integers(0, 4, rows)]
            ),
            "born": pa.array(times - rng.integers(0, DAY * 900, rows), mask=rng.random(rows) < 0.1).cast(
                UTC_MICROSECONDS
            ),
            "slot": pa.array(rng.integers(0, 3, rows)),
        }
    )


def with_requests(table: pa.Table, seed: int = 0, spread: int = 2 * DAY) -> pa.Table:
    """Rows of a user and instant as a request whose rows have later times, but for one."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({"user": table["user"].to_pylist(), "time": times_of(table)})
    number = frame.groupby(["user", "time"]).ngroup().to_numpy()
    first = frame.groupby(["user", "time"]).cumcount().to_numpy() == 0
    later = np.where(first | (rng.random(len(frame)) < 0.3), 0, rng.integers(0, spread, len(frame)))
    table = table.append_column("request", pa.array(number))
    return at_times(table, times_of(table) + later).take(pa.array(rng.permutation(len(frame))))


def at_times(table: pa.Table, times: np.ndarray) -> pa.Table:
    """The rows at other times, microseconds."""
    place = table.column_names.index("time")
    return table.set_column(place, "time", pa.array(times).cast(UTC_MICROSECONDS))


def log_rows(table: pa.Table, schema: Schema) -> LogRows:
    """The table's rows in canonical types."""
    uses = column_uses(schema)
    unit = schema.columns.time_unit
    return LogRows(pa.table({name: canonicalize(name, use, table[name], unit) for name, use in uses.items()}), schema)


def stream_of(tables: Iterable[pa.Table], schema: Schema) -> list[LogRows]:
    return [log_rows(table, schema) for table in tables]


def fit(
    table: pa.Table, schema: Schema, until: int, since: int | None = None, cuts: tuple[int, ...] = ()
) -> FeaturePipeline:
    """A pipeline fitted to a log that is cut into batches at the rows `cuts`."""
    edges = [0, *cuts, table.num_rows]
    batches = stream_of([table.slice(a, b - a) for a, b in pairwise(edges)], schema)
    return fit_in_memory(schema, batches, (since, until))


def fit_in_memory(
    schema: Schema, batches: list[LogRows], training: Window, events: Mapping[str, list[LogRows]] | None = None
) -> FeaturePipeline:
    """What a build does with files, partitions and workers, done one after the other on batches at hand."""
    pipeline = FeaturePipeline(schema)
    inside = [rows.filter(in_window(rows.times(), training)) for rows in batches]
    assert training[1] is not None
    for rows, part in zip(batches, inside, strict=True):
        pipeline.record_key_types(rows)
        pipeline.partial_fit(part, training[1])
    pipeline.finish_fit()
    remember(pipeline, batches, events)
    for encoder in pipeline.point_in_time_encoders.values():
        for part in inside:
            encoder.partial_fit_results(encoder.look_up(part))
    if pipeline.relative_encoders:
        whole = LogRows(pa.concat_tables([part.table for part in inside], promote_options="permissive"), schema)
        whole = pipeline.compare_candidates(whole)
        for encoder in pipeline.relative_encoders:
            encoder.partial_fit_results(whole.results)
    pipeline.finish_fit_results()
    return pipeline


def remember(
    pipeline: FeaturePipeline, batches: list[LogRows], events: Mapping[str, list[LogRows]] | None = None
) -> None:
    """Replaces what counters and histories remember by other logs."""
    logs = {None: batches, **(events or {})}
    fresh = FeaturePipeline(pipeline.schema).point_in_time_encoders
    for name, encoder in pipeline.point_in_time_encoders.items():
        parts = [encoder.events(rows) for rows in logs[encoder.source]]
        together = pa.concat_tables(parts, promote_options="permissive")
        encoder.store = encoder.extended(fresh[name].store, together)


def raw_results(encoder: PointInTimeEncoder, rows: LogRows) -> dict[str, np.ndarray | Ragged]:
    """What a counter or history says of rows, in full precision."""
    asked = encoder.lookups(rows)
    return {
        name: item.take(asked.inverse) if isinstance(item, Ragged) else item[asked.inverse]
        for name, item in encoder.distinct_results(encoder.store, asked).items()
    }


def save_memories(pipeline: FeaturePipeline, folder: Path, moment: int) -> None:
    """Writes what requests at `moment` or later can ask of a pipeline's memories."""
    for name, encoder in pipeline.point_in_time_encoders.items():
        write_event_store(encoder.compacted(encoder.store, moment), folder, name)


def memory_table(encoder: PointInTimeEncoder) -> pa.Table:
    """What a counter or history remembers."""
    return pa.table(encoder.store.to_columns())


def remembered(folder: Path) -> pa.Table:
    """What a folder `NAME.memory` of feature state holds."""
    return pa.concat_tables(pq.read_table(part) for part in sorted(folder.iterdir())).combine_chunks()


def times_of(table: pa.Table) -> np.ndarray:
    """(N,) int64 microseconds."""
    return table["time"].cast(pa.int64()).to_numpy()


def assert_same(left: EncodedInputs, right: EncodedInputs) -> None:
    """Both are equal to the last bit."""
    _assert_same_ids(left.ids, right.ids)
    np.testing.assert_array_equal(left.dense.view(np.uint32), right.dense.view(np.uint32))


def assert_same_inputs(left: Inputs, right: Inputs) -> None:
    """Both are equal to the last bit."""
    _assert_same_ids(left.ids, right.ids)
    assert left.dense.keys() == right.dense.keys()
    for name, numbers in left.dense.items():
        assert numbers.dtype == np.float32
        np.testing.assert_array_equal(numbers.view(np.uint32), right.dense[name].view(np.uint32), err_msg=name)


def _assert_same_ids(left: Mapping[str, np.ndarray | Ragged], right: Mapping[str, np.ndarray | Ragged]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        twin = right[name]
        if isinstance(value, Ragged):
            assert isinstance(twin, Ragged)
            np.testing.assert_array_equal(value.lengths, twin.lengths, err_msg=name)
            np.testing.assert_array_equal(value.values, twin.values, err_msg=name)
        else:
            np.testing.assert_array_equal(value, twin, err_msg=name)


def with_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    """The table with other values of a column."""
    values = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values)
    return table.set_column(table.column_names.index(name), name, values)


def with_values(table: pa.Table, name: str, changes: Mapping[int, Any]) -> pa.Table:
    """The table with other values of a column in some rows."""
    values = table[name].to_pylist()
    for row, value in changes.items():
        values[row] = value
    return with_column(table, name, pa.array(values, table[name].type))


def write_log(folder: Path, *tables: pa.Table) -> Path:
    """One Parquet file a table: 0.parquet, 1.parquet, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, table in enumerate(tables):
        pq.write_table(table, folder / f"{index}.parquet")
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    """Content of every file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
