"""python -m tests.benchmarks.accuracy [--table journey slice deskdrop income education numbers] [--seeds 5] [--work F]

Does the model rank above what a user would take instead? On each table it is trained with several seeds, by the
settings that are shipped for it (`ours`) and by the template's model and training (`defaults`); beside it, on our
encoded rows and with the same seeds, the boosted trees of each library that is installed (extra `baselines`), and the
mixtures of torch-rechub and DeepCTR-Torch, in an environment of their own, each of the best of --peer-epochs (0 leaves
them out) by validation. A difference is one of the mean AUC over tasks, over trainings and users
(`mmoe_rec.evaluation.trainings`); the best other one is that of the highest mean on the test rows, which favours it.

DeskDrop is read from ../shared/data/deskdrop, Census-Income as by `tests.benchmarks.census`; beside the latter stands
LightGBM at its best on the raw columns. `numbers` is drawn: a plain table of numbers whose exact values and narrow
ranges decide, with the best AUC that its true probabilities allow. `sequences` is a log in which the order of a user's
visits decides: ours has attention, beside it stand the same with their mean (`mean`) and with counters of the user's
visits to the candidate's group instead (`counters`). A run that was stopped goes on.

The last line is JSON: table -> `ours`, `defaults` (AUC of each task), `others`, `best_other`; `ours_minus_best` with
`ours_low`, `ours_high`, and `ours_minus`: name of each other one -> these three; `defaults_minus_best` and so on alike;
`ours_cost` and `defaults_cost` of the first training: rows a second, milliseconds of one thread for a request of 500
candidates, bytes of the artifact; of `numbers` `best_possible`, and `ours_share`, (AUC - .5) / (best - .5); of
`sequences` too, with (AUC - mean's) / (best - mean's).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightgbm
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sklearn.metrics import roc_auc_score

from mmoe_rec.evaluation.summary import Objective
from mmoe_rec.evaluation.sums import EvaluationSums
from mmoe_rec.evaluation.trainings import average_trainings, compare_trainings
from mmoe_rec.inference.artifact import Source
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.inference.reader import Request
from mmoe_rec.jobs.baselines import POPULARITY, measure_baselines
from mmoe_rec.jobs.evaluate import measured_on_test_rows, scored_rows
from mmoe_rec.jobs.seeds import train_seeds
from mmoe_rec.jobs.trees import PATIENCE, Fitted, Inputs, Library, find_libraries
from mmoe_rec.settings.load import load_settings
from mmoe_rec.settings.model import Trees
from mmoe_rec.settings.sections import Settings
from mmoe_rec.training.checkpoint import FinishedTraining
from pipelines.ingest_census_income import ingest
from pipelines.quickstart import ingest_log, quickstart_settings
from tests.benchmarks import census, sequences
from tests.benchmarks.peers.environment import PEERS, peers_environment, predict, write_rows_once
from tests.benchmarks.serving_models import Bodies
from tests.log.small_logs import write_log

DESKDROP = Path("../shared/data/deskdrop/deskdrop.yaml")
NUMBERS, NUMBERS_ROWS = "numbers", 300_000
SEQUENCES = "sequences"
BESIDE: tuple[Literal["mean", "counters"], ...] = ("mean", "counters")
TABLES = ("journey", "slice", "deskdrop", *census.PAIRS, NUMBERS, SEQUENCES)
TEMPLATE = Path("configs/template.yaml")


def settings_of(table: str, work: Path) -> Settings:
    """Those that are shipped for a table, with a folder and a store of its own; the log is made where there is none."""
    store = ["--tracking.uri", f"sqlite:///{work / 'mlflow.db'}"]
    if table in census.PAIRS:
        if not (work.parent / "log").is_dir():
            ingest(Path(census.RAW), work.parent, seed=17)
        settings = census.settings_of(work.parent, table, "mmoe")
        return settings.model_copy(update={"model": settings.model.model_copy(update={"trees": Trees()})})
    if table == NUMBERS:
        if not (work / "log").is_dir():
            write_log(work / "log", draw_numbers())
        return numbers_settings(work)
    if table == SEQUENCES:
        if not (work / "log").is_dir():
            sequences.write_world(work, users=1_500, seed=0)
        return sequences.settings_of_world(work, "attention", store[1])
    if table == "deskdrop":
        return load_settings(DESKDROP, ["--data.work", str(work / "work"), "--model.trees", "{}", *store])
    settings = quickstart_settings(table != "slice", work, store)
    ingest_log(work, table != "slice")
    return settings


def draw_numbers() -> pa.Table:
    """Four prices, of which 300 exact ones are frequent, and two continuous numbers in which narrow ranges stand out;
    the label's true probability is the column `probability`."""
    random = np.random.default_rng(0)
    logit, columns = np.full(NUMBERS_ROWS, -0.5), {}
    for name in ("a", "b", "c", "d"):
        frequent, share = random.choice(20_000, 300, replace=False) / 100, 1 / np.arange(10, 310)
        drawn = random.choice(300, NUMBERS_ROWS, p=share / share.sum())
        other = random.random(NUMBERS_ROWS) < 0.1
        columns[name] = np.where(other, random.uniform(0, 200, NUMBERS_ROWS).round(2), frequent[drawn])
        logit += np.where(other, 0, random.normal(0, 0.7, 300)[drawn])
    for name in ("x", "y"):
        columns[name] = values = random.gamma(2.0, 3.0, NUMBERS_ROWS)
        for begin in random.choice(np.quantile(values, np.linspace(0.02, 0.97, 40)), 10, replace=False):
            logit += random.choice([-2, 2]) * ((values >= begin) & (values < begin + 0.05))
    probability = 1 / (1 + np.exp(-logit))
    split = np.where(
        np.arange(NUMBERS_ROWS) % 5 < 3, "train", np.where(np.arange(NUMBERS_ROWS) % 5 == 3, "validation", "test")
    )
    return pa.table(
        {**columns, "probability": probability, "label": random.random(NUMBERS_ROWS) < probability, "split": split}
    )


