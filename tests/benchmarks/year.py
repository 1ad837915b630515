"""python -m tests.benchmarks.year
python -m tests.benchmarks.year --days 120

A year of daily extensions of a log whose users and candidates come and go: does `forget_after_days` bound memory,
and what does it cost in AUC? Two folders of features, one with such a limit, are built of the first
60 days and extended by each further one. Told are, by day, what counters and histories remember, in memory (without
indexes) and on disk; the other files but encoded rows; and what a process holds that answers requests by it, with
indexes and latest attributes, beyond one that remembers nothing. And the AUC, on the last 60 days' clicks, of a
logistic regression on the counters that was fitted to the first days. Users want some candidates more than others,
which only the counter of user and candidate together can tell.

The last line is JSON. Takes a few minutes.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

DAY = 86_400_000_000
START = 1_700_006_400_000_000
FIRST = 60  # days of the build, and of the last ones that AUC is taken of
TOLD = 30  # days between two lines about memory
GIVEN_BACK = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "32768", "ARROW_DEFAULT_MEMORY_POOL": "system"}
"""Environment of a process whose memory is looked at: what it frees goes back to the system."""
REQUESTS, SHOWN, FAVOURITES = 500, 8, 8  # a day, in each, of each user
USERS, CANDIDATES = 1_500, 300  # at any time
USER_DAYS, CANDIDATE_DAYS = 40.0, 60.0  # of a life
FEATURES = ("pair", "of_user", "of_candidate", "clicked")
LIMITS: dict[str, dict[str, dict[str, int]]] = {
    "forgetting": {name: {"forget_after_days": 45} for name in FEATURES},
    "all": {name: {} for name in FEATURES},
}
COUNTERS: dict[str, list[str]] = {"pair": ["user", "candidate"], "of_user": ["user"], "of_candidate": ["candidate"]}


class Shop:
    """Users and candidates that come and go, day after day, and what is clicked."""

    def __init__(self, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self._ids = 0
        self._candidates, self._quality, self._gone_candidates = self._new(CANDIDATES, CANDIDATE_DAYS)
        self._users, self._mood, self._gone_users = self._new(USERS, USER_DAYS)
        self._favourites = self._rng.integers(0, CANDIDATES, (USERS, FAVOURITES))
        self._day = 0

    def _new(self, count: int, days: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, a number that clicks depend on, and how many days they stay."""
        self._ids += count
        ids = np.arange(self._ids - count, self._ids)
        return ids, self._rng.normal(size=count), self._rng.exponential(days, count)

    def _replace(self) -> None:
        """Those that are gone, by new ones. Whoever wanted a candidate that is gone wants the one in its place."""
        for ids, numbers, gone, days in (
            (self._candidates, self._quality, self._gone_candidates, CANDIDATE_DAYS),
            (self._users, self._mood, self._gone_users, USER_DAYS),
        ):
            over = np.flatnonzero(gone < self._day)
            ids[over], numbers[over], gone[over] = self._new(len(over), days)
            gone[over] += self._day
            if ids is self._users:
                self._favourites[over] = self._rng.integers(0, CANDIDATES, (len(over), FAVOURITES))

    def day(self) -> pa.Table:
        """The rows of the next day."""
        self._replace()
        rng = self._rng
        times = START + self._day * DAY + np.sort(rng.choice(DAY // 1000, REQUESTS, replace=False)) * 1000
        user = rng.integers(0, USERS, REQUESTS)
        shown = rng.integers(0, CANDIDATES, (REQUESTS, SHOWN))
        liked = np.argsort(rng.random((REQUESTS, FAVOURITES)), axis=1)[:, : SHOWN // 2]
        shown[:, : SHOWN // 2] = np.take_along_axis(self._favourites[user], liked, axis=1)
        user, times, candidate = np.repeat(user, SHOWN), np.repeat(times, SHOWN), shown.ravel()
        # What a user thinks of a candidate, the same whenever they meet.
        pair = self._users[user] * 1_000_003 + self._candidates[candidate]
        taste = np.sin(pair * 12.9898) * 43758.5453
        taste = 3 * (taste - np.floor(taste)) - 1.5
        logit = -1.5 + 0.3 * self._mood[user] + 0.5 * self._quality[candidate] + 1.2 * taste
        table = pa.table(
            {
                "user": self._users[user],
                "candidate": self._candidates[candidate],
                "time": pa.array(times).cast(pa.timestamp("us", tz="UTC")),
                "click": (rng.random(len(user)) < 1 / (1 + np.exp(-logit))).astype(np.int64),
            }
        )
        self._day += 1
        # A request lists a candidate once.
        _, first = np.unique(np.stack([times, candidate]), axis=1, return_index=True)
        return table.take(pa.array(np.sort(first)))


def schema(limits: dict[str, dict[str, int]]) -> Any:
    """Of the log, with limits of counters and histories by name."""
    from mmoe_rec.features.kinds import schema_of

    features: dict[str, Any] = {
        "candidate": {"kind": "id", "column": "candidate", "min_count": 20, "max_size": 1000},
        "clicked": {"kind": "history", "task": "click", "of": "candidate", "length": 10, **limits["clicked"]},
    }
    outputs = ["positives", "rows", "rate", "recency"]
    for name, by in COUNTERS.items():
        windows = [None, 7, 28]
        features[name] = {"kind": "counter", "task": "click", "by": by, "window_days": windows, "outputs": outputs}
        features[name] |= limits[name]
    return schema_of(
        {
            "columns": {"user": "user", "candidate": "candidate", "time": "time"},
            "tasks": {"click": {"label": "click", "objective": "engagement"}},
            "features": features,
        }
    )


class Grown:
    """A folder of features that is built and extended day by day."""

    def __init__(self, name: str, log: Path, work: Path, limits: dict[str, dict[str, int]]) -> None:
        self.name, self._log, self._work, self._schema = name, str(log), work, schema(limits)
        self._click: list[np.ndarray] = []
        self._said: list[np.ndarray] = []
        self.sizes: dict[int, dict[str, float]] = {}
        self.seconds = 0.0
        self._model: Any = None

    def take(self, day: int, measured: bool) -> None:
        """Takes in the log up to a day; `measured`: whether its rows count for the AUC."""
        from mmoe_rec.preprocessing.extend import extend
        from mmoe_rec.preprocessing.prepare import prepare

        started = time.perf_counter()
        end = START + (day + 1) * DAY
        if day == FIRST:
            windows = {
                "train": (START, end - 9 * DAY),
                "validation": (end - 9 * DAY, end - DAY),
                "test": (end - DAY, None),
            }
            self.prepared = prepare(self._log, self._schema, windows, self._work)
        else:
            windows = {"train": (START, START + DAY), "validation": (START + DAY, START + 2 * DAY)}
            extended = extend(self._log, self._schema, {**windows, "test": (START + 2 * DAY, None)}, self._work)
            assert extended is not None
            self.prepared = extended.prepared
        self.seconds += time.perf_counter() - started
        if self._model is None:
            from sklearn.linear_model import LogisticRegression

            inputs, click = self._rows("train")
            late = slice(len(click) // 3, None)  # the counters of the first days are empty
            self._model = LogisticRegression(max_iter=1000).fit(inputs[late], click[late])
        if measured:
            inputs, click = self._rows("test")
            self._click.append(click)
            self._said.append(self._model.decision_function(inputs))
        if day % TOLD == 0:
            self.sizes[day] = self._measure()

    def _rows(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        from mmoe_rec.features.layout import Encoded

        table = pq.read_table(self.prepared.split(split))
        return Encoded.from_arrow(table, self.prepared.layout).dense, table["label.click"].to_numpy()

    def _measure(self) -> dict[str, float]:
        """MB."""
        from mmoe_rec.features.memories import remembered_bytes

        folder = self.prepared.folder
        files = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        remembered = {path for path in files if path.parent.suffix == ".memory"}
        kept = {path for path in files if path.is_relative_to(folder / "encoded")}
        served = subprocess.run(
            [sys.executable, "-m", __spec__.name, "--served", str(self.prepared.serving)],
            check=True,
            capture_output=True,
            text=True,
            env=os.environ | GIVEN_BACK,
        )
        return {
            "memories": _mb(sum(remembered_bytes(self.prepared.serving).values())),
            "memory_files": _mb(sum(files[path] for path in remembered)),
            "other_files": _mb(sum(files[path] for path in files.keys() - remembered - kept)),
            "served": round(float(served.stdout), 1),
        }

    def auc(self) -> float:
        """Of all measured rows."""
        from sklearn.metrics import roc_auc_score

        return float(roc_auc_score(np.concatenate(self._click), np.concatenate(self._said)))


def _mb(count: int) -> float:
    return round(count / 1e6, 2)


def served(folder: Path) -> float:
    """MB that a process takes to answer requests by features, beyond what the code takes."""
    from mmoe_rec.features.pipeline import FeaturePipeline
    from mmoe_rec.inference.reader import RequestReader
    from mmoe_rec.inference.request import Request

    def held() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Private_Dirty", "Private_Clean")))

    def after_answering(memories: bool) -> int:
        pipeline = FeaturePipeline.load(folder, memories)
        reader = RequestReader(pipeline, folder, 1000)
        rows = reader.rows([Request(user={"user": 1}, context={}, candidates={"candidate": list(range(100))})])
        pipeline.request_inputs(rows)
        pa.default_memory_pool().release_unused()
        ctypes.CDLL(None).malloc_trim(0)
        return held()

    without = after_answering(memories=False)
    return (after_answering(memories=True) - without) / 1e6


def _days(days: int, log: Path) -> Iterator[int]:
    """Days whose rows the log now holds."""
    shop = Shop()
    log.mkdir()
    for day in range(days + 1):
        pq.write_table(shop.day(), log / f"{day:03d}.parquet")
        if day >= FIRST:
            yield day


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--days", type=int, default=365)
    parser.add_argument("--served", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.served is not None:
        print(served(arguments.served))
        return
    from unittest.mock import patch

    from rich.progress import Progress

    from mmoe_rec.preprocessing import steps
    from mmoe_rec.progress import bar

    with tempfile.TemporaryDirectory(prefix="year-") as folder:
        log = Path(folder) / "log"
        both = [Grown(name, log, Path(folder) / name, limits) for name, limits in LIMITS.items()]
        with patch.object(steps, "bar", lambda: Progress(disable=True)), bar() as progress:
            task = progress.add_task("days", total=arguments.days - FIRST + 1)
            for day in _days(arguments.days, log):
                for each in both:
                    each.take(day, measured=day > arguments.days - FIRST)
                progress.advance(task)
    for each in both:
        print(f"{'day':>5} {each.name}: MB by day")
        for day, sizes in each.sizes.items():
            print(f"{day:5} " + "  ".join(f"{name} {size:8.2f}" for name, size in sizes.items()))
    last = max(both[0].sizes)
    auc = {each.name: each.auc() for each in both}
    ratio = {
        each.name: {name: round(size / each.sizes[FIRST][name], 3) for name, size in each.sizes[last].items()}
        for each in both
    }
    result = {
        "benchmark": "year",
        "days": arguments.days,
        "limits": LIMITS,
        "mb": {each.name: {FIRST: each.sizes[FIRST], last: each.sizes[last]} for each in both},
        "ratio_to_day_60": ratio,
        "auc": {name: round(each, 5) for name, each in auc.items()},
        "auc_lost": {name: round(auc["all"] - each, 5) for name, each in auc.items()},
        "seconds": {each.name: round(each.seconds, 1) for each in both},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
