"""python -m tests.benchmarks.job_board [--seeds 3] [--rows 60000]

Compare `init` and `train`, without an edit of the settings, with LightGBM on drawn job boards. Users apply if they have
a job's skills, which are lists of both. LightGBM gets the columns of the row, and columns made by hand: shared skills
(number, Jaccard index, fraction of the job's skills), whether the user has the main skill and lives in the same
city, and the ratio of the salaries. The same settings without features of kind `match` show the gain by this kind.

auc, gauc_request   AUC of all test rows, and mean AUC of the test requests with both labels; means over the seeds.

The last line is JSON.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import lightgbm
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import yaml
from sklearn.metrics import roc_auc_score

from tests.commands import run_and_read
from tests.profiling.worlds import draw_job_board


def by_request(rows: pd.DataFrame, scores: np.ndarray) -> float:
    """The mean AUC of the requests with both labels. All requests have six rows, so they have equal weights."""
    groups = rows.assign(score=scores).groupby("request_id")
    return float(np.mean([roc_auc_score(g["applied"], g["score"]) for _, g in groups if g["applied"].nunique() > 1]))


def with_columns_by_hand(rows: pd.DataFrame) -> pd.DataFrame:
    """The inputs of LightGBM."""
    inputs = rows[["user_salary", "job_salary", "experience"]].copy()
    for name in ("user_id", "job_id", "user_city", "job_city", "job_main_skill", "company"):
        inputs[name] = rows[name].astype("category")
    pairs = [(set(user), set(job)) for user, job in zip(rows["user_skills"], rows["job_skills"], strict=True)]
    shared = np.array([len(user & job) for user, job in pairs])
    inputs["shared"] = shared
    inputs["jaccard"] = shared / np.array([len(user | job) for user, job in pairs])
    inputs["covered"] = shared / np.array([len(job) for _, job in pairs])
    inputs["has_main_skill"] = [skill in user for (user, _), skill in zip(pairs, rows["job_main_skill"], strict=True)]
    inputs["same_city"] = rows["user_city"] == rows["job_city"]
    inputs["salary_ratio"] = np.log(rows["job_salary"] / rows["user_salary"])
    return inputs


def boosted_trees(rows: pd.DataFrame, split: dict[str, pd.Timestamp], seed: int) -> np.ndarray:
    """Predictions of LightGBM for test rows; validation rows choose the number of trees."""
    inputs, labels, time = with_columns_by_hand(rows), rows["applied"], rows["shown_at"]
    train, test = time < split["train_end"], time >= split["validation_end"]
    middle = ~train & ~test
    model = lightgbm.LGBMClassifier(n_estimators=2000, learning_rate=0.05, random_state=seed, n_jobs=2, verbose=-1)
    stopping = lightgbm.early_stopping(50, verbose=False)
    choosing = {"eval_X": inputs[middle], "eval_y": labels[middle], "eval_metric": "auc"}
    model.fit(inputs[train], labels[train], **choosing, callbacks=[stopping])
    return model.predict_proba(inputs[test])[:, 1]


def ours(folder: Path, config: Path, name: str, rows: pd.DataFrame, seed: int) -> tuple[float, float]:
    """AUC, and AUC within requests, of a model of the settings."""
    work = ("--config", config, "--data.work_dir", folder / name, "--training.seed", str(seed))
    run_and_read("train", *work, "--tracking.uri", f"sqlite:///{folder / 'mlflow.db'}")
    start = str(rows["shown_at"].min().isoformat())
    scores = folder / f"{name}_scores"
    run_and_read("score", "--model", folder / name / "model", "--input", folder / "board.parquet", "--output", scores,
                 "--start", start, "--tracking.uri", f"sqlite:///{folder / 'mlflow.db'}")  # fmt: skip
    scored = pq.read_table(scores).to_pandas()[["request_id", "job_id", "predicted_applied"]]
    joined = rows.merge(scored, on=["request_id", "job_id"], validate="one_to_one")
    assert len(joined) == len(rows)
    predicted = joined["predicted_applied"].to_numpy()
    return float(roc_auc_score(joined["applied"], predicted)), by_request(joined, predicted)


def measure(folder: Path, seed: int, count: int) -> Iterator[tuple[str, tuple[float, float]]]:
    """Yield the name of each model, and its AUC and AUC within requests."""
    table = draw_job_board(seed, count, count // 20, count // 60)
    pq.write_table(table, folder / "board.parquet")
    config, plain = folder / "board.yaml", folder / "plain.yaml"
    run_and_read("init", folder / "board.parquet", "--out", config)
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    features = settings["features"]
    assert any(feature["kind"] == "match" for feature in features.values())
    without = {name: feature for name, feature in features.items() if feature["kind"] != "match"}
    plain.write_text(yaml.safe_dump({**settings, "features": without}), encoding="utf-8")
    rows = table.to_pandas()
    split = {name: pd.Timestamp(time).tz_localize(None) for name, time in settings["split"].items()}
    test = rows[rows["shown_at"] >= split["validation_end"]]
    yield "init and train", ours(folder, config, "work", test, seed)
    yield "without matches", ours(folder, plain, "plain", test, seed)
    predicted = boosted_trees(rows, split, seed)
    yield "LightGBM", (float(roc_auc_score(test["applied"], predicted)), by_request(test, predicted))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=60_000)
    options = parser.parse_args()
    results: dict[str, list[tuple[float, float]]] = {}
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            for name, values in measure(Path(folder), seed, options.rows):
                results.setdefault(name, []).append(values)
                print(f"seed {seed}: {name}: AUC {values[0]:.4f}, within requests {values[1]:.4f}", flush=True)
    means = {
        name: dict(zip(("auc", "gauc_request"), np.mean(values, axis=0), strict=True))
        for name, values in results.items()
    }
    print(json.dumps(means))


if __name__ == "__main__":
    main()
