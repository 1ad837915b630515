"""Logged requests and events drawn at random, and what an interaction log must hold of them, by plain loops."""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.log.columns import UTC_MICROSECONDS
from mmoe_rec.settings.sections import Settings

HOUR = 3_600_000_000
START = 1_700_000_000_000_000
NOW = START + 10_000 * HOUR
Row = dict[str, Any]
PLACED = {"kind": "id", "column": "slot", "dim": 4, "min_count": 1}


def settings(outcomes: dict[str, Any], *, request: bool = True, placed: bool = True, **columns: Any) -> Settings:
    """Settings whose labels mature late enough for all windows."""
    names = {"user": "user", "candidate": "item", "time": "time"} | ({"request": "page"} if request else {}) | columns
    features = {"item": {"kind": "id", "column": "item"}, "price": {"kind": "numeric", "column": "price"}}
    return Settings.model_validate(
        {
            "name": "served",
            "data": {"log": "log", "work_dir": "work"},
            "columns": names,
            "roles": {"candidate": ["price"], "placement": ["slot"]},
            "tasks": {
                "click": {"label": "clicked", "objective": "engagement", "label_delay_days": 1},
                "spent": {"label": "spent", "kind": "regression", "objective": "satisfaction", "label_delay_days": 1},
            },
            "features": features | ({"slot": PLACED} if placed else {}),
            "split": {"train_end": "2024-01-01", "validation_end": "2024-01-02"},
            "labels": {"wait_days": 0, **outcomes},
        }
    )


@dataclass
class World:
    """Rows of requests and of events. requests: as they are logged; events: name -> rows."""

    requests: list[Row] = field(default_factory=list)
    events: dict[str, list[Row]] = field(default_factory=dict)

    def request(self, page: Any, user: int, hour: float, items: Sequence[int], *, at: float | None = None) -> None:
        """Logs a reply with these items, best first."""
        for rank, item in enumerate(items, 1):
            served = hour if at is None else at
            self.requests.append(
                {
                    "user": user,
                    "item": item,
                    "time": START + round(hour * HOUR),
                    "price": item + served,
                    "served_request": page,
                    "served_at": START + round(served * HOUR),
                    "served_rank": rank,
                    "served_fraction": 1.0,
                    "served_artifact": "a",
                }
            )

    def event(self, name: str, user: int, hour: float, item: int, **more: Any) -> None:
        self.events.setdefault(name, []).append({"user": user, "item": item, "at": START + round(hour * HOUR), **more})

    def write(self, folder: Path, until: int | None = None, since: int | None = None, seed: int = 0) -> None:
        """Writes those rows of [since, until), by the time at which they were logged or happened, into new files."""
        rows = {"requests": (self.requests, "served_at", _REQUESTS)}
        rows |= {f"events/{name}": (item, "at", EVENT_TYPES) for name, item in self.events.items()}
        for name, (item, time, types) in rows.items():
            inside = [row for row in item if (since or 0) <= row[time] < (until or 2**62)]
            random.Random(seed).shuffle(inside)
            (folder / name).mkdir(parents=True, exist_ok=True)
            for part in range(2):
                if some := inside[part::2]:
                    number = len([*(folder / name).iterdir()])
                    write_rows(folder / name / f"file-{number}.parquet", some, types)


_REQUESTS = {"time": UTC_MICROSECONDS, "served_at": UTC_MICROSECONDS, "served_rank": pa.int32()}
EVENT_TYPES = {"at": UTC_MICROSECONDS, "amount": pa.float64()}


def write_rows(path: Path, rows: Iterable[Row], types: dict[str, pa.DataType]) -> None:
    """Writes rows as a Parquet file, with small row groups."""
    rows = list(rows)
    columns = {name: pa.array([row.get(name) for row in rows], types.get(name)) for name in rows[0]}
    pq.write_table(pa.table(columns), path, row_group_size=7)


def read_rows(out: Path) -> list[Row]:
    """All rows of an output, in the order of its files."""
    tables = [pq.read_table(path) for path in sorted(out.glob("run-*/*.parquet"))]
    rows = pa.concat_tables(tables, promote_options="permissive").to_pylist() if tables else []
    for row in rows:
        row["time"] = round(row["time"].timestamp() * 1e6)
    return rows


def naive(world: World, about: Settings, until: int) -> list[Row]:
    """The rows that are to be written of requests up to a time, by loops over all pairs of rows and events."""
    outcomes = about.labels
    first: dict[Any, int] = {}
    for row in world.requests:
        key = (row["user"], row["served_request"])
        first[key] = min(first.get(key, row["time"]), row["time"])
    kept: dict[Any, Row] = {}
    for row in world.requests:
        key = (row["user"], row["served_request"], row["item"])
        best = kept.get(key)
        if best is None or (row["served_at"], -row["served_rank"]) > (best["served_at"], -best["served_rank"]):
            kept[key] = row
    rows = [{**row, "time": first[row["user"], row["served_request"]]} for row in kept.values()]

    def belongs(name: str, among: list[Row]) -> list[tuple[Row, Row]]:
        section, actual, ids = outcomes.events[name], [], set()
        for event in sorted(world.events.get(name, []), key=lambda each: each["at"]):
            if "event_id" in event:
                if (event["user"], event["event_id"]) in ids:
                    continue
                ids.add((event["user"], event["event_id"]))
            mine = [r for r in among if r["item"] == event["item"] and r["user"] == event["user"]]
            if section.request is not None:
                mine = [r for r in mine if r["served_request"] == event[section.request]]
            mine = [r for r in mine if r["time"] <= event["at"]]
            if mine:
                actual.append((max(mine, key=lambda r: r["time"]), event))
        return actual

    if outcomes.shown is not None:
        seen: dict[int, Row] = {}
        for row, event in belongs(outcomes.shown.events, rows):
            if event["at"] - row["time"] <= outcomes.shown.length_us:
                seen.setdefault(id(row), event)
        rows = [{**row, "slot": seen[id(row)]["slot"]} for row in rows if id(row) in seen]
    elif outcomes.top is not None:
        rows = [row for row in rows if row["served_rank"] <= outcomes.top]
    for name, source in outcomes.sources.items():
        said: dict[int, list[Row]] = {}
        for row, event in belongs(source.events, rows):
            has_value = source.value is None or event[source.value] not in (None, math.nan)
            if has_value and event["at"] - row["time"] <= source.length_us:
                said.setdefault(id(row), []).append(event)
        for row in rows:
            values = [1.0 if source.value is None else item[source.value] for item in said.get(id(row), [])]
            combined = {"last": lambda v: v[-1], "first": lambda v: v[0], "sum": sum, "max": max}[source.combine]
            row[name] = combined(values) if values else source.default
    columns = ["user", "item", "time", "price", *outcomes.sources]
    columns += ["slot"] if outcomes.shown is not None else []
    named = {name: name for name in columns}
    named |= {outcomes.rank: "served_rank"} if outcomes.rank else {}
    named |= {about.columns.request: "served_request"} if about.columns.request else {}
    return [{name: row[of] for name, of in named.items()} for row in rows if row["time"] <= until]


def ordered(rows: Iterable[Row]) -> list[str]:
    """Rows in an order of their own, as text."""
    numbers = ({name: float(item) if isinstance(item, int) else item for name, item in row.items()} for row in rows)
    return sorted(repr(sorted(row.items())) for row in numbers)
