"""Configs against a log with the columns and types that they are written for."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmoe_rec.preprocessing.logs import BuildOptions
from mmoe_rec.preprocessing.prepare import Prepared, prepare
from mmoe_rec.settings.load import load_settings
from pipelines.ingest_movielens import LOG as MOVIELENS
from tests.log.small_logs import DAY, write_log

ROWS = 3000


def _times(rng: np.random.Generator, first: datetime, days: float, request: np.ndarray) -> pa.Array:
    start = int(first.replace(tzinfo=UTC).timestamp() * 1e6)
    times = start + np.sort((rng.uniform(0, days, ROWS) * DAY).astype(np.int64))
    return pa.array(times[request], pa.timestamp("us", tz="UTC"))


def _prepare(config: str, table: pa.Table, tmp_path: Path, *overrides: str) -> Prepared:
    settings = load_settings(config, overrides)
    log = write_log(tmp_path / "log", table)
    # Random candidates: some occur twice in a request.
    options = BuildOptions(duplicates="keep")
    prepared = prepare(str(log), settings.schema_, settings.split.windows(), tmp_path / "work", options)
    for split in ("train", "validation", "test"):
        encoded = pq.read_table(prepared.split(split))
        dense = np.stack([encoded[f"dense.{each.name}"].to_numpy() for each in prepared.layout.dense])
        assert np.isfinite(dense).all()
        for each in prepared.layout.ids:
            ids = encoded[f"id.{each.name}"].combine_chunks()
            ids = (ids.flatten() if each.many else ids).to_numpy()
            assert ((ids >= 0) & (ids < prepared.layout.table(each.table).rows)).all(), each.name
    return prepared


def test_movielens(tmp_path):
    rng = np.random.default_rng(0)
    rated = rng.integers(0, 2, ROWS)
    genres = ["Action", "Drama", "Film-Noir"]
    request = np.arange(ROWS) // 5
    columns = {
        "request_id": request,
        "request_time": _times(rng, datetime(2000, 4, 25), 250, 5 * request),
        "user_id": rng.integers(1, 40, ROWS)[request],
        "movie_id": rng.integers(1, 60, ROWS),
        "gender": rng.choice(["F", "M"], ROWS),
        "age": rng.choice([1, 18, 25], ROWS),
        "occupation": rng.integers(0, 21, ROWS),
        "zip_code": rng.choice(["48067", "V3N4P"], ROWS),
        "title_year": pa.array(rng.integers(1919, 2001, ROWS), mask=rng.random(ROWS) < 0.05),
        "genres": [genres[: rng.integers(1, 4)] for _ in range(ROWS)],
        "rated": rated,
        "liked": pa.array(rng.integers(0, 2, ROWS), mask=rated == 0),
        "sampling_rate": np.where(rated == 1, 1.0, 0.05),
    }
    table = pa.table({name: pa.array(values).cast(MOVIELENS.field(name).type) for name, values in columns.items()})
    prepared = _prepare("configs/movielens.yaml", table.select(MOVIELENS.names), tmp_path)
    assert {each.name for each in prepared.layout.ids} >= {"movie", "genres", "last_rated", "last_liked"}
    # The last label of training is known three hours before its end.
    counts = prepared.manifest["splits"]["train"]
    end = load_settings("configs/movielens.yaml").split.windows()["train"][1]
    times = columns["request_time"].cast(pa.int64()).to_numpy()
    assert counts["rows"] == (times < end).sum()
    assert counts["observed"]["rated"] == (times + DAY // 8 <= end).sum()


@pytest.mark.parametrize("strings", [False, True])
def test_the_template(tmp_path, strings):
    rng = np.random.default_rng(0)
    clicked, surveyed = rng.integers(0, 2, ROWS), rng.random(ROWS) < 0.2
    page = np.arange(ROWS) // 7
    viewers = rng.integers(-(2**63), 2**63 - 1, 40)[rng.integers(0, 40, ROWS)][page]
    videos = -rng.integers(1, 60, ROWS)
    as_id = (lambda values: pa.array([f"id {value}" for value in values])) if strings else pa.array
    times = _times(rng, datetime(2024, 3, 1), 90, 7 * page)
    columns = {
        "viewer": as_id(viewers),
        "video": as_id(videos),
        "shown_at": times,
        "page_view": as_id(page),
        "country": rng.choice(["DE", "FR"], ROWS),
        "device": rng.choice(["phone", "tv"], ROWS),
        "channel": rng.integers(0, 9, ROWS),
        "tags": [["a", "b", "c"][: rng.integers(0, 4)] for _ in range(ROWS)],
        "length_s": rng.lognormal(5, 1, ROWS),
        "published_at": pa.array(times.cast(pa.int64()).to_numpy() - 9 * DAY, pa.timestamp("us", tz="UTC")),
        "title_embedding": list(rng.normal(size=(ROWS, 64))),
        "position": rng.integers(0, 20, ROWS),
        "kept": np.where(clicked == 1, 1.0, 0.1),
        "clicked": clicked.astype(bool),
        "watch_minutes": pa.array(rng.exponential(size=ROWS), mask=clicked == 0),
        "surveyed": surveyed,
        "stars_good": pa.array(rng.integers(0, 2, ROWS), mask=~surveyed),
        "still_subscribed": rng.integers(0, 2, ROWS),
    }
    table = pa.table(columns)
    found = table.select(["viewer", "video", "shown_at"]).rename_columns(["viewer", "video", "searched_at"])
    searches = write_log(tmp_path / "searches", found)
    prepared = _prepare("configs/template.yaml", table, tmp_path, "--data.events.searches.path", str(searches))
    assert [task.name for task in prepared.layout.tasks] == ["click", "watch", "liked", "stayed"]
    observed = prepared.manifest["splits"]["train"]["observed"]
    end, requested = (
        load_settings("configs/template.yaml").split.windows()["train"][1],
        times.cast(pa.int64()).to_numpy(),
    )
    assert end is not None
    train, matured = requested < end, requested + 7 * DAY <= end
    assert observed["liked"] == (surveyed & matured).sum()
    assert 0 < observed["stayed"] < observed["click"] == (requested + round(0.02 * DAY) <= end).sum() <= train.sum()
