"""Whether `ablate` tells worthless features from worth-while ones: on synthetic logs whose truth is known, and on a log
whose permuted and retrained losses should put groups in the same order.

python -m tests.benchmarks.ablation --logs 0 40
python -m tests.benchmarks.ablation --config configs/complete_journey.yaml --model DIR -- --data.work DIR ...

Of each log of 60,000 rows a model is trained on numbers, ids and counters of which some decide and
others are noise, and in every other log a copy of a number that decides. A worthless feature is told right where it is
among those to leave out, a worth-while one where its loss is shown and it is not. A copy and its original should both
be needed by permutations, as the model uses both.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.stats import spearmanr

from mmoe_rec.jobs.ablation import Ablation, ablate_model
from mmoe_rec.jobs.train import train_model
from mmoe_rec.settings.load import load_settings
from mmoe_rec.settings.sections import Settings

ROWS, USERS, ITEMS, DAYS = 60_000, 500, 120, 20
START = np.datetime64("2024-01-01", "us")
NOISE = ("noise", "noise_of_user", "noise_id", "noise_counter")
TOP = 5


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
    tree = {
        "name": "ablated",
        "data": {"log": str(folder / "log"), "work": str(folder / "work")},
        "columns": {"request": "request", "user": "user", "candidate": "item", "time": "time"},
        "roles": {
            "user": ["trait", "noise_of_user"],
            "candidate": ["strong", "weak", "noise", "noise_id", "same"],
        },
        "tasks": {"click": {"label": "click", "objective": "engagement"}},
        "features": {
            **numbers,
            "noise_id": {"kind": "id", "column": "noise_id", "dim": 8},
            "item": {"kind": "id", "column": "item", "dim": 8},
            "noise_counter": {"kind": "counter", "task": "click", "by": ["noise_id"], "outputs": ["rate"]},
        },
        "split": {"train_end": "2024-01-13", "validation_end": "2024-01-20"},
        "model": {"experts": {"count": 4, "units": [32]}, "bottom": {"units": [64]}},
        "training": {"threads": 1, "device": "cpu"},
        "tracking": {"uri": f"sqlite:///{folder.parent / 'mlflow.db'}"},
    }
    (folder / "settings.yaml").write_text(json.dumps(tree))
    return load_settings(folder / "settings.yaml")


def judge(seed: int, folder: Path) -> Counter[str]:
    """How many features of a log are told right, wrong, or left open, by what they are."""
    settings = make_log(seed, folder)
    train_model(settings, register=False)
    work = Path(settings.data.work)
    report = ablate_model(settings, str(work / "model"), work / "ablation", Ablation(candidates=100))
    left, shown = report.left_out, {each.part.name for each in report.worths if each.is_shown}
    found = Counter[str]()
    for name in settings.features:
        kind = "worthless" if name in NOISE else "copies" if seed % 2 and name in ("strong", "same") else "worth-while"
        expected, other = (name in left, name in shown) if kind == "worthless" else (name in shown, name in left)
        found[f"{kind} {'right' if expected else 'wrong' if other else 'open'}"] += 1
    return found


def compare_orders(config: str, model: str, overrides: list[str], rows: int, seeds: int) -> dict[str, Any]:
    """Losses of groups by permutations and by trainings without, on the same rows."""
    settings = load_settings(config, overrides)
    options = Ablation(split="test", rows=rows, repeats=2, seeds=seeds)
    report = ablate_model(settings, model, Path(settings.data.work) / "ablation", options)
    permuted = {each.part.features: each.objective.value or 0.0 for each in report.worths}
    trained = {
        each.part.features: each.objective.value or 0.0 for each in report.retrained if each.part.features in permuted
    }
    names = {each.part.features: each.part.name for each in report.retrained}
    orders = [sorted(trained, key=lambda part, of=of: -of[part]) for of in (permuted, trained)]
    return {
        "groups": {names[part]: [round(permuted[part], 5), round(trained[part], 5)] for part in orders[0]},
        "top_permuted": [names[part] for part in orders[0][:TOP]],
        "top_retrained": [names[part] for part in orders[1][:TOP]],
        "same_order": orders[0][:TOP] == orders[1][:TOP],
        "rank_correlation": round(
            float(spearmanr([permuted[p] for p in trained], list(trained.values())).statistic), 3
        ),
    }


def main() -> None:
    """Prints what was found of each log, and a last line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", type=int, nargs=2, default=[0, 40], metavar=("FROM", "TO"))
    parser.add_argument("--config")
    parser.add_argument("--model")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    if options.config:
        print(json.dumps(compare_orders(options.config, options.model, options.overrides, options.rows, options.seeds)))
        return
    found = Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(*options.logs):
            one = judge(seed, Path(folder) / str(seed))
            found += one
            print(f"log {seed}: {dict(one)}", flush=True)
    print(json.dumps(dict(sorted(found.items()))))


if __name__ == "__main__":
    main()
