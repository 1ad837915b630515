"""Small logs drawn at random, with all that a log may hold, and the features that are asked of them.

A log comes in stages: the files of the first build, then those of each extension by days.
"""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

DAY = 86_400_000_000
START = 1_700_000_000_000_000
# The sampling rate is kept with encoded rows as it is, so it can tell them apart.
COLUMNS = {"user": "user", "candidate": "item", "time": "time", "sampling_rate": "row"}
ROW_SHARE = 1 / 1024
TASKS = ("click", "liked", "spent")


@dataclass
class DrawnLog:
    """settings: of a schema; log, events: all rows, with the `stage` in which each is written, in the order of files;
    paths: the file of each row of both; windows: of the splits, microseconds; again: stage -> log -> how
    files of the stages before are delivered again."""

    seed: int
    settings: dict[str, Any]
    log: pd.DataFrame
    events: pd.DataFrame
    types: dict[str, pa.DataType]
    windows: dict[str, tuple[int | None, int | None]]
    options: dict[str, Any]
    stages: int
    row_group: int = 7
    small: dict[str, int] = field(default_factory=dict)
    again: dict[int, dict[str, str]] = field(default_factory=dict)

    def write(self, folder: Path, stage: int) -> None:
        """Writes the files of a stage."""
        for name, table in (("log", self.log), ("events", self.events)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            rows = table[table["stage"] == stage]
            columns = [column for column in rows.columns if column not in ("stage", "file")]
            whole = pa.table({item: pa.array(_nulls(rows[item]), self.types[item]) for item in columns})
            for path, places in rows.reset_index(drop=True).groupby("file").indices.items():
                file = folder / name / f"{path}.parquet"
                pq.write_table(whole.take(pa.array(places)), file, row_group_size=self.row_group)

    def deliver_again(self, folder: Path, stage: int) -> None:
        """Delivers files of the stages before again, beside those of this stage."""
        rng = np.random.default_rng([self.seed, 3, stage])
        for name, table in (("log", self.log), ("events", self.events)):
            way, place = self.again.get(stage, {}).get(name), folder / name
            of_stage = {f"{path}.parquet" for path in table["file"][table["stage"] == stage]}
            new = [path for path in sorted(place.iterdir()) if path.name in of_stage]
            old = [path for path in sorted(place.iterdir()) if path.name not in of_stage]
            if old and way is not None:
                self._deliver(rng, way, old, new, [pq.read_table(path) for path in old])

    def _deliver(
        self, rng: np.random.Generator, way: str, old: list[Path], new: list[Path], before: list[pa.Table]
    ) -> None:
        left, place = int(rng.integers(len(old))), old[0].parent
        for path in old if way == "time" else ():
            os.utime(path)
        if way == "name":
            old[left].rename(place / f"same bytes {old[left].name}")
        if way == "copy":
            shutil.copyfile(old[left], place / f"same bytes {old[left].name}")
        rows = before[left] if way == "some" else pa.concat_tables(before)
        rows = rows.take(pa.array(rng.permutation(len(rows))))
        if way == "some":
            pq.write_table(rows.slice(0, int(rng.integers(1, len(rows) + 1))), place / f"again {old[left].name}")
        if way == "split":
            for number, start in enumerate(range(0, len(rows), 9)):
                pq.write_table(rows.slice(start, 9), place / f"again {number} {old[left].name}")
        if way == "compacted":
            rows = pa.concat_tables([rows, *map(pq.read_table, new)])
            pq.write_table(rows, place / f"all {old[left].name}", row_group_size=self.row_group)
        for path in [*old, *new] if way == "compacted" else old if way == "split" and rng.random() < 0.5 else ():
            path.unlink()


def draw(seed: int) -> DrawnLog:
    """The log of a seed."""
    rng = np.random.default_rng(seed)
    stages = int(rng.choice([1, 2, 3], p=[0.7, 0.25, 0.05]))
    settings = _settings(rng, stages)
    log = _log(rng, settings)
    first = _first_times(log, settings["columns"])
    moments = np.unique(first)
    # The first build has rows in each split.
    shares = np.array([0.6, 0.8]) if stages == 1 else np.array([0.3, 0.4])
    train, validation = (int(moments[place]) for place in np.maximum(shares * len(moments), [1, 2]).astype(int))
    windows: dict[str, tuple[int | None, int | None]] = {
        "train": (None if rng.random() < 0.5 else int(moments[0]) + 1, train),
        "validation": (train, validation),
        "test": (validation, None if stages > 1 or rng.random() < 0.5 else int(moments[-1])),
    }
    log["stage"] = _stages(rng, log, settings["columns"], first, stages)
    events = _events(rng, log)
    events["stage"] = np.minimum(rng.integers(0, stages, len(events)), stages - 1)
    _ask_for_more_of_events(seed, settings)
    settings["features"]["pairs"] = _cooccurrence(np.random.default_rng([seed, 7]))
    log, events = (_in_files(rng, item) for item in (log, events))
    options = {
        "workers": int(rng.choice([1, 2])),
        "on_duplicates": str(rng.choice(["error", "keep"])),
        "rows_in_memory": int(rng.choice([8, 16, 40, 10_000], p=[0.05, 0.2, 0.25, 0.5])),
    }
    small = {
        "batch": int(rng.choice([5, 16, 1000])),
        "part": int(rng.choice([10, 30, 1000], p=[0.15, 0.25, 0.6])),
        "block": int(rng.choice([13, 40])),
    }
    group = int(rng.choice([3, 7, 1000]))
    again = _again(np.random.default_rng([seed, 3]), stages, options["on_duplicates"])
    return DrawnLog(seed, settings, log, events, _types(log), windows, options, stages, group, small, again)


def _again(rng: np.random.Generator, stages: int, duplicates: str) -> dict[int, dict[str, str]]:
    ways = {name: ["time", "name", "copy"] for name in ("log", "events")}
    if duplicates == "error" and rng.random() < 0.5:  # Nothing tells events that come again.
        ways["log"] = ["some", "split", "compacted"]
    drawn = {stage: {name: _pick(rng, item) for name, item in ways.items()} for stage in range(1, stages)}
    return {stage: item for stage, item in drawn.items() if rng.random() < 0.6}


def _settings(rng: np.random.Generator, stages: int) -> dict[str, Any]:
    columns = dict(COLUMNS)
    kind = rng.choice(["none", "log", "log", "user"])
    if kind != "none":
        columns |= {"request": "request", "request_scope": str(kind)}
    late = [0, 0, 0.5, 1.25, 3, 1 / 86_400]
    liked: dict[str, Any] = {"label": "liked", "objective": "satisfaction", "label_delay_days": _pick(rng, late)}
    liked |= _pick(
        rng,
        [
            {},
            {"conditional_on": "click"},
            {"conditional_on": "click"},
            {"observed_when": {"column": "click", "equals": 1}},
        ],
    )
    spent = {"label": "spent", "kind": "regression", "objective": "engagement", "label_delay_days": _pick(rng, late)}
    spent |= _pick(rng, [{}, {"observed_when": {"column": "answered", "equals": _pick(rng, [True, 1])}}])
    click = {"label": "click", "objective": "engagement", "label_delay_days": _pick(rng, [0, 0, 0, 0.75])}
    features: dict[str, Any] = {
        # Where days are added, no id becomes known later: a history remembers the rows that ids had.
        "item": {
            "kind": "id",
            "column": "item",
            "min_count": 1000 if stages > 1 else _pick(rng, [1, 3]),
            "oov_buckets": 3,
        }
    }
    for number in range(2):
        features[f"counter{number}"] = _counter(rng)
    features["history"] = _history(rng)
    return {
        "columns": columns,
        "roles": {"candidate": ["brand"]},
        "tasks": {"click": click, "liked": liked, "spent": spent},
        "features": features,
        "events": {"bought": {"path": "", "time": "bought_at"}},
    }


def _counter(rng: np.random.Generator) -> dict[str, Any]:
    by = _pick(rng, [["user"], ["item"], ["brand"], ["user", "brand"], ["brand", "item"]])
    counter: dict[str, Any] = {"kind": "counter", "by": by}
    source = _pick(rng, [*TASKS, "liked", "bought"])
    outputs = ["log_sum", "log_count", "rate", "recency"]
    if source == "bought":
        counter["events"] = "bought"
        outputs.remove("rate")
    else:
        counter["task"] = source
    chosen = [output for output in outputs if rng.random() < 0.7]
    if chosen:
        counter["outputs"] = chosen
    windows = [item for item in (None, 1, 0.5, 2.25, 1 / 86_400_000_000) if rng.random() < 0.5]
    if windows:
        counter["window_days"] = windows
    if rng.random() < 0.5:
        counter["smoothing"] = float(rng.choice([0.5, 3.0]))
    return counter


def _history(rng: np.random.Generator) -> dict[str, Any]:
    source = _pick(rng, [*TASKS, "bought"])
    history = {"kind": "history", "of": "item", "length": int(rng.integers(1, 5))}
    history["events" if source == "bought" else "task"] = source
    if source == "spent" or rng.random() < 0.2:
        history["min_label"] = _pick(rng, [0.0, 1.0, 0.5])
    return history


def _cooccurrence(rng: np.random.Generator) -> dict[str, Any]:
    source = _pick(rng, [*TASKS, "bought"])
    last = int(rng.integers(1, 5))
    pairs = {"kind": "cooccurrence", "last": last, "max_events": last + int(rng.integers(0, 5))}
    pairs["events" if source == "bought" else "task"] = source
    if source == "spent" or rng.random() < 0.5:
        pairs["min_label"] = _pick(rng, [0.0, 1.0, 0.5])
    if rng.random() < 0.4:
        pairs["window_days"] = _pick(rng, [2.25, 1, 0.5, 1 / 86_400_000_000])
    return pairs


def _log(rng: np.random.Generator, settings: dict[str, Any]) -> pd.DataFrame:
    requests = int(rng.integers(12, 28))
    strings = rng.random() < 0.3
    late = sorted({round(task["label_delay_days"] * DAY) for task in settings["tasks"].values()})
    # Few different times, some a label's maturity or a window apart, or a microsecond beside that.
    grid = rng.integers(0, 6 * DAY, 8)
    steps = [*late, 1, DAY, DAY // 2, round(2.25 * DAY)]
    grid = np.concatenate([grid, grid[:5] + rng.choice(steps, 5), grid[:4] + rng.choice(steps, 4) + 1])
    users = rng.choice([-(2**63), -7, 0, 5, 2**62], int(rng.integers(1, 5)), replace=False)
    items = np.arange(-2, 6) * 10**17
    rows = []
    taken: set[Any] = set()
    for number in range(requests):
        user, time = int(rng.choice(users)), START + int(rng.choice(grid))
        if "request" not in settings["columns"] and (user, time) in taken:
            continue
        taken.add((user, time))
        wide = rng.random() < 0.5
        for item in rng.choice(items, int(rng.integers(1, 5)), replace=False):
            later = int(rng.choice([0, 1, DAY // 24, DAY // 2])) if wide and "request" in settings["columns"] else 0
            rows.append({"user": user, "request": number, "item": int(item), "time": time + later})
    log = pd.DataFrame(rows)
    if settings["columns"].get("request_scope") == "user":
        log["request"] = log.groupby("user")["request"].transform(lambda each: pd.factorize(each)[0])
    count = len(log)
    if strings:
        for column in ("user", "request", "item"):
            log[column] = [f"id {value}" for value in log[column]]
    log["brand"] = _with_nulls(rng, rng.choice(["a", "b", "ç"], count), 0.2)
    log["click"] = _with_nulls(rng, rng.integers(0, 2, count).astype(float), _pick(rng, [0, 0.1]))
    log["liked"] = _with_nulls(rng, rng.integers(0, 2, count).astype(float), _pick(rng, [0, 0.3]))
    log["spent"] = _with_nulls(
        rng, _pick(rng, [rng.integers(-8, 24, count) / 8, 1000 * rng.normal(size=count)]), _pick(rng, [0, 0.3])
    )
    log["answered"] = _with_nulls(rng, rng.integers(0, 2, count).astype(float), 0.1)
    return log


def _first_times(log: pd.DataFrame, columns: dict[str, str]) -> np.ndarray:
    if "request" not in columns:
        return log["time"].to_numpy()
    keys = ["user", "request"] if columns["request_scope"] == "user" else ["request"]
    return log.groupby(keys)["time"].transform("min").to_numpy()


def _stages(
    rng: np.random.Generator, log: pd.DataFrame, columns: dict[str, str], first: np.ndarray, stages: int
) -> np.ndarray:
    """Requests in the order of their times, one stage after the other; a few rows of one come a stage late."""
    if stages == 1:
        return np.zeros(len(log), int)
    edges = np.quantile(first, np.linspace(0.6, 1, stages)[:-1])
    stage = np.searchsorted(edges, first, side="left")
    if "request" in columns and rng.random() < 0.5:
        late = (log["time"].to_numpy() > first) & (rng.random(len(log)) < 0.3)
        stage = np.minimum(stage + late, stages - 1)
    return stage


def _events(rng: np.random.Generator, log: pd.DataFrame) -> pd.DataFrame:
    events = log.iloc[rng.integers(0, len(log), 25)][["user", "item", "brand", "time"]].reset_index(drop=True)
    events["bought_at"] = events.pop("time") + rng.choice([0, 0, -1, 1, DAY // 3], len(events))
    for column in ("user", "item", "brand"):
        events[column] = _with_nulls(rng, events[column].to_numpy(object), 0.05)
    return events


def _ask_for_more_of_events(seed: int, settings: dict[str, Any]) -> None:
    """Of the history: an attribute, some with different ids of one item, and what was shown but not taken."""
    rng = np.random.default_rng([seed, 6])  # the other draws of a seed stay what they were
    history = settings["features"]["history"]
    if rng.random() < 0.6:
        item = settings["features"]["item"]
        settings["features"] = {"brand": item | {"column": "brand", "oov_buckets": 2}, **settings["features"]}
        history["attributes"] = ["brand"]
    if "task" in history and rng.random() < 0.5:
        history["min_label"] = 0.0  # what was shown, taken or not


def _in_files(rng: np.random.Generator, table: pd.DataFrame) -> pd.DataFrame:
    """Rows in any order in any number of files; the names of later stages do not sort last. A number of each row, which
    no feature reads, keeps two files of the same events from being the same file."""
    table = table.assign(
        file=[f"{n}-{90 - stage}" for n, stage in zip(rng.integers(0, 3, len(table)), table["stage"], strict=True)]
    )
    table = table.sample(frac=1, random_state=int(rng.integers(2**31))).sort_values("file", kind="stable")
    table = table.reset_index(drop=True)
    return table.assign(row=ROW_SHARE * np.arange(1, len(table) + 1))


def _types(log: pd.DataFrame) -> dict[str, pa.DataType]:
    key = pa.string() if isinstance(log["user"].iloc[0], str) else pa.int64()
    time = pa.timestamp("us", tz="UTC")
    numbers = dict.fromkeys(("click", "liked", "spent", "answered"), pa.float64())
    keys = dict.fromkeys(("user", "item", "request"), key)
    return {**numbers, **keys, "brand": pa.string(), "time": time, "bought_at": time, "row": pa.float64()}


def _pick(rng: np.random.Generator, values: list[Any]) -> Any:
    return values[int(rng.integers(len(values)))]


def _with_nulls(rng: np.random.Generator, values: np.ndarray, share: float) -> np.ndarray:
    result = np.array(values, object)
    result[rng.random(len(result)) < share] = None
    return result


def _nulls(values: pd.Series) -> list[Any]:
    # Missing numbers are NaN, which is not itself.
    return [None if value != value else value for value in values.tolist()]  # noqa: PLR0124
