"""A small random plain table: no users, candidates or times unless asked for."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mmoe_rec.settings.sections import Settings
from tests.log.small_logs import write_log

SPLIT_VALUES = {"train": [1, 2], "validation": [3], "test": [4]}


def plain_table(seed: int, rows: int = 400) -> pa.Table:
    """Rows of a label that a number and a word tell something of, and of one that is known of some rows only.

    fold: 1 to 4, see `SPLIT_VALUES`; weight: above 0; group: of about four rows, all of one fold; person: of few, in
    all folds.
    """
    random = np.random.default_rng(seed)
    x, word = random.normal(size=rows), random.integers(0, 3, rows)
    label = (random.random(rows) < 1 / (1 + np.exp(-(x + word - 1)))).astype(np.int8)
    second = (random.random(rows) < 0.4).astype(np.float64)
    group = random.permutation(np.arange(rows) // 4)
    return pa.table(
        {
            "x": pa.array(x, mask=random.random(rows) < 0.1),
            "word": pa.array(np.array(["a", "b", "c"])[word]),
            "code": pa.array(random.integers(-5, 5, rows)),
            "label": pa.array(label),
            "other": pa.array(np.where(random.random(rows) < 0.2, np.nan, second), from_pandas=True),
            "fold": pa.array(random.integers(1, 5, rows // 4 + 1)[group]),
            "weight": pa.array(random.choice([0.25, 1.0, 7.5], rows)),
            "group": pa.array(group),
            "person": pa.array([f"p{integer}" for integer in random.integers(0, 20, rows)]),
        }
    )


def plain_settings(work: Path, *tables: pa.Table, **sections: Any) -> Settings:
    """Settings of a plain table, which is written to `work`/log, a file a table; `sections` replace those of here."""
    write_log(work / "log", *(tables or [plain_table(0)]))
    return Settings.model_validate(
        {
            "name": "plain",
            "data": {"log": str(work / "log"), "work_dir": str(work)},
            "columns": {},
            "split": {"column": "fold", **SPLIT_VALUES},
            "roles": {"candidate": ["x", "word", "code"]},
            "tasks": {
                "label": {"label": "label", "objective": "engagement"},
                "other": {"label": "other", "objective": "satisfaction"},
            },
            "features": {
                "x": {"kind": "numeric", "column": "x"},
                "word": {"kind": "id", "column": "word", "dim": 4, "min_count": 1},
                "code": {"kind": "id", "column": "code", "dim": 4, "min_count": 1},
            },
            "model": {"bottom": {"units": [16]}, "experts": {"count": 2, "units": [8]}, "towers": {"units": [4]}},
            "training": {"batch_size": 32, "epochs": 3, "learning_rate": 0.01, "device": "cpu", "precision": "fp32"},
            "evaluation": {"resamples": 50},
            "serving": {"matmul_backend": "blas"},
            **sections,
        }
    )
