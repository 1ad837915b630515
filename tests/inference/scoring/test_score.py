"""Scored rows against the offline evaluation, and against the ranker that the server asks."""

import json
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from mmoe_rec.batches.encoded_dataset import EncodedDataset
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.evaluate import ID_COLUMNS, score_rows
from mmoe_rec.evaluation.prediction_files import columns_from_settings
from mmoe_rec.inference.batch_scoring import _scored_file, write_ranked
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.log.columns import UTC_MICROSECONDS
from mmoe_rec.log.database import open_database
from mmoe_rec.log.request_values import parse_time
from mmoe_rec.preprocessing.build_inputs import open_model_logs
from mmoe_rec.preprocessing.prepare import encode_splits
from tests.commands import run
from tests.evaluation.test_metrics import measured
from tests.evaluation.trees import intervals, summarize
from tests.inference.scoring.scored import read, scored, write_finely
from tests.inference.small_model import SmallModel, as_request
from tests.log.small_logs import DAY, START, at_times, random_log, with_column, with_requests

PREDICTED = ["predicted_click", "predicted_liked", "predicted_spent", "predicted_click_and_liked"]


def later_table(rows: int = 80, seed: int = 7) -> pa.Table:
    """Rows of requests that lie anywhere in the table, later than all that the small model knows."""
    table, rng = random_log(seed, rows=rows), np.random.default_rng(seed)
    request = rng.integers(0, 9, rows)
    times = START + (20 + request) * DAY
    columns = {
        "user": np.array([5, -7, 10**6])[request % 3],  # the last one is unknown
        "born": pa.array(times - 800 * DAY).cast(UTC_MICROSECONDS),
        "age": request % 2,
    }
    for name, values in columns.items():
        table = with_column(table, name, values)
    return at_times(table, times).append_column("request", pa.array(request))


def best_first(frame: pd.DataFrame, request: str = "request") -> np.ndarray:
    """Ranks by the scores of a frame, in the order of its rows."""
    return frame.groupby(request).score.rank(method="first", ascending=False).to_numpy()


def assert_ranked_alike(
    actual: pd.DataFrame, ranker: Ranker, table: pa.Table, lacking: Collection[str] = frozenset()
) -> None:
    """Beside the ranker, request by request. lacking: columns that the rows were scored without."""
    requests = table["request"].to_numpy()
    for request in np.unique(requests):
        places = np.flatnonzero(requests == request)
        asked = as_request(table.take(pa.array(places)))
        for part in ("user", "candidates"):
            asked[part] = {name: item for name, item in asked[part].items() if name not in lacking}
        ranking, mine = ranker.rank(**asked), actual.iloc[places].sort_values("rank")
        assert mine["rank"].tolist() == list(range(1, len(places) + 1))
        assert mine["item"].tolist() == ranking.candidates
        np.testing.assert_allclose(mine["score"], ranking.scores, rtol=1e-5)
        for name, values in ranking.predictions.items():
            np.testing.assert_allclose(mine[f"predicted_{name}"], values, atol=1e-6)


def test_further_columns_of_the_log_are_kept(small: SmallModel, tmp_path: Path) -> None:
    """One that no feature reads and one that a feature reads, beside the labels."""
    log = with_requests(random_log(3, rows=200), seed=3)
    log = log.append_column("device", pa.array(np.where(np.arange(200) % 3, "phone", "tablet")))
    source = write_finely(tmp_path / "log", log.slice(0, 90), log.slice(90))
    actual, _ = scored(small.folder, source, tmp_path / "out", labels=True, keep=["device", "price", "item"])
    assert actual["device"].tolist() == log["device"].to_pylist()
    np.testing.assert_array_equal(actual["price"], log["price"].to_numpy())
    assert {"label_click", "predicted_click"} < set(actual)
    for name, message in (
        ("rank", "'rank' of the log has the name of a column that scoring writes"),
        ("colour", "colour"),
    ):
        with pytest.raises(UserError, match=message):
            scored(small.folder, source, tmp_path / "wrong", keep=[name])


