"""A log in which clicks follow users, items, recent clicks and slots, with the settings file of a small model on it."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

ROWS = 16_000
DAYS = 10
START = np.datetime64("2024-03-01T00:00:00", "us")


def learnable_log(seed: int = 0, rows: int = ROWS) -> pa.Table:
    """Requests of four candidates each, sorted by time. Tastes are the same for every seed."""
    tastes, random = np.random.default_rng(5), np.random.default_rng(seed)
    user_taste, item_taste = tastes.normal(size=(80, 2)), tastes.normal(size=(40, 2))
    item_quality = tastes.normal(size=40)
    requests = rows // 4
    times = np.sort(random.uniform(0, DAYS * 86_400e6, requests)).astype(np.int64)
    user, request = random.integers(0, 80, requests).repeat(4), np.arange(requests).repeat(4)
    item, price = random.random((requests, 40)).argsort(1)[:, :4].ravel(), random.normal(size=rows)
    slot = np.tile(np.arange(4), requests)
    logit = 1.2 * (user_taste[user] * item_taste[item]).sum(1) + item_quality[item] - 0.5 * price - 0.3 * slot
    click = logit + random.logistic(size=rows) > 0.5
    liked = item_quality[item] + 0.5 * price + random.logistic(size=rows) > 0
    return pa.table(
        {
            "request": request,
            "user": user,
            "item": item,
            "time": pa.array(START + times.repeat(4).astype("timedelta64[us]"), pa.timestamp("us", tz="UTC")),
            "price": price,
            "slot": slot,
            "click": click.astype(np.int8),
            "liked": pa.array(liked.astype(np.int8), mask=~click),
        }
    )


def settings_tree(folder: Path, **sections: Any) -> dict[str, Any]:
    """Settings whose log, work folder and MLflow store lie in a folder; `sections` replace whole sections."""
    return {
        "name": "learnable",
        "data": {"log": str(folder / "log"), "work_dir": str(folder / "work")},
        "columns": {"request": "request", "user": "user", "candidate": "item", "time": "time"},
        "roles": {"user": ["user"], "candidate": ["item", "price"], "placement": ["slot"]},
        "tasks": {
            "click": {"label": "click", "objective": "engagement"},
            "liked": {"label": "liked", "objective": "satisfaction", "observed_when": {"column": "click", "equals": 1}},
        },
        "features": {
            "user": {"kind": "id", "column": "user", "dim": 8},
            "item": {"kind": "id", "column": "item", "dim": 8},
            "price": {"kind": "numeric", "column": "price"},
            "slot": {"kind": "id", "column": "slot", "dim": 4},
            "clicked": {"kind": "history", "task": "click", "of": "item", "length": 5},
            "item_click": {"kind": "counter", "task": "click", "by": ["item"]},
        },
        "split": {"train_end": "2024-03-08", "validation_end": "2024-03-09T12:00:00"},
        "model": {
            "bottom": {"units": [16], "cross_layers": 1, "cross_rank": 8},
            "experts": {"count": 3, "units": [8]},
            "towers": {"units": [4]},
            "placement": {"units": [4], "dropout": 0.3},
        },
        "training": {
            "device": "cpu",
            "precision": "fp32",
            "matmul_backend": "blas",
            "table_backend": "fbgemm",
            "threads": 1,
            "batch_size": 128,
            "learning_rate": 0.01,
            "table_learning_rate": 0.1,
            "epochs": 2,
        },
        "evaluation": {"resamples": 50},
        "tracking": {"uri": f"sqlite:///{folder / 'mlflow.db'}"},
        **sections,
    }


def write_files(folder: Path, **sections: Any) -> Path:
    """The log in two files and the settings file, whose path is given."""
    (folder / "log").mkdir(parents=True, exist_ok=True)
    log = learnable_log()
    pq.write_table(log.slice(0, ROWS // 2), folder / "log" / "a.parquet")
    pq.write_table(log.slice(ROWS // 2), folder / "log" / "b.parquet")
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(settings_tree(folder, **sections)), encoding="utf-8")
    return path
