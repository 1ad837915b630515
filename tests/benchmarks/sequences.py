"""A world in which the order of a user's events decides, and what can be known of it.

Each user visits items of a few groups over and over. Whether a shown item is clicked depends on which of the user's
last visits were of its group: the last two speak against it, those before speak for it. So its mean of vectors, or a
counter, sees half of it, and the AUC of the best ranking follows from the probabilities themselves.
"""

from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.settings.sections import Settings

GROUPS, ITEMS, FAVOURITES, DAYS = 20, 400, 4, 60
WEIGHTS = np.array([-1.6, -1.6, 1.2, 1.2, 1.2, 1.2])
"""Of the last visits, the newest first, in the logit of a click on an item of their group."""
BASE, CANDIDATES, REQUESTS, VISITS = -1.0, 5, 12, 60
_DAY = 86_400_000_000
END = "1970-02-20"
"""Where test rows begin."""


def write_world(folder: Path, users: int, seed: int) -> None:
    """Writes `log` and `visits`, Parquet; the log has the probability of each label in `probability`."""
    random = np.random.default_rng(seed)
    log: dict[str, list[np.ndarray]] = {name: [] for name in ("user", "item", "time", "request", "probability")}
    visits: dict[str, list[np.ndarray]] = {name: [] for name in ("user", "item", "time")}
    of_group = ITEMS // GROUPS
    for user in range(users):
        favourites = random.choice(GROUPS, FAVOURITES, replace=False)
        groups = np.where(
            random.random(VISITS) < 0.8, random.choice(favourites, VISITS), random.integers(GROUPS, size=VISITS)
        )
        times = np.sort(random.integers(0, DAYS * _DAY, VISITS))
        visits["user"].append(np.full(VISITS, user))
        visits["item"].append(groups * of_group + random.integers(of_group, size=VISITS))
        visits["time"].append(times)
        for number, time in enumerate(np.sort(random.integers(DAYS // 6 * _DAY, DAYS * _DAY, REQUESTS))):
            last = groups[: np.searchsorted(times, time)][::-1][: len(WEIGHTS)]
            shown = np.where(
                random.random(CANDIDATES) < 0.8,
                random.choice(favourites, CANDIDATES),
                random.integers(GROUPS, size=CANDIDATES),
            )
            logit = BASE + (shown[:, None] == last) @ WEIGHTS[: len(last)]
            items = shown * of_group + random.permutation(of_group)[:CANDIDATES]
            log["user"].append(np.full(CANDIDATES, user))
            log["item"].append(items)
            log["time"].append(np.full(CANDIDATES, time))
            log["request"].append(np.full(CANDIDATES, user * REQUESTS + number))
            log["probability"].append(1 / (1 + np.exp(-logit)))
    table = {name: np.concatenate(each) for name, each in log.items()}
    table["clicked"] = (random.random(len(table["user"])) < table["probability"]).astype(np.int64)
    for name, columns in (("log", table), ("visits", {name: np.concatenate(each) for name, each in visits.items()})):
        columns["group"] = columns["item"] // of_group
        columns["time"] = columns["time"].astype("datetime64[us]")
        (folder / name).mkdir(parents=True, exist_ok=True)
        order = np.argsort(columns["time"], kind="stable")
        pq.write_table(
            pa.table({key: pa.array(each[order]) for key, each in columns.items()}), folder / name / "rows.parquet"
        )


def settings_of_world(folder: Path, of: Literal["attention", "mean", "counters"], store: str) -> Settings:
    """Settings of the world in a folder. of: how they read visits; store: address of MLflow's."""
    history = {"kind": "history", "events": "visits", "of": "group"}
    counter = {"kind": "counter", "events": "visits", "outputs": ["rows", "recency"], "window_days": [None, 1, 2, 4, 8]}
    visits: dict[str, Any] = {
        "attention": {"visited": history | {"pooling": "attention"}},
        "mean": {"visited": history},
        "counters": {
            "user_visits": counter | {"by": ["user"]},
            "user_group": counter | {"by": ["user", "group"]},
        },
    }
    tree = {
        "name": "sequences",
        "data": {
            "log": str(folder / "log"),
            "work": str(folder / of),
            "events": {"visits": {"path": str(folder / "visits"), "time": "time"}},
        },
        "columns": {"user": "user", "candidate": "item", "time": "time", "request": "request"},
        "roles": {"candidate": ["group"]},
        "tasks": {"clicked": {"label": "clicked", "objective": "engagement"}},
        "features": {name: {"kind": "id", "column": name, "min_count": 1} for name in ("item", "group")} | visits[of],
        "split": {"train_end": "1970-02-15", "validation_end": END},
        "training": {"batch_size": 512, "learning_rate": 0.003, "table_learning_rate": 0.05, "epochs": 4},
        "tracking": {"uri": store},
    }
    return Settings.model_validate(tree)


def best_of(folder: Path) -> float:
    """The expected AUC of the test rows of a world that was written to a folder, ranked by their true probabilities."""
    log = pq.read_table(folder / "log", columns=["time", "probability"]).to_pydict()
    end = datetime.fromisoformat(END)
    return best_auc(np.array([p for p, time in zip(log["probability"], log["time"], strict=True) if time >= end]))


def best_auc(probabilities: np.ndarray) -> float:
    """The expected AUC of rows ranked by their probabilities (N,): of all pairs of a click and none, weighted by how
    likely each is, the share in which the click has the higher probability; half of those with equal ones."""
    values, counts = np.unique(np.round(probabilities, 12), return_counts=True)
    clicks, others = counts * values, counts * (1 - values)
    below = np.cumsum(others) - others
    return float((clicks * (below + others / 2)).sum() / (clicks.sum() * others.sum()))
