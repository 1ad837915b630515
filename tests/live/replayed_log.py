"""A random log with late labels, ties in time and logs of events, and a model of it, to be replayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tests.inference.small_model import SmallModel
from tests.log.small_logs import ALL_KINDS, BASE, DAY, START, random_log, times_of, write_log

FROM, TO = START + 6 * DAY, START + 9 * DAY
FEATURES: dict[str, Any] = {
    **ALL_KINDS,
    "age": {"kind": "id", "column": "age", "min_count": 1},
    "seen": {"kind": "history", "events": "views", "of": "item", "length": 4},
    "seen_brand": {
        "kind": "counter",
        "events": "views",
        "by": ["user", "brand"],
        "outputs": ["positives", "rows", "recency"],
        "window_days": [None, 0.5, 2],
    },
    "carts": {"kind": "counter", "events": "carts", "by": ["item"], "window_days": [1]},
}


def replayed_log(seed: int, rows: int = 700) -> pa.Table:
    """A log in which rows of one user and time, which are a request, agree in what describes user and context."""
    table = random_log(seed, rows)
    users, times = table["user"].to_numpy(), times_of(table)
    age = (users % 7 + times // (2 * DAY)) % 3
    born = START - np.abs(users % 11) * 31 * DAY
    for name, values in (("age", pa.array(age)), ("born", pa.array(born).cast(table["born"].type))):
        table = table.set_column(table.column_names.index(name), name, values)
    return table


def drawn_events(log: pa.Table, seed: int, rows: int, time: str) -> pa.Table:
    """Events at some of the log's own times and between them; some are the same as others, some keys are null."""
    rng = np.random.default_rng(seed)
    table = log.take(pa.array(rng.integers(0, len(log), rows)))
    shift = rng.choice([0, 0, 1, -1, DAY // 3], rows)
    columns = {name: pa.array(table[name].to_pylist(), mask=rng.random(rows) < 0.05) for name in ("user", "item")}
    brand = table["brand"].combine_chunks()
    return pa.table({**columns, "brand": brand, time: pa.array(times_of(table) + shift).cast(table["time"].type)})


def model_of(work: Path, seed: int = 1, **sections: Any) -> SmallModel:
    """A model of a random log, in several files in no order, and of two logs of events."""
    log = replayed_log(seed)
    write_log(work / "views", drawn_events(log, seed, 900, "viewed_at"), drawn_events(log, seed + 1, 30, "viewed_at"))
    write_log(work / "carts", drawn_events(log, seed + 2, 200, "time"))
    events = {
        "views": {"path": str(work / "views"), "time": "viewed_at"},
        "carts": {"path": str(work / "carts"), "time": "time"},
    }
    data = {"log": str(work / "log"), "work": str(work), "events": events}
    shuffled = log.take(pa.array(np.random.default_rng(seed).permutation(len(log))))
    files = [shuffled.slice(0, 300), shuffled.slice(300)]
    return SmallModel(work, log=files, **{**BASE, "data": data, "features": FEATURES, **sections})
