"""Folders of random encoded rows over every kind of input, as a build leaves them, and the same as pandas frames."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.features import kinds
from mmoe_rec.features.layout import ID_LIST_TYPE, DenseInput, IdInput, Layout, TableSpec, TaskOutput
from mmoe_rec.preprocessing.prepare import FeatureFolder
from mmoe_rec.profiling.data_health import measure_health

ROWS = {"train": 6000, "validation": 2000, "test": 3000}
STARTS = {"train": "2024-01-03", "validation": "2024-01-20", "test": "2024-01-27"}
DAYS = {"train": 17, "validation": 7, "test": 10}
UNKNOWN, ITEMS = 4, 85  # hashed rows, and rows of the table of items with them and the missing id
EDGES = (-1.0, 0.0, 1.0)

SCHEMA = kinds.parse_schema(
    {
        "columns": {"user": "user_id", "candidate": "item_id", "time": "at"},
        "roles": {"candidate": ["tags", "price", "look", "weight"], "context": ["hour"]},
        "tasks": {
            "click": {"label": "clicked", "objective": "engagement"},
            "stars": {"label": "stars", "kind": "regression", "objective": "satisfaction"},
        },
        "features": {
            "item": {"kind": "id", "column": "item_id", "oov_buckets": UNKNOWN},
            "tags": {"kind": "ids", "column": "tags", "table": "item"},
            "user_item": {"kind": "cross", "columns": ["user_id", "item_id"], "buckets": 1000},
            "price": {"kind": "numeric", "column": "price"},
            "weight": {"kind": "numeric", "column": "weight"},
            "look": {"kind": "vector", "column": "look", "size": 2},
            "when": {"kind": "time", "parts": ["weekday"]},
            "item_click": {"kind": "counter", "task": "click", "by": ["item_id"], "outputs": ["rate"]},
        },
    }
)

LAYOUT = Layout(
    tables=(TableSpec("item", ITEMS), TableSpec("user_item", 1000), TableSpec("when_weekday", 8, feature="when")),
    ids=(
        IdInput("item", "item"),
        IdInput("tags", "item", is_list=True),
        IdInput("user_item", "user_item"),
        IdInput("when_weekday", "when_weekday", feature="when"),
    ),
    dense=(
        DenseInput("price", edges=EDGES),
        DenseInput("price_missing", feature="price"),
        DenseInput("weight", edges=EDGES),
        DenseInput("look_0", feature="look"),
        DenseInput("look_1", feature="look"),
        DenseInput("item_click_rate", edges=EDGES, feature="item_click"),
    ),
    tasks=(TaskOutput("click", "binary"), TaskOutput("stars", "regression", mean=3.0, std=1.0)),
)

Frames = dict[str, pd.DataFrame]
Change = Callable[[str, pd.DataFrame], None]


def random_frames(seed: int, rows: dict[str, int] | None = None) -> Frames:
    """Rows in which clicks follow the item, its tags and its price."""
    rng = np.random.default_rng(seed)
    taste = rng.normal(size=ITEMS)
    return {split: _frame(rng, taste, split, count) for split, count in (rows or ROWS).items()}


def _frame(rng: np.random.Generator, taste: np.ndarray, split: str, rows: int) -> pd.DataFrame:
    item = np.minimum(rng.geometric(0.05, rows) - 1, ITEMS - 1)
    tags = [rng.integers(1, ITEMS, count).tolist() for count in rng.integers(0, 4, rows)]
    missing = rng.random(rows) < 0.3
    price = np.where(missing, 0, rng.normal(size=rows)).astype(np.float32)
    look = rng.normal(size=(rows, 2)) * (rng.random((rows, 1)) > 0.2)
    tagged = np.array([taste[tag].mean() if tag else 0.0 for tag in tags])
    click = taste[item] + tagged - price + rng.logistic(size=rows) > 1
    user = rng.integers(0, 50, rows)
    seconds = np.sort(rng.integers(0, DAYS[split] * 86_400, rows))
    return pd.DataFrame(
        {
            "id.item": item,
            "id.tags": tags,
            "id.user_item": (user * 31 + item) % 1000,
            "id.when_weekday": rng.integers(1, 8, rows),
            "dense.price": price,
            "dense.price_missing": missing,
            "dense.weight": rng.exponential(size=rows).round(1),
            "dense.look_0": look[:, 0],
            "dense.look_1": look[:, 1],
            "dense.item_click_rate": taste[item] + 0.1 * rng.normal(size=rows),
            "label.click": click.astype(float),
            "label.stars": np.where(click, rng.integers(1, 6, rows), np.nan),
            "user": user,
            "candidate": [f"item {entry}" for entry in item],
            "request": np.arange(rows) // 4,
            "time": pd.Timestamp(STARTS[split], tz="UTC") + pd.to_timedelta(seconds, unit="s").as_unit("us"),
        }
    )


def write(folder: Path, frames: Frames, **manifest: object) -> FeatureFolder:
    """Writes rows as a build does, each split in two files, with further entries of the manifest."""
    for split, frame in frames.items():
        (folder / "encoded" / split).mkdir(parents=True)
        table = _table(frame)
        half = len(frame) // 2
        pq.write_table(table.slice(0, half), folder / "encoded" / split / "part-00000.parquet", row_group_size=500)
        pq.write_table(table.slice(half), folder / "encoded" / split / "part-00001.parquet", row_group_size=500)
    (folder / "encoded" / "layout.json").write_text(LAYOUT.to_json())
    rows = sum(map(len, frames.values()))
    known = {"log": "logs/x", "files": 3, "rows": rows + 5, "digest": "0", "first_request": "2024-01-03T00:00:00+00:00"}
    text = json.dumps({**known, "last_request": "2024-02-06T00:00:00+00:00", "splits": {}, **manifest})
    (folder / "manifest.json").write_text(text)
    return FeatureFolder(folder)


def health_of_frames(folder: Path, frames: Frames, **manifest: object) -> dict:
    """The health of rows that are written to a folder."""
    return measure_health("made up", write(folder, frames, **manifest), SCHEMA, folder / "database")


def changed(seed: int, change: Change) -> Frames:
    """Random rows to each split of which something is done."""
    frames = random_frames(seed)
    for split, frame in frames.items():
        change(split, frame)
    return frames


def drifting(split: str, frame: pd.DataFrame) -> None:
    """Drift in all that can drift, and half of the candidates unknown."""
    if split != "test":
        return
    for column in ("dense.price", "dense.weight", "dense.look_0", "dense.item_click_rate"):
        frame[column] += 2
    frame["id.when_weekday"] = 1 + frame["id.when_weekday"] % 3
    frame["id.user_item"] %= 3
    frame["id.tags"] = [[5 + number % 3] for number in range(len(frame))]
    frame.loc[frame.index % 100 < 51, "id.item"] = 2


def spoiling(split: str, frame: pd.DataFrame) -> None:
    """A feature that drifts, and a task without labels."""
    if split == "test":
        frame["dense.price"] += 3
        frame["label.stars"] = np.nan


def feature(health: dict, name: str) -> dict:
    """A feature's part of the health."""
    return next(item for item in health["features"] if item["name"] == name)


def part(health: dict, name: str) -> dict:
    """An input's part of the health."""
    return next(item for feature in health["features"] for item in feature["inputs"] if item["name"] == name)


def finding_messages(health: dict, check: str) -> list[str]:
    """What a check's findings are about."""
    return [finding["subject"] for finding in health["findings"] if finding["check"] == check]


def _table(frame: pd.DataFrame) -> pa.Table:
    types = {"id": pa.int32(), "dense": pa.float32(), "label": pa.float32(), "candidate": pa.string()}
    columns = {}
    for name in frame:
        kind = name.split(".")[0]
        values = frame[name].astype(np.float32) if kind == "dense" else frame[name]
        wanted = {"id.tags": ID_LIST_TYPE, "label.stars": pa.float64()}.get(name, types.get(kind))
        if kind == "time":
            values, wanted = values.dt.tz_convert(None).to_numpy(), pa.timestamp("us", tz="UTC")
        columns[name] = pa.array(values, type=wanted, from_pandas=True)
    return pa.table(columns)
