"""Whether `compare --features` tells worthless features from useful ones, on synthetic logs whose truth is known.

python -m tests.benchmarks.ablation --logs 0 40

Of each log of 60,000 rows a model is trained on numbers, ids and counters of which some decide and others are noise,
and in every other log a copy of a number that decides. A worthless feature is called right if it is a candidate to
leave out, a useful one if its loss is significant and it is no candidate. A copy and its original should both be used,
as the model has both. `adopted` counts the logs in which runs confirm that the candidates can go.
"""

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.experiments.importance import compare_features
from mmoe_rec.settings.load import load_settings
from mmoe_rec.settings.sections import Settings
from tests.pipelines.learnable_log import settings_tree

ROWS, USERS, ITEMS, DAYS = 60_000, 500, 120, 20
START = np.datetime64("2024-01-01", "us")
NOISE = ("noise", "noise_of_user", "noise_id", "noise_counter")


def make_log(seed: int, folder: Path) -> Settings:
    """A log and its settings: clicks follow a user's trait, an item's quality, and two numbers, more or less."""
    random = np.random.default_rng(seed)
    requests = ROWS // 5
    user = random.integers(0, USERS, requests).repeat(5)
    item = random.random((requests, ITEMS)).argsort(1)[:, :5].ravel()
    times = np.sort(random.uniform(0, DAYS * 86_400e6, requests)).astype(np.int64).repeat(5)
    strong, weak = random.normal(size=(2, ROWS))
    trait, quality = random.normal(size=USERS), random.normal(size=ITEMS)
    sizes = random.uniform([0.5, 0.3, 0.5, 0.5], [1.2, 0.5, 1.0, 1.0])
    logit = sizes @ np.stack([strong, weak, trait[user], quality[item]]) - 1
    columns: dict[str, Any] = {
        "request": np.arange(requests).repeat(5),
        "user": user,
        "item": item,
        "time": pa.array(START + times.astype("timedelta64[us]"), pa.timestamp("us", tz="UTC")),
        "strong": strong,
        "weak": weak,
        "trait": trait[user],
        "noise": random.normal(size=ROWS),
        "noise_of_user": random.normal(size=USERS)[user],
        "noise_id": random.integers(0, 40, ROWS),
        "same": strong if seed % 2 else random.normal(size=ROWS),
        "click": (logit + random.logistic(size=ROWS) > 0).astype(np.int8),
    }
    (folder / "log").mkdir(parents=True)
    pq.write_table(pa.table(columns), folder / "log" / "log.parquet")
    numbers = {
        name: {"kind": "numeric", "column": name} for name in ("strong", "weak", "trait", "noise", "noise_of_user")
    }
    numbers |= {"same": {"kind": "numeric", "column": "same"}} if seed % 2 else {}
    tree = settings_tree(
        folder,
        roles={"user": ["trait", "noise_of_user"], "candidate": ["strong", "weak", "noise", "noise_id", "same"]},
        tasks={"click": {"label": "click", "objective": "engagement"}},
        features={
            **numbers,
            "noise_id": {"kind": "id", "column": "noise_id", "dim": 8},
            "item": {"kind": "id", "column": "item", "dim": 8},
            "noise_counter": {"kind": "counter", "task": "click", "by": ["noise_id"], "outputs": ["rate"]},
        },
        split={"train_end": "2024-01-13", "validation_end": "2024-01-20"},
        model={"experts": {"count": 4, "units": [32]}, "bottom": {"units": [64]}},
        training={"threads": 1, "device": "cpu"},
        evaluation={},
        tracking={"uri": f"sqlite:///{folder.parent / 'mlflow.db'}"},
    )
    (folder / "settings.yaml").write_text(json.dumps(tree))
    return load_settings(folder / "settings.yaml")


def judge(seed: int, folder: Path, seeds: int) -> Counter[str]:
    """How many features of a log are called right, wrong, or left open, by what they are."""
    settings = make_log(seed, folder)
    report = compare_features(settings, (), 0.001, seeds)
    verdicts = {name: verdict for name, _, verdict in report.tables[0].rows}
    actual = Counter[str]()
    for name, verdict in verdicts.items():
        kind = "worthless" if name in NOISE else "copies" if seed % 2 and name in ("strong", "same") else "useful"
        right, wrong = ("removable", "used") if kind == "worthless" else ("used", "removable")
        actual[f"{kind} {'right' if verdict == right else 'wrong' if verdict == wrong else 'open'}"] += 1
    recommended = report.recommended
    names = set() if recommended is None else {*recommended.name.removeprefix("without ").split(", ")}
    actual[f"adopted {'nothing' if not names else 'noise' if names <= {*NOISE} else 'too much'}"] += 1
    return actual


def main() -> None:
    """Prints what was found of each log, and a last line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", type=int, nargs=2, default=[0, 40], metavar=("FROM", "TO"))
    parser.add_argument("--seeds", type=int, default=3)
    options, actual = parser.parse_args(), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(*options.logs):
            first = judge(seed, Path(folder) / str(seed), options.seeds)
            actual += first
            print(f"log {seed}: {dict(first)}", flush=True)
    print(json.dumps(dict(sorted(actual.items()))))


if __name__ == "__main__":
    main()
