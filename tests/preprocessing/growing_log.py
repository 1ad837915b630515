"""A log of interactions and one of events that grow by days, prepared and extended."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.point_in_time.join import in_window
from mmoe_rec.preprocessing.build_inputs import BuildInputs, BuildOptions
from mmoe_rec.preprocessing.extend import extend
from mmoe_rec.preprocessing.prepare import FeatureFolder, prepare
from mmoe_rec.settings.schema import Schema
from tests.log.small_logs import ALL_KINDS, DAY, START, random_log, schema_of, times_of, windows_of, with_column

OF_PURCHASES = {
    "bought": {"kind": "history", "events": "purchases", "of": "item", "length": 3},
    "n": {
        "kind": "counter",
        "events": "purchases",
        "by": ["user", "brand"],
        "outputs": ["log_sum", "log_count", "recency"],
        "window_days": [None, 1],
    },
    "pairs": {"kind": "cooccurrence", "events": "purchases", "last": 3, "max_events": 5},
}
FEATURES = {**ALL_KINDS, **OF_PURCHASES}
WINDOWS = windows_of(5, 6)


def schema_with_purchases(features: dict, path: Path) -> Schema:
    """A schema whose features may be of the log of events in the folder `path`, too."""
    return schema_of(features, events={"purchases": {"path": str(path), "time": "bought_at"}})


class Growing:
    """A log and a log of events in `folder`, to which days are added; later ones have further items."""

    def __init__(self, folder: Path, seed: int = 0, rows: int = 400):
        self.folder, self.work, self.source = folder, folder / "work", str(folder / "log")
        table = random_log(seed, rows, days=12.0)
        new = times_of(table) >= START + 7 * DAY
        self.table = with_column(table, "item", table["item"].to_numpy() + np.where(new, 5, 0))
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

    def prepare(self, work: str = "work", windows: dict = WINDOWS, **options: object) -> FeatureFolder:
        return prepare(BuildInputs(self.source, self.schema, windows, self.folder / work, BuildOptions(**options)))

    def extend(self, windows: dict = WINDOWS, **options: object):
        return extend(BuildInputs(self.source, self.schema, windows, self.work, BuildOptions(**options)))


def training_items(log: Growing, windows: dict, start: float, end: float) -> list:
    times = times_of(log.table)
    wanted = in_window(times, windows["train"]) & in_window(times, (START + int(start * DAY), START + int(end * DAY)))
    return log.table["item"].filter(pa.array(wanted)).to_pylist()