def numbers_settings(work: Path) -> Settings:
    """The template's model and training on the drawn numbers, with the frequent values of prices and narrow ranges."""
    names, ranges = ["a", "b", "c", "d", "x", "y"], {"kind": "numeric", "transform": "buckets", "buckets": 256}
    features = {name: {"kind": "numeric", "column": name, "values": "auto"} for name in names}
    features |= {f"{name}_range": {**ranges, "column": name} for name in ("x", "y")}
    tree = {
        "name": NUMBERS,
        "data": {"log": str(work / "log"), "work": str(work / "work")},
        "columns": {},
        "split": {"column": "split"},
        "roles": {"candidate": names},
        "tasks": {"label": {"label": "label", "objective": "engagement"}},
        "features": features,
        "tracking": {"uri": f"sqlite:///{work / 'mlflow.db'}"},
    }
    return with_defaults(Settings.model_validate(tree), work / "work")


def best_possible(settings: Settings) -> float:
    """AUC of the true probabilities on the test rows."""
    test = pq.read_table(settings.data.log, filters=[("split", "=", "test")])
    return float(roc_auc_score(test["label"], test["probability"]))


def with_defaults(settings: Settings, work: Path) -> Settings:
    """The template's model and training, on the same columns and features, in a folder."""
    tree, template = (each.model_dump(mode="json") for each in (settings, load_settings(TEMPLATE)))
    tree |= {name: template[name] for name in ("model", "training")}
    tree["data"]["work"] = str(work)
    return Settings.model_validate(tree)


def raw_columns(settings: Settings) -> Settings:
    """A plain table's columns as they are: all of their values, and numbers alone."""
    tree = settings.model_dump(mode="json")
    tree["data"]["work"] += "_raw"
    for each in tree["features"].values():
        each.update({"min_count": 1} if each["kind"] == "id" else {"values": None})
    return Settings.model_validate(tree)


def fit_raw(kind: str, train: Inputs, held_out: Inputs | None, leaves: int, seed: int) -> Fitted:
    """LightGBM's trees with ids as its categories, as a careful user would grow them."""
    assert held_out is not None
    parameters = {"objective": kind, "num_leaves": leaves, "learning_rate": 0.03, "feature_fraction": 0.4}
    parameters |= {"min_data_in_leaf": 50, "cat_smooth": 20, "cat_l2": 20, "seed": seed, "verbosity": -1}
    categories = list(range(train.numbers, train.x.shape[1]))
    rows = lightgbm.Dataset(train.x, train.labels, weight=train.weights, categorical_feature=categories)
    validation = rows.create_valid(held_out.x, held_out.labels, weight=held_out.weights)
    stop = lightgbm.early_stopping(PATIENCE, verbose=False)
    booster = lightgbm.train(parameters, rows, 2000, valid_sets=[validation], callbacks=[stop])
    return booster.predict, booster.best_iteration


RAW = Library("LightGBM on raw columns", "lightgbm", fit_raw, {"31 leaves": 31}, encodes_ids=True)


def trained(settings: Settings, seeds: int) -> list[EvaluationSums]:
    """The test rows as measured by the models of all seeds."""
    train_seeds(settings, seeds, resume=True)
    first, folder = settings.training.seed, Path(settings.data.work) / "seeds"
    models = [folder / str(first + number) / "model" for number in range(seeds)]
    return [each.sums for each in measured_on_test_rows(settings, [Source(each, str(each)) for each in models])]


def boosted(
    settings: Settings, work: Path, seeds: int, libraries: Sequence[Library]
) -> dict[str, list[EvaluationSums]]:
    """Library -> the same of its trees."""
    found: dict[str, list[EvaluationSums]] = {each.name: [] for each in libraries}
    for number in range(seeds):
        training = settings.training.model_copy(update={"seed": settings.training.seed + number})
        own = settings.model_copy(update={"training": training})
        models = measure_baselines(own, work / "baselines" / str(number), libraries=libraries).models
        for name, model in models.items():
            if name != POPULARITY:
                found[name].append(model.sums)
    return found


