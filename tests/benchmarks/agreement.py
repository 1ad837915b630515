"""python -m tests.benchmarks.agreement

Do all ways of scoring give the same? In a folder of its own it cuts Complete Journey's log at a moment, trains on what
was before, moves the next 10,000 rows, whole requests, to that moment, and scores these rows

- by `evaluate`, which is what the others are compared with;
- by `score` on both engines, with features as of the log and as of the model's tables;
- by requests to MLflow's server and to ours.

At that moment a log with them and the model's tables know the same, so all predictions should agree but for the
rounding of fp32. The last line is JSON: for each way, the rows, and the largest difference of a prediction and of the
logarithm of a score.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from mmoe_rec.settings.sections import Settings
from tests.benchmarks.http_load import Client
from tests.benchmarks.serving import Running, by_mlflow, by_ours

CONFIG = Path("configs/complete_journey.yaml")
ADDRESS = "models:/complete_journey@champion"
AT_ONCE = 50  # requests in a call


@dataclass(frozen=True)
class Scores:
    """Of N rows, in the log's order: predictions (N, T) and log scores (N,)."""

    predictions: np.ndarray
    log_scores: np.ndarray

    def beside(self, other: Scores) -> dict[str, float]:
        """The largest differences from other scores of the same rows."""
        assert len(self.log_scores) == len(other.log_scores), "not the same rows"
        return {
            "rows": len(self.log_scores),
            "prediction": float(np.abs(self.predictions - other.predictions).max()),
            "log_score": float(np.abs(self.log_scores - other.log_scores).max()),
        }


class Cut:
    """A log to train on, and `later`, the same one with many requests at a later moment. rows: of that moment."""

    def __init__(self, config: Path, rows: int, folder: Path) -> None:
        settings = yaml.safe_load(config.read_text(encoding="utf-8"))
        validation_end = Settings.model_validate(settings).split.validation_end
        self.moment = validation_end + timedelta(days=7)
        columns, data = settings["columns"], settings["data"]
        self._request, self._time = columns["request"], columns["time"]
        log = pq.read_table(data["log"]).sort_by([(self._time, "ascending"), (self._request, "ascending")])
        at = pa.scalar(self.moment, log.schema.field(self._time).type)
        first = pc.sum(pc.less(log[self._time], at)).as_py()
        end = first + rows
        while end < len(log) and log[self._request][end] == log[self._request][end - 1]:
            end += 1
        here = log.slice(first, end - first)
        place = log.column_names.index(self._time)
        self.rows = here.set_column(place, log.schema.field(place), pa.chunked_array([pa.repeat(at, len(here))]))
        data["log"], data["work"], self.later = str(folder / "log"), str(folder / "work"), str(folder / "later")
        history = log.slice(0, first)
        _write(history, folder / "log")
        _write(pa.concat_tables([history, self.rows]), folder / "later")
        for name, source in data["events"].items():
            events = pq.read_table(source["path"])
            events = events.filter(pc.less(events[source["time"]], at))
            source["path"] = str(folder / name)
            _write(events, folder / name)
        settings["split"]["test_end"] = self.moment + timedelta(seconds=1)
        self.config = folder / "config.yaml"
        self.config.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        self.settings = Settings.model_validate(settings)

    def requests(self) -> Iterator[dict[str, Any]]:
        """The requests with all that the log says of them, as elements of a call, in the order of the rows."""
        columns, roles = self.settings.columns, self.settings.roles
        ids = self.rows[self._request].to_numpy()
        starts = [0, *(np.flatnonzero(ids[1:] != ids[:-1]) + 1).tolist(), len(ids)]
        for start, end in pairwise(starts):
            part = self.rows.slice(start, end - start)
            (user,), (context,) = (part.slice(0, 1).select(each).to_pylist() for each in (roles.user, roles.context))
            candidates = {name: part[name].to_pylist() for name in roles.candidate}
            yield {
                "user": user,
                "context": {**context, columns.time: self.moment.isoformat()},
                "candidates": candidates,
            }


def _write(table: pa.Table, folder: Path) -> None:
    folder.mkdir()
    pq.write_table(table, folder / "0.parquet")


def evaluated(cut: Cut, folder: Path) -> Scores:
    """By the job behind `evaluate`."""
    from mmoe_rec.jobs.evaluate import evaluate_model

    data = cut.settings.data.model_copy(update={"log": cut.later})
    settings = cut.settings.model_copy(update={"data": data})
    scored = evaluate_model(settings, ADDRESS, folder / "evaluation").scored
    places = np.flatnonzero(np.isin(scored.requests.to_numpy(), cut.rows[cut.settings.columns.request].to_numpy()))
    assert scored.candidates.take(pa.array(places)).to_pylist() == cut.rows[cut.settings.columns.candidate].to_pylist()
    return Scores(scored.predictions[places], scored.score[places])


def scored(cut: Cut, folder: Path, engine: str, as_of: str) -> Scores:
    """By the command `score`."""
    out = folder / f"scores_{engine}_{as_of}"
    words = ["--model", ADDRESS, "--input", cut.later, "--output", str(out), "--engine", engine]
    run(folder, "score", *words, "--as-of", as_of, "--start", cut.moment.isoformat())
    table = pa.concat_tables(pq.read_table(part) for part in sorted(out.glob("part-*.parquet")))
    assert table[cut.settings.columns.candidate].to_pylist() == cut.rows[cut.settings.columns.candidate].to_pylist()
    predictions = np.stack([table[f"predicted_{name}"].to_numpy() for name in cut.settings.tasks], axis=1)
    return Scores(predictions, np.log(table["score"].to_numpy()))


def served(cut: Cut, server: Running) -> Scores:
    """By a server."""
    client, elements = Client(server.port), list(cut.requests())
    predictions, scores = [], []
    for start in range(0, len(elements), AT_ONCE):
        body = json.dumps({"inputs": elements[start : start + AT_ONCE]}).encode()
        for ranking in json.loads(client.ask(body))["predictions"]:
            order = np.argsort(ranking["order"])
            predictions.append(np.array([ranking["predictions"][name] for name in cut.settings.tasks]).T[order])
            scores.append(np.array(ranking["scores"])[order])
    return Scores(np.concatenate(predictions), np.log(np.concatenate(scores)))


def run(folder: Path, command: str, *words: str) -> None:
    """Runs a command of the project in a folder."""
    subprocess.run([sys.executable, "-m", "mmoe_rec", command, *words], cwd=folder, check=True, stdout=2)


def benchmark(config: Path, rows: int) -> dict[str, dict[str, float]]:
    """Largest differences from `evaluate`, for each of the other ways."""
    os.environ["PYTHONPATH"] = os.getcwd()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cut = Cut(config.resolve(), rows, folder)
        os.chdir(folder)
        run(folder, "train", "--config", str(cut.config))
        model = folder / "work" / "model"
        expected = evaluated(cut, folder)
        found = {
            f"score_{engine}_{as_of}": scored(cut, folder, engine, as_of)
            for engine in ("local", "ray")
            for as_of in ("log", "tables")
        }
        with by_mlflow(ADDRESS, folder, folder) as server:
            found["mlflow_server"] = served(cut, server)
        with by_ours(model, folder, workers=2) as server:
            found["own_server"] = served(cut, server)
        return {name: each.beside(expected) for name, each in found.items()}


def main() -> None:
    """Runs all; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG, help="whose log is there (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=10_000)
    options = parser.parse_args()
    print(json.dumps(benchmark(options.config, options.rows)))


if __name__ == "__main__":
    main()
