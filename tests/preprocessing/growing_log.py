"""A log of interactions and one of events that grow by days, prepared and extended."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import reject
from hypothesis import strategies as st

from mmoe_rec.errors import UserError
from mmoe_rec.point_in_time.join import in_window
from mmoe_rec.preprocessing.extend import extend
from mmoe_rec.preprocessing.logs import BuildOptions
from mmoe_rec.preprocessing.prepare import Prepared, prepare
from mmoe_rec.settings.schema import Schema
from tests.log.small_logs import ALL_KINDS, DAY, START, random_log, schema_of, times_of, with_column

OF_PURCHASES = {
    "bought": {"kind": "history", "events": "purchases", "of": "item", "length": 3},
    "n": {
        "kind": "counter",
        "events": "purchases",
        "by": ["user", "brand"],
        "outputs": ["positives", "rows", "recency"],
        "window_days": [None, 1],
    },
}
FEATURES = {**ALL_KINDS, **OF_PURCHASES}
WINDOWS = {
    "train": (START, START + 5 * DAY),
    "validation": (START + 5 * DAY, START + 6 * DAY),
    "test": (START + 6 * DAY, None),
}

FIRST_DAYS = 6.5
LATER_DAYS = (
    st.lists(st.floats(FIRST_DAYS, 12), min_size=1, max_size=3, unique=True)
    .map(sorted)
    .map(lambda edges: list(zip([FIRST_DAYS, *edges], [*edges, 99], strict=True)))
)
"""Draws the first and last day of each step by which a log grows beyond its first days."""


def schema_with_purchases(features: dict, path: Path) -> Schema:
    """A schema whose features may be of the log of events in the folder `path`, too."""
    return schema_of(features, events={"purchases": {"path": str(path), "time": "bought_at"}})


def windows_of(first: float, second: float) -> dict:
    """Training up to day `first`, validation up to day `second`, test afterwards."""
    one, two = START + int(first * DAY), START + int(second * DAY)
    return {"train": (START, one), "validation": (one, two), "test": (two, None)}


def _new(item: int | str) -> int | str:
    return f"new {item}" if isinstance(item, str) else item + 5


class Growing:
    """A log and a log of events in `folder`, to which days are added; later ones have further items."""

    def __init__(self, folder: Path, seed: int = 0, rows: int = 400, days: float = 12.0, strings: bool = False):
        self.folder, self.work, self.source = folder, folder / "work", str(folder / "log")
        table = random_log(seed, rows, strings, days)
        new = times_of(table) >= START + 7 * DAY
        items = table["item"].to_pylist()
        renamed = [_new(each) if late else each for each, late in zip(items, new, strict=True)]
        self.table = with_column(table, "item", pa.array(renamed))
        rng = np.random.default_rng(seed)
        events = self.table.take(pa.array(np.sort(rng.integers(0, rows, rows // 2))))
        bought_at = times_of(events) + rng.choice([0, 1, DAY // 3], rows // 2)
        bought_at = pa.array(bought_at).cast(events["time"].type)
        self.events = events.select(["user", "item", "brand"]).append_column("bought_at", bought_at)
        # When each event is written: some come days late.
        self.written = times_of(events) + rng.choice([0, 0, DAY, 3 * DAY], rows // 2)
        self.schema = schema_with_purchases(FEATURES, folder / "events")
        self.count = 0

    def add(self, start: float, end: float) -> None:
        """Writes the days from `start` to `end` as one file of each log."""
        window = (START + int(start * DAY), START + int(end * DAY))
        rows, events = in_window(times_of(self.table), window), in_window(self.written, window)
        for name, table, wanted in (("log", self.table, rows), ("events", self.events, events)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
            # Later files do not sort last.
            path = self.folder / name / f"{100 - self.count}.parquet"
            pq.write_table(table.filter(pa.array(wanted)), path)
        self.count += 1

    @staticmethod
    def of_eight_days(folder: Path) -> "Growing":
        """With eight days, prepared."""
        log = Growing(folder)
        log.add(0, 8)
        log.prepare()
        return log

    def prepare_first_days(self, **options: object) -> Prepared:
        """With the days before `LATER_DAYS`; a drawn log that these are too few of is rejected."""
        self.add(0, FIRST_DAYS)
        try:
            return self.prepare(**options)
        except UserError as error:  # they may lack a split's rows, or a task's labels of one class
            if not re.search("split is empty|one class in training", str(error)):
                raise
            reject()

    def prepare(self, work: str = "work", windows: dict = WINDOWS, **options: object) -> Prepared:
        return prepare(self.source, self.schema, windows, self.folder / work, BuildOptions(**options))

    def extend(self, windows: dict = WINDOWS, **options: object):
        return extend(self.source, self.schema, windows, self.work, BuildOptions(**options))


def training_items(log: Growing, windows: dict, start: float, end: float) -> list:
    times = times_of(log.table)
    wanted = in_window(times, windows["train"]) & in_window(times, (START + int(start * DAY), START + int(end * DAY)))
    return log.table["item"].filter(pa.array(wanted)).to_pylist()