def test_rows_of_a_log_are_scored_as_in_an_evaluation(small: SmallModel, tmp_path: Path, fine: None) -> None:
    """Requests whose rows lie in several files and have several times; more rows than are ranked at a time. With their
    labels they have the same metrics."""
    ranker = Ranker.load(small.folder)
    log = with_requests(random_log(3, rows=2500), seed=3)
    source = write_finely(tmp_path / "log", log.slice(0, 1100), log.slice(1100, 1), log.slice(1101))
    settings = small.settings.model_copy(update={"data": small.settings.data.model_copy(update={"log": str(source)})})
    windows = {"test": (START + 4 * DAY, None)}  # before labels have all matured
    encode_splits(small.folder / "features", open_model_logs(settings, ranker.pipeline), windows, tmp_path / "encoded")
    rows = EncodedDataset(tmp_path / "encoded" / "test", ranker.layout)
    expected = score_rows(settings, ranker.model, ranker.layout, rows, ranker.calibration)

    options = ["--data.rows_in_memory", "1024", "--data.workers", "2"]
    actual, done = scored(
        small.folder, source, tmp_path / "out", window=windows["test"], labels=True, overrides=options
    )
    assert len(done.manifest["parts"]) > 20
    assert done.manifest["rows"] == len(actual) == len(expected.score) > 300
    names = [small.settings.columns.user, small.settings.columns.request, small.settings.columns.candidate]
    for name, ids in zip(names, (getattr(expected, f"{column}s") for column in ID_COLUMNS), strict=True):
        np.testing.assert_array_equal(actual[name], ids.to_numpy())
    assert [f"predicted_{name}" for name in expected.predictions] == PREDICTED
    for name, values in expected.predictions.items():
        np.testing.assert_allclose(actual[f"predicted_{name}"], values, atol=1e-5)
    np.testing.assert_allclose(np.log(actual["score"]), expected.score, atol=1e-5)
    np.testing.assert_array_equal(actual["rank"], best_first(actual))
    sizes = actual.groupby("request").size()
    assert sizes.max() > 3
    assert (actual.groupby("request").time.nunique() == 1).all()
    assert "include the given log" in done.manifest["meaning"]

    metrics = measured(columns_from_settings(settings), done.folder, tmp_path / "metrics")
    by_offline, tasks = summarize(expected.sum(), 20), metrics["tasks"]
    assert tasks.keys() == by_offline["tasks"].keys() == {"click", "liked", "spent", "click_and_liked"}
    assert tasks["liked"]["rows"] < tasks["click_and_liked"]["rows"] < metrics["rows"]
    for name, item in by_offline["tasks"].items():
        assert tasks[name]["rows"] == item["rows"]
    for name, value in intervals(by_offline).items():
        assert intervals(metrics)[name] == pytest.approx(value, abs=1e-4), name


def test_rows_that_the_model_has_learnt_from_are_counted(small: SmallModel, tmp_path: Path, fine: None) -> None:
    log = with_requests(random_log(5, rows=900), seed=5)
    source = write_finely(tmp_path / "log", log.slice(0, 400), log.slice(400))
    split = small.settings.split
    _, begin = split.windows()["validation"]
    assert begin is not None
    actual, done = scored(small.folder, source, tmp_path / "all", labels=True)
    times = actual["time"].to_numpy().astype("datetime64[us]").astype(np.int64)
    learnt = int((times < begin).sum())
    assert 100 < learnt < len(actual) - 100
    assert f"on {learnt:,} of the {len(actual):,} rows, so their metrics" in done.manifest["seen_in_training"]
    said = done.manifest["seen_in_training"].partition("Score with --start ")[2]
    _, done = scored(small.folder, source, tmp_path / "test", labels=True, window=(parse_time(said), None))
    assert done.manifest["seen_in_training"] is None
    assert done.manifest["rows"] == len(actual) - learnt
    _, done = scored(small.folder, source, tmp_path / "unlabelled")
    assert done.manifest["seen_in_training"] is None


def test_later_candidates_are_ranked_as_by_the_server(small: SmallModel, tmp_path: Path, fine: None) -> None:
    ranker, table = Ranker.load(small.folder), later_table()
    unread = table.drop_columns(["click", "liked", "spent", "slot"])  # labels and placement
    source = write_finely(tmp_path / "candidates", unread.slice(0, 33), unread.slice(33, 0), unread.slice(33))
    actual, done = scored(small.folder, source, tmp_path / "out", as_of="tables")
    np.testing.assert_array_equal(actual["item"], table["item"])
    assert actual["item"].nunique() > 5
    assert_ranked_alike(actual, ranker, table)
    assert list(actual) == ["request", "user", "item", "time", *PREDICTED, "score", "rank", "model", "model_version"]
    assert (actual["model"] == str(small.folder)).all()
    assert (actual["model_version"] == done.manifest["model_version"]).all()
    assert done.manifest["rows_before_tables_as_of"] == 0
    assert "their future" not in done.manifest["meaning"]


@pytest.mark.parametrize("given", [(), ("price",), ("age",)], ids=str)
def test_attributes_that_are_not_there_are_completed_as_by_the_server(
    small: SmallModel, tmp_path: Path, fine: None, given: tuple[str, ...]
) -> None:
    ranker, roles = Ranker.load(small.folder), small.settings.roles
    table = later_table()
    # One candidate that nobody knows.
    items = [10**15 if row == 3 else value for row, value in enumerate(table["item"].to_pylist())]
    table = with_column(table, "item", items)
    attributes = {*roles.user, *roles.candidate} - {"user", "item", *given}
    there = [name for name in table.column_names if name not in {*attributes, "click", "liked", "spent", "slot"}]
    source = write_finely(tmp_path / "candidates", table.select(there).slice(0, 33), table.select(there).slice(33))
    actual, done = scored(small.folder, source, tmp_path / "out", as_of="tables")
    assert_ranked_alike(actual, ranker, table, attributes)
    message = done.manifest["meaning"].partition("has no column ")[2].partition(", so the latest")[0]
    assert set(message.split(", ")) == {repr(name) for name in attributes & set(ranker.pipeline.schema.input_columns())}
    with pytest.raises(UserError, match="has no column"):
        scored(small.folder, source, tmp_path / "other", as_of="log")


