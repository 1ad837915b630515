"""The same counters by this project's engine, by Polars and by DuckDB: contestants of `tests.benchmarks.features`.

engine  memories of events, in which sorted look-ups are found (`mmoe_rec.point_in_time`), a group of counters a thread
polars  cumulative sums for each key, `join_asof` for each look-up, all in one lazy plan, its order declared
duckdb  cumulative sums for each key and known time, `ASOF JOIN` for each look-up

A trailing window is the difference of two look-ups in all three. Nothing is seen before it is known: an event an
instant after it happened, a label once it has matured. All hold the log in memory before the clock starts, sorted by
time, take `THREADS` threads, and end with NumPy arrays in the order of the log: whole numbers, which must be equal to
the last one.

The others are given more than ours: columns of the key as dense integers and labels as they count, where ours hashes
the log's own columns and reads labels by the task's rules.
"""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from mmoe_rec.features.kinds.counter import CounterFeature
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.log.reader import EventRows, Log
from mmoe_rec.log.rows import MICROSECONDS_PER_DAY, LogRows
from mmoe_rec.point_in_time.memory import NEVER
from mmoe_rec.settings.schema import Schema
from mmoe_rec.settings.sections import Settings
from tests.benchmarks.sources import LOG

THREADS = 2
# Of Complete Journey: nine look-ups, labels that mature at once and after 56 days, events of another log.
COUNTERS = (
    "product_bought",
    "product_rebought",
    "user_product_purchases",
    "user_type_purchases",
    "user_category_purchases",
)
Columns = dict[str, np.ndarray]
"""What a contestant gives: `COUNTER.rows.WINDOW`, `COUNTER.sum.WINDOW` and `COUNTER.last`, (N,) int64 each."""


@dataclass(frozen=True)
class Counter:
    """What to compute. windows: microseconds, None for all of the past; label: None where every event counts 1;
    last: whether the moment of the last positive event is wanted."""

    name: str
    source: str
    by: tuple[str, ...]
    windows: tuple[int | None, ...]
    label: str | None
    matures_after: int
    last: bool


def counters_of(schema: Schema) -> list[Counter]:
    """The named counters that a schema has, or else its first five; those of a regression are left out."""
    found = []
    for name, encoder in FeaturePipeline(schema).memory_encoders.items():
        feature = schema.features[name]
        if isinstance(feature, CounterFeature) and schema.source_task(feature).kind == "binary":
            windows = tuple(
                None if days is None else round(days * MICROSECONDS_PER_DAY) for days in feature.window_days
            )
            known = max(1, encoder.matures_after)
            source, last = feature.events or LOG, "recency" in feature.outputs
            found.append(Counter(name, source, tuple(feature.by), windows, feature.task, known, last))
    return [each for each in found if each.name in COUNTERS] or found[:5]


def missing() -> list[str]:
    """Those of the two libraries that are not installed."""
    return [name for name in ("polars", "duckdb") if find_spec(name) is None]


def load(settings: Settings) -> dict[str, LogRows]:
    """The log and its logs of events, in memory and sorted by time."""
    log = Log(settings.data.log, settings.schema_)
    streams = {LOG: log.stream()} | {name: EventRows(name, log).stream() for name in settings.schema_.events}
    found = {}
    for source, stream in streams.items():
        table = pa.concat_tables([rows.table for rows in stream], promote_options="permissive")
        rows = LogRows(table.unify_dictionaries().combine_chunks(), settings.schema_)
        times = rows.times()
        if (times[1:] < times[:-1]).any():
            rows = LogRows(rows.table.take(pa.array(np.argsort(times, kind="stable"))), settings.schema_)
        found[source] = rows
    return found