def train_peers(settings: Settings, work: Path, seeds: int, epochs: int) -> dict[str, list[EvaluationSums]]:
    """Name of each peer -> the test rows as measured by its trainings on our encoded rows. Ours are trained already."""
    if not epochs:
        return {}
    python, first = peers_environment(), settings.training.seed
    write_rows_once(settings, work / "rows")
    model = Path(settings.data.work) / "seeds" / str(first) / "model"
    rows = scored_rows(settings, Source(model, str(model)), "ours")
    found = {}
    for name, package in PEERS.items():
        outs = {seed: work / f"{name}_{epochs}_{seed}.npy" for seed in range(first, first + seeds)}
        values = [predict(python, name, work / "rows", out, epochs, seed) for seed, out in outs.items()]
        found[package] = [rows.with_predictions(each.astype(np.float64)).measure() for each in values]
    return found


def measure_cost(settings: Settings) -> dict[str, float]:
    """Of the first training: rows a second (of the network), milliseconds of one thread for a request of 500 candidates
    (median), and bytes of the artifact."""
    folder = Path(settings.data.work) / "seeds" / str(settings.training.seed)
    finished, model = FinishedTraining.read(folder), folder / "model"
    assert finished is not None
    ranker, torch_threads = Ranker.load(model), torch.get_num_threads()
    example = json.loads((model / "example_request.json").read_text(encoding="utf-8"))["inputs"][0]
    if example["user"]:
        elements = Bodies(model).elements(500, 20)
    else:  # of a plain table, whose requests give all columns
        rows = pq.read_table(settings.data.log, columns=list(example["candidates"])).slice(0, 10_000)
        elements = [{**example, "candidates": rows.slice(500 * turn, 500).to_pydict()} for turn in range(20)]
    requests, taken = [Request(**each) for each in elements], []
    torch.set_num_threads(1)
    for turn in range(80):
        start = time.thread_time()
        (answer,) = ranker.rank_many([requests[turn % len(requests)]])
        taken.append(time.thread_time() - start)
        if isinstance(answer, Exception):
            raise answer
    torch.set_num_threads(torch_threads)
    size = sum(file.stat().st_size for file in model.rglob("*") if file.is_file())
    return {"rows_per_s": finished.rows_per_s, "ms_of_500": 1e3 * float(np.median(taken[20:])), "bytes": size}


def areas(settings: Settings, sums: Sequence[EvaluationSums]) -> dict[str, float | None]:
    """The mean AUC of each task over trainings."""
    found = average_trainings(sums, settings.evaluation.resamples)
    return {task: found[task]["auc"].mean for task in settings.tasks}


def compare(
    settings: Settings, models: Mapping[str, list[EvaluationSums]], others: Mapping[str, list[EvaluationSums]]
) -> dict[str, Any]:
    """A table's part of the result. models: `ours` and `defaults`."""
    objective = Objective.of("auc", models["ours"][0], list(settings.tasks))
    means = {name: areas(settings, sums) for name, sums in {**models, **others}.items()}
    best = max(others, key=lambda name: sum(each or 0.0 for each in means[name].values()))
    found: dict[str, Any] = {name: means[name] for name in models}
    found |= {"others": {name: means[name] for name in others}, "best_other": {"name": best, **(means[best])}}
    for name, sums in models.items():
        apart = compare_trainings(sums, others, objective, settings.evaluation.resamples)
        less = {other: each.objective for other, each in apart.items()}
        of = less[best]
        found |= {f"{name}_minus_best": of.value, f"{name}_low": of.low, f"{name}_high": of.high}
        found[f"{name}_minus"] = {other: (each.value, each.low, each.high) for other, each in less.items()}
    return found


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "mmoe_rec_accuracy"))
    parser.add_argument("--peer-epochs", type=int, default=3, help="of the peers (%(default)s)")
    asked, libraries, result = parser.parse_args(), find_libraries(), dict[str, Any]()
    for table in asked.table:
        work = asked.work / table
        work.mkdir(parents=True, exist_ok=True)
        settings = settings_of(table, work)
        others = boosted(settings, work, asked.seeds, libraries)
        if table in census.PAIRS:
            others |= boosted(raw_columns(settings), work / "raw", asked.seeds, [RAW])
        both = {"ours": settings}
        if table != NUMBERS:  # whose settings are the defaults
            both["defaults"] = with_defaults(settings, work / "defaults")
        if table == SEQUENCES:
            both |= {name: sequences.settings_of_world(work, name, str(settings.tracking.uri)) for name in BESIDE}
        models = {name: trained(each, asked.seeds) for name, each in both.items()}
        others |= train_peers(settings, work / "peers", asked.seeds, asked.peer_epochs)
        result[table] = compare(settings, models, others)
        result[table] |= {f"{name}_cost": measure_cost(each) for name, each in both.items()}
        if table == NUMBERS:
            best, found = best_possible(settings), result[table]["ours"]["label"]
            result[table] |= {"best_possible": best, "ours_share": (found - 0.5) / (best - 0.5)}
        if table == SEQUENCES:
            best, (found, mean) = sequences.best_of(work), (result[table][name]["clicked"] for name in ("ours", "mean"))
            result[table] |= {"best_possible": best, "ours_share": (found - mean) / (best - mean)}
        print(json.dumps({table: result[table]}, indent=1), flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
