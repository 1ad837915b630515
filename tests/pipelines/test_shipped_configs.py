"""Every config that is shipped trains, on rows made to fit it, and gives a model that can be served."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmoe_rec.features.kinds.cross import CrossFeature
from mmoe_rec.features.kinds.id import IdFeature
from mmoe_rec.features.kinds.ids import IdsFeature
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.log.columns import UTC_MICROSECONDS, column_uses, event_column_uses
from mmoe_rec.settings.load import load_settings
from mmoe_rec.settings.log_columns import ColumnUse
from mmoe_rec.settings.schema import Schema
from mmoe_rec.settings.sections import Settings
from mmoe_rec.training.train import train_model

CONFIGS = sorted(Path("configs").glob("*.yaml"))
HERE = [
    *["--data.engine=local", "--data.workers=1", "--training.device=cpu", "--training.precision=fp32"],
    *["--training.matmul_backend=blas", "--training.table_backend=fbgemm", "--training.threads=1"],
]
SHORT = ["--training.batch_size=100", "--training.epochs=1"]
NARROW = ["--model.bottom.units=[32]", "--model.experts.units=[16]"]
DAY = 86_400_000_000
CANDIDATES = 6  # of a request


def write_fitting_logs(settings: Settings, folder: Path, requests: int = 200) -> list[str]:
    """Writes random rows that fit settings, as logs or a plain table; gives the overrides that name them."""
    rng = np.random.default_rng(0)
    schema = settings.schema_
    if schema.split is not None:
        return _write_plain_table(schema, folder, rng, 2 * requests * CANDIDATES)
    windows = settings.split.windows()
    _, train_end = windows["train"]
    _, validation_end = windows["validation"]
    assert train_end is not None
    assert validation_end is not None
    maturing = max(int(task.label_delay_days * DAY) for task in schema.tasks.values())
    first, last = train_end - maturing - 30 * DAY, windows["test"][1] or validation_end + 7 * DAY
    times = np.linspace(first, last, requests, endpoint=False).astype(np.int64).repeat(CANDIDATES)
    names, rows = schema.columns, requests * CANDIDATES
    columns = {name: _column(use, times, rng) for name, use in column_uses(schema).items()}
    columns[names.user] = pa.array(rng.integers(0, 30, requests).repeat(CANDIDATES))
    columns[names.candidate] = pa.array(rng.random((requests, 40)).argsort(1)[:, :CANDIDATES].ravel())
    columns[names.time] = _times(times, names.time_unit)
    if names.request is not None:
        columns[names.request] = pa.array(np.arange(requests).repeat(CANDIDATES))
    if names.sampling_rate is not None:
        columns[names.sampling_rate] = pa.array(rng.choice([0.25, 1.0], rows))
    for feature in schema.features.values():
        for column, length in feature.list_lengths.items():
            columns[column] = pa.array(list(rng.normal(size=(rows, length))))
    for task in schema.tasks.values():
        if task.observed_when is not None:
            columns[task.observed_when.column] = _seen(task.observed_when.equals, rng.random(rows) < 0.5)
    for task in schema.tasks.values():
        binary = task.kind == "binary"
        columns[task.label] = pa.array(rng.integers(0, 2, rows) if binary else rng.exponential(size=rows))
    _write(pa.table(columns), folder / "log")
    overrides = ["--data.log", str(folder / "log")]
    for name, log in schema.events.items():
        actual = {column: columns[column] for column in event_column_uses(schema, name) if column in columns}
        _write(pa.table({**actual, log.time: columns[names.time]}), folder / name)
        overrides += [f"--data.events.{name}.path", str(folder / name)]
    return overrides


def _write_plain_table(schema: Schema, folder: Path, rng: np.random.Generator, rows: int) -> list[str]:
    assert schema.split is not None
    columns = {name: _column(use, np.zeros(rows, np.int64), rng) for name, use in column_uses(schema).items()}
    values = [item for listed in schema.split.values.values() for item in listed]
    columns[schema.split.column] = pa.array([values[place] for place in rng.integers(0, len(values), rows)])
    for task in schema.tasks.values():
        columns[task.label] = pa.array(rng.integers(0, 2, rows))
    _write(pa.table(columns), folder / "log")
    return ["--data.log", str(folder / "log")]


def _column(use: ColumnUse, times: np.ndarray, rng: np.random.Generator) -> pa.Array:
    rows = len(times)
    match use:
        case "key":
            return pa.array(rng.integers(0, 9, rows))
        case "keys":
            return pa.array([["a", "b", "c"][: rng.integers(0, 4)] for _ in range(rows)])
        case "time":
            return pa.array(times - rng.integers(0, 90 * DAY, rows)).cast(UTC_MICROSECONDS)
        case _:
            return pa.array(rng.lognormal(2, 1, rows))


def _times(times: np.ndarray, unit: str | None) -> pa.Array:
    stamps = pa.array(times).cast(UTC_MICROSECONDS)
    return stamps if unit is None else stamps.cast(pa.timestamp(unit, tz="UTC"), safe=False).cast(pa.int64())


def _seen(equals: object, seen: np.ndarray) -> pa.Array:
    if isinstance(equals, bool):
        return pa.array(seen == equals)
    return pa.array(np.where(seen, equals, equals + 1))  # type: ignore[operator]


def _write(table: pa.Table, folder: Path) -> None:
    folder.mkdir(parents=True)
    pq.write_table(table, folder / "part.parquet")


def test_there_are_configs() -> None:
    assert {"template", "movielens", "complete_journey", "synthetic", "cluster"} <= {config.stem for config in CONFIGS}


def _smaller(settings: Settings) -> Iterator[str]:
    """Overrides for tables that do not fit into a test."""
    for name, feature in settings.features.items():
        if isinstance(feature, CrossFeature):
            yield f"--features.{name}.buckets={min(feature.buckets, 1000)}"
        elif isinstance(feature, IdFeature | IdsFeature):
            yield f"--features.{name}.oov_buckets={min(feature.oov_buckets, 64)}"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_a_shipped_config_trains(config: Path, tmp_path: Path) -> None:
    overrides = [*HERE, *SHORT, *NARROW, *_smaller(load_settings(config)), "--data.work_dir", str(tmp_path / "work")]
    overrides += ["--tracking.uri", f"sqlite:///{tmp_path / 'mlflow.db'}"]
    settings = load_settings(config, [*overrides, *write_fitting_logs(load_settings(config), tmp_path)])
    trained = train_model(settings, register=False)
    assert trained is not None
    assert trained.best_step > 1
    assert np.isfinite(list(trained.best.loss.values())).all()
    example = json.loads((trained.artifact / "example_request.json").read_text(encoding="utf-8"))["inputs"][0]
    ranking = Ranker.load(trained.artifact).rank(**example)
    assert set(settings.tasks) <= set(ranking.predictions)
    assert np.isfinite(ranking.scores).all()