def keyed(counters: list[Counter], logs: dict[str, LogRows]) -> dict[str, pa.Table]:
    """The logs as the other contestants get them: time, label of each task (null where unobserved), and a key of each
    counter's columns as one integer."""
    codes: dict[str, dict[str, np.ndarray]] = {source: {} for source in logs}
    sizes: dict[str, int] = {}
    encoders = FeaturePipeline(logs[LOG].schema).memory_encoders
    for column in {column for each in counters for column in each.by}:
        having = [source for source in logs if logs[source].has(column)]
        values = pd.concat([pd.Series(logs[source].column(column).to_pandas()) for source in having])
        numbers, distinct = pd.factorize(values, use_na_sentinel=False)
        sizes[column] = len(distinct)
        ends = np.cumsum([len(logs[source]) for source in having])
        codes |= {s: {**codes[s], column: n} for s, n in zip(having, np.split(numbers, ends[:-1]), strict=True)}
    tables = {}
    for source, rows in logs.items():
        columns: dict[str, pa.Array] = {"time": pa.array(rows.times()), "row": pa.array(np.arange(len(rows)))}
        for each in counters:
            if source == LOG and each.label is not None:
                labels = encoders[each.name].labels(rows)
                columns[f"label.{each.label}"] = pa.array(labels.astype(np.int64), mask=labels < 0)
            if source in (LOG, each.source):
                key = np.zeros(len(rows), np.int64)
                for column in each.by:
                    key = key * sizes[column] + codes[source][column]
                columns["key." + ".".join(each.by)] = pa.array(key)
        tables[source] = pa.table(columns)
    return tables


def engine(counters: list[Counter], logs: dict[str, LogRows]) -> Callable[[], Columns]:
    """This project's engine; counters of one key share their sorted look-ups, as in a build."""
    encoders = FeaturePipeline(logs[LOG].schema).memory_encoders
    groups = {by: [each for each in counters if each.by == by] for by in dict.fromkeys(each.by for each in counters)}

    def answer(by: tuple[str, ...]) -> Columns:
        asked, found = logs[LOG].look_ups(by), {}
        for each in groups[by]:
            encoder = encoders[each.name]
            memory = encoder.extended(encoder.memory, encoder.events(logs[each.source]))
            join = memory.joined(asked)
            now = join.last()
            for window in each.windows:
                rows, label_sum = memory.totals(now, None if window is None else join.last(window))
                found[f"{each.name}.rows.{window}"] = rows.astype(np.int64)[asked.number]
                if each.label is not None:
                    found[f"{each.name}.sum.{window}"] = label_sum.astype(np.int64)[asked.number]
            if each.last:
                found[f"{each.name}.last"] = memory.last_positive_at(now)[asked.number]
        return found

    def run() -> Columns:
        with ThreadPoolExecutor(THREADS) as pool:
            return {name: column for found in pool.map(answer, groups) for name, column in found.items()}

    return run


def polars(counters: list[Counter], logs: dict[str, LogRows]) -> Callable[[], Columns]:
    """Polars' as-of joins."""
    os.environ["POLARS_MAX_THREADS"] = str(THREADS)
    import polars as pl

    frames = {source: pl.DataFrame(table) for source, table in keyed(counters, logs).items()}

    def plan(each: Counter) -> pl.LazyFrame:
        key, label = "key." + ".".join(each.by), f"label.{each.label}"
        events, last = frames[each.source].lazy(), pl.lit(0)
        known = (pl.col("time") + each.matures_after).set_sorted().alias("known")
        totals = {"rows": pl.col("time").cum_count().over(key).cast(pl.Int64)}
        if each.label is not None:
            events = events.filter(pl.col(label).is_not_null())
            totals["sum"] = pl.col(label).cum_sum().over(key)
        if each.last:
            last = pl.col("time") + each.matures_after
            if each.label is not None:
                last = pl.when(pl.col(label) > 0).then(last).forward_fill().over(key)
            totals["last"] = last
        events = events.select(key, known, **totals)

        def as_of(earlier: int, wanted: list[str]) -> pl.LazyFrame:
            asked = frames[LOG].lazy().select(key, (pl.col("time") - earlier).set_sorted().alias("at"))
            found = asked.join_asof(
                events.select(key, "known", *wanted), left_on="at", right_on="known", by=key, check_sortedness=False
            )
            return found.select(pl.col(name).fill_null(NEVER if name == "last" else 0) for name in wanted)

        sums = [name for name in totals if name != "last"]
        parts = [as_of(0, list(totals)).rename({name: f"{name} now" for name in totals})]
        parts += [
            as_of(window, sums).rename({name: f"{name} {window}" for name in sums}) for window in each.windows if window
        ]
        result = {
            f"{each.name}.{name}.{window}": pl.col(f"{name} now") - pl.col(f"{name} {window}")
            if window
            else pl.col(f"{name} now")
            for name in sums
            for window in each.windows
        }
        if each.last:
            result[f"{each.name}.last"] = pl.col("last now")
        return pl.concat(parts, how="horizontal").select(**result)

    def run() -> Columns:
        found = pl.collect_all([plan(each) for each in counters])
        return {column.name: column.to_numpy() for frame in found for column in frame.get_columns()}

    return run