def test_equal_scores_keep_the_order_of_the_rows(tmp_path: Path) -> None:
    """Many equal scores, of requests that lie in several parts, against pandas; one part has no row."""
    rng, starts = np.random.default_rng(0), {0: 0, 1: 30, 2: 31, 5: 200}
    request, score = rng.integers(0, 2**64, 20, np.uint64)[rng.integers(0, 20, 300)], rng.integers(-2, 2, 300) * 1.5
    rows = pa.table({"request": request, "score": score, "number": np.arange(300)})
    parts = rows.append_column("part", pa.array(np.repeat(list(starts), np.diff([*starts.values(), 300]))))
    (tmp_path / "out").mkdir()
    for part in starts:
        own = rows.filter(pc.equal(parts["part"], part))
        with pa.ipc.new_file(str(_scored_file(tmp_path, part)), own.schema) as file:
            file.write_table(own)
    with open_database(tmp_path / "database") as database:
        database.create_table("rows", parts.schema, [parts.take(pa.array(rng.permutation(300)))])
        written = write_ranked(database, tmp_path, tmp_path / "out", {"model": "mine"})
    assert written == {f"part-0000{part}.parquet": size for part, size in zip(starts, (30, 1, 169, 100), strict=True)}
    actual = read(tmp_path / "out")
    np.testing.assert_array_equal(actual["number"], np.arange(300))
    np.testing.assert_array_equal(actual["rank"], best_first(pd.DataFrame({"request": request, "score": score})))


def test_without_a_request_column_rows_of_a_user_and_time_are_ranked(tmp_path: Path) -> None:
    small = SmallModel(tmp_path / "work", strings=True)
    log = random_log(5, rows=200, strings=True)
    source = write_finely(tmp_path / "log", log.take(pa.array(np.random.default_rng(0).permutation(200))))
    actual, _ = scored(small.folder, source, tmp_path / "out")
    assert list(actual)[:3] == ["user", "item", "time"]
    np.testing.assert_array_equal(actual["rank"], best_first(actual, ["user", "time"]))  # type: ignore[arg-type]
    assert actual["rank"].max() > 1


def test_rows_that_the_tables_know_the_future_of_are_reported(
    small: SmallModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, later = with_requests(random_log(1, rows=600)), later_table()
    known = pa.scalar(np.datetime64(Ranker.load(small.folder).info.tables_as_of[:-6], "us").item(), pa.timestamp("us"))
    at_the_end = with_column(later, "time", pa.repeat(known.cast(UTC_MICROSECONDS), 80))
    first, second = (
        with_column(table, "request", pc.add(table["request"], number))
        for table, number in ((later, 10**6), (at_the_end, 2 * 10**6))
    )
    source = write_finely(tmp_path / "log", log, first, second)
    arguments = ["--model", str(small.folder), "--input", str(source), "--output", str(tmp_path / "out")]
    run("score", *arguments, "--as-of", "tables")
    message = capsys.readouterr().out
    assert ". 680 of 760 rows were not requested later, so their features include their future" in message
    assert f"scores: {tmp_path / 'out'}" in message
    assert json.loads((tmp_path / "out" / "_manifest.json").read_text())["rows_before_tables_as_of"] == 680
    run("score", *arguments, "--as-of", "tables")
    assert "these rows were already scored" in capsys.readouterr().out
    # The same rows may be left out, or be the past of those that are scored.
    start = np.datetime64(START + 15 * DAY, "us").item().isoformat()
    run("score", *arguments, "--as-of", "tables", "--start", start)
    assert "80 rows scored" in (message := capsys.readouterr().out)
    assert "their future" not in message
    assert len(read(tmp_path / "out")) == 80
    run("score", *arguments, "--start", start, "--data.on_duplicates", "keep")
    assert json.loads((tmp_path / "out" / "_manifest.json").read_text())["as_of"] == "log"


def test_a_table_in_a_table_out(small: SmallModel, tmp_path: Path) -> None:
    """As a notebook or Spark's `mapInArrow` asks for it: the columns of the file, but for those of whole requests."""
    table = later_table()
    ranker = Ranker.load(small.folder)
    with pytest.raises(UserError, match="the rows have no column 'request'"):  # to compare candidates
        ranker.score_table(table.drop_columns(["request", "click"]))
    actual = ranker.score_table(table.drop_columns(["click"]))
    assert actual.column_names == ["request", "user", "item", "time", *PREDICTED, "score"]
    expected, _ = scored(small.folder, write_finely(tmp_path / "log", table), tmp_path / "out", as_of="tables")
    np.testing.assert_array_equal(actual["item"].to_numpy(), table["item"].to_numpy())
    for name in (*PREDICTED, "score"):
        np.testing.assert_allclose(actual[name].to_numpy(), expected[name], rtol=1e-5, atol=1e-6)