def duckdb(counters: list[Counter], logs: dict[str, LogRows]) -> Callable[[], Columns]:
    """DuckDB's as-of joins."""
    import duckdb as library

    connection = library.connect(config={"threads": THREADS})
    for source, table in keyed(counters, logs).items():
        connection.register("given", table)
        connection.execute(f'CREATE TABLE "{source}" AS SELECT * FROM given')
        connection.unregister("given")

    def query(each: Counter) -> str:
        key, label = '"key.' + ".".join(each.by) + '"', f'"label.{each.label}"'
        known = f"time + {each.matures_after}"
        last = known if each.label is None else f"CASE WHEN {label} > 0 THEN {known} END"
        totals = {"rows": ("sum", "count(*)")}
        if each.label is not None:
            totals["sum"] = ("sum", f"sum({label})")
        if each.last:
            totals["last"] = ("max", f"max({last})")
        moments = ", ".join(f'{value} AS "{name}"' for name, (_, value) in totals.items())
        running = ", ".join(f'{function}("{name}") OVER before AS "{name}"' for name, (function, _) in totals.items())
        labelled = "" if each.label is None else f"WHERE {label} IS NOT NULL"
        joins, result = "", ["log.row AS row"]
        for window in sorted({0, *(window or 0 for window in each.windows)}):
            joins += f' ASOF LEFT JOIN totals "{window}" ON log.{key} = "{window}".key'
            joins += f' AND log.time - {window} >= "{window}".known'
        for window in each.windows:
            for name in totals.keys() - {"last"}:
                off = f' - coalesce("{window}"."{name}", 0)' if window else ""
                result.append(f'(coalesce("0"."{name}", 0){off})::BIGINT AS "{each.name}.{name}.{window}"')
        if each.last:
            result.append(f'coalesce("0"."last", {NEVER}) AS "{each.name}.last"')
        return (
            f"WITH moments AS (SELECT {key} AS key, {known} AS known, {moments} "
            f'FROM "{each.source}" {labelled} GROUP BY ALL), '
            f"totals AS (SELECT key, known, {running} FROM moments WINDOW before AS (PARTITION BY key ORDER BY known)) "
            f'SELECT {", ".join(result)} FROM "{LOG}" log{joins}'
        )

    def run() -> Columns:
        found: Columns = {}
        for each in counters:
            columns = connection.execute(query(each)).fetchnumpy()
            row = columns.pop("row")
            for name, column in columns.items():
                found[name] = np.empty(len(row), np.int64)
                found[name][row] = column
        return found

    return run


CONTESTANTS: Mapping[str, Callable[[list[Counter], dict[str, LogRows]], Callable[[], Columns]]] = {
    "engine": engine,
    "polars": polars,
    "duckdb": duckdb,
}


def assert_equal(one: Path, other: Path) -> int:
    """Asserts that two contestants wrote the same columns; gives their number."""
    with np.load(one) as left, np.load(other) as right:
        assert set(left) == set(right), set(left) ^ set(right)
        for name in left:
            differ = int((left[name] != right[name]).sum())
            assert not differ, f"{other.stem}: {name} differs in {differ} rows of {len(left[name])}"
        return len(left)
