"""The Ranker against the offline path, what a request may leave out or give, and the order of the reply."""

import json
from datetime import UTC, datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mmoe_rec.batches.batch import make_batch
from mmoe_rec.errors import UserError
from mmoe_rec.inference.artifact import read_artifact
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.inference.request_reader import Request
from mmoe_rec.log.columns import UTC_MICROSECONDS
from mmoe_rec.log.request_values import iso_time
from mmoe_rec.log.rows import LogRows
from mmoe_rec.model.score import compute_log_scores, predictions
from mmoe_rec.task_kinds import find_kind
from tests.batches.encoded_files import columns_of
from tests.inference.small_model import CONTEXT, ITEMS, USER, SmallModel, as_request
from tests.log.small_logs import DAY, random_log, times_of

KINDS = [find_kind(name) for name in ("binary", "binary", "regression")]


def offline(small: SmallModel, rows: LogRows) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and log scores by the whole past's features and the model that was trained."""
    batch = make_batch(small.full_pipeline().encode(rows), small.model_layout, torchrec=False)
    with torch.inference_mode():
        logits = small.model(batch).logits
    weights = [task.score_weight for task in small.settings.tasks.values()]
    return predictions(logits, KINDS).numpy(), compute_log_scores(logits, KINDS, weights).numpy()


def in_request_order(ranking: object, ranker: Ranker) -> tuple[np.ndarray, np.ndarray]:
    """Predictions (N, T) and scores (N,) of a whole ranking in the order in which candidates were given."""
    tree = ranking.to_dict()  # type: ignore[attr-defined]
    back = np.argsort(tree["order"])
    values = np.array([tree["predictions"][task.name] for task in ranker.info.tasks]).T
    return values[back], np.array(tree["scores"])[back]


def test_rows_and_the_same_as_json_equal_the_offline_path(small: SmallModel, ranker: Ranker) -> None:
    table, rows = small.later_rows()
    values, log_scores = ranker.score(rows)
    expected, expected_scores = offline(small, rows)
    np.testing.assert_allclose(values, expected, atol=1e-6)
    np.testing.assert_allclose(log_scores, expected_scores, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(ranker.score(rows.table)[1], log_scores)
    served, scores = in_request_order(ranker.rank(**json.loads(json.dumps(as_request(table)))), ranker)
    np.testing.assert_allclose(served, expected, atol=1e-6)
    np.testing.assert_allclose(scores, np.exp(expected_scores), rtol=1e-5)


def test_score_reads_a_table_as_the_log_is_read(small: SmallModel, ranker: Ranker) -> None:
    """Types that say the same, such as pandas writes, give the same scores; what is missing is named."""
    _, rows = small.later_rows()
    expected = ranker.score(rows)[1]
    same = {
        pa.string(): pa.large_string(),
        pa.int64(): pa.int64(),
        pa.timestamp("us", "UTC"): pa.timestamp("ns", "UTC"),
    }
    columns = {name: rows.table[name] for name in rows.table.column_names}
    second = pa.table({name: item.cast(same.get(item.type, item.type)) for name, item in columns.items()})
    np.testing.assert_array_equal(ranker.score(second)[1], expected)
    coded = pa.table(
        {n: e.combine_chunks().dictionary_encode() if e.type == pa.string() else e for n, e in columns.items()}
    )
    np.testing.assert_array_equal(ranker.score(coded)[1], expected)
    (label, *_) = {task.label for task in ranker.pipeline.schema.tasks.values()}
    unread = second.drop_columns([label] if label in second.column_names else [])
    unread = unread.append_column(label, pa.array(["not read"] * len(second)))
    np.testing.assert_array_equal(ranker.score(unread)[1], expected)
    key = ranker.pipeline.schema.columns.candidate
    with pytest.raises(UserError, match=f"the rows have no column '{key}', which the model's features read"):
        ranker.score(second.drop_columns([key]))
    number = pa.array(np.arange(len(second)) / 7)
    with pytest.raises(UserError, match=f"column '{key}' must hold integers or strings, found double"):
        ranker.score(second.set_column(second.column_names.index(key), key, number))


def test_predictions_are_calibrated(small: SmallModel, calibrated: Ranker) -> None:
    table, rows = small.later_rows()
    plain, _ = offline(small, rows)
    x = np.log(plain[:, :2] / (1 - plain[:, :2]))
    beyond = 2 * (np.minimum(x[:, 1] + 0.2, 0) + np.maximum(x[:, 1] - 0.5, 0))
    liked = np.interp(x[:, 1], (-0.2, 0.1, 0.5), (-2.0, -1.9, 1.0)) + beyond
    expected = np.stack([*(1 / (1 + np.exp(-item)) for item in (0.6 * x[:, 0] - 1.5, liked)), plain[:, 2]], axis=1)
    values, log_scores = calibrated.score(rows)
    np.testing.assert_allclose(values, expected, atol=2e-6)
    weights = [task.score_weight for task in small.settings.tasks.values()]
    np.testing.assert_allclose(log_scores, np.log(np.maximum(expected, 1e-6)) @ weights, atol=1e-4)
    served, scores = in_request_order(calibrated.rank(**json.loads(json.dumps(as_request(table)))), calibrated)
    np.testing.assert_allclose(served, values, atol=1e-6)
    np.testing.assert_allclose(scores, np.exp(log_scores), rtol=1e-5)


def test_ids_alone_equal_offline_rows_with_latest_values(small: SmallModel, ranker: Ranker) -> None:
    ranking = ranker.rank({"user": USER}, CONTEXT, {"item": ITEMS})
    latest = {}
    for row in pq.read_table(f"{small.settings.data.log}/0.parquet").to_pylist():
        latest["item", row["item"]] = row
        latest["user", row["user"]] = row
    unknown = {"brand": None, "price": None, "tags": None}
    given = [latest.get(("item", item), unknown) for item in ITEMS]
    table = pa.table(
        {
            "user": pa.array([USER] * len(ITEMS)),
            "item": pa.array(ITEMS),
            "age": pa.array([latest["user", USER]["age"]] * len(ITEMS)),
            "time": _times(CONTEXT["time"], len(ITEMS)),
            "born": _times(CONTEXT["born"] + "+00:00", len(ITEMS)),
            **{name: pa.array([row[name] for row in given]) for name in unknown},
        }
    )
    expected, expected_scores = offline(small, LogRows(table, small.settings.schema_))
    values, scores = in_request_order(ranking, ranker)
    np.testing.assert_allclose(values, expected, atol=1e-6)
    np.testing.assert_allclose(scores, np.exp(expected_scores), rtol=1e-5)
    assert ranking.request_time == "2023-11-29T11:00:00+00:00"


def _times(text: str, rows: int) -> pa.Array:
    return pa.array([datetime.fromisoformat(text).astimezone(UTC)] * rows, UTC_MICROSECONDS)


def encoded_inputs(ranker: Ranker, **request: object) -> dict[str, list]:
    """What the model is given, by name of the input, for the first candidate."""
    rows = ranker.reader.rows([Request(**request)])  # type: ignore[arg-type]
    table = columns_of(ranker.pipeline.encode(rows), ranker.layout)
    return {name: values.to_pylist() for name, values in table.items()}


@pytest.mark.parametrize(
    ("part", "given", "changed"),
    [
        ("candidates", {"price": [123.0, None]}, ["dense.price", "dense.price_log", "id.price_bucket"]),
        ("candidates", {"tags": [["x"], []]}, ["id.tags"]),
        ("candidates", {"item_click_rate": [0.9, 0.1]}, ["dense.item_click_rate"]),
        ("candidates", {"user_brand_liked_recency": [None, 1.0]}, ["dense.user_brand_liked_recency"]),
        ("user", {"clicked": [0, 0, 0, 10**17, 2 * 10**17, 3 * 10**17]}, ["id.clicked"]),
        ("user", {"clicked": []}, ["id.clicked"]),
        ("context", {"born": "2001-01-01"}, ["id.born_weekday", "dense.born_age"]),
    ],
)
def test_given_values_win(ranker: Ranker, part: str, given: dict, changed: list[str]) -> None:
    plain = {"user": {"user": USER}, "context": {"time": CONTEXT["time"]}, "candidates": {"item": ITEMS[:2]}}
    before = encoded_inputs(ranker, **plain)
    after = encoded_inputs(ranker, **{**plain, part: {**plain[part], **given}})  # type: ignore[dict-item]
    different = {name.removesuffix("_missing") for name in before if before[name] != after[name]}
    compared = {name for name in different if name.startswith("dense.among_")}  # Compares these numbers, too.
    assert different - compared == set(changed)
    assert bool(compared) == (not {"price", "item_click_rate"}.isdisjoint(given))


def test_a_given_history_keeps_its_last_candidates(ranker: Ranker) -> None:
    items = [10**17 * i for i in (1, 2, 3, 4, 5)]
    request = {"context": {}, "candidates": {"item": [0]}}
    long = encoded_inputs(ranker, user={"user": 1, "clicked": [*items, None]}, **request)
    short = encoded_inputs(ranker, user={"user": 1, "clicked": items[-3:]}, **request)
    assert long["id.clicked"] == short["id.clicked"]
    assert len(long["id.clicked"][0]) == 3


def test_best_first_and_top_k(ranker: Ranker) -> None:
    items = [ITEMS[0], ITEMS[1], ITEMS[0], *ITEMS]
    ranking = ranker.rank({"user": USER}, CONTEXT, {"item": items})
    assert ranking.scores == sorted(ranking.scores, reverse=True)
    assert [items[i] for i in ranking.order] == ranking.candidates
    twins = [i for i in ranking.order if items[i] == ITEMS[0]]
    assert twins == sorted(twins)
    top = ranker.rank({"user": USER}, CONTEXT, {"item": items}, top_k=2)
    assert top.order == ranking.order[:2]
    assert top.scores == pytest.approx(ranking.scores[:2])
    assert ranker.rank({"user": USER}, CONTEXT, {"item": items}, top_k=500).order == ranking.order


def test_request_time_is_now_unless_given(ranker: Ranker) -> None:
    now = np.datetime64("now")
    ranking = ranker.rank({"user": USER}, {}, {"item": ITEMS})
    assert 0 <= (np.datetime64(ranking.request_time[:19]) - now).astype(int) < 60


@pytest.mark.parametrize(
    ("given", "weights"),
    [
        (None, [1.0, 1.0, 1.0]),
        ({}, [1.0, 1.0, 1.0]),
        ({"satisfaction": 0.5}, [1.0, 0.5, 1.0]),
        ({"engagement": 0, "click": 3}, [0.0, 1.0, 0.0]),
        ({"engagement": 2, "click": 3}, [6.0, 1.0, 2.0]),
        ({"click": 0, "liked": 0.25, "spent": 0}, [0.0, 0.25, 0.0]),
    ],
)
def test_task_weights(ranker: Ranker, given: dict | None, weights: list[float]) -> None:
    ranking = ranker.rank({"user": USER}, CONTEXT, {"item": ITEMS}, task_weights=given)
    values = np.array(list(ranking.predictions.values())).T
    values[:, 2] = np.maximum(values[:, 2], 1e-6)
    np.testing.assert_allclose(ranking.scores, np.prod(values ** np.array(weights), axis=1), rtol=1e-4)


@pytest.mark.parametrize(("weight", "scores"), [(1e6, {0.0}), (1e-300, {1.0})])
def test_lists_are_merged_by_log_scores_whatever_the_weights(ranker: Ranker, weight: float, scores: set) -> None:
    weights = {"click": weight, "liked": 0, "spent": -0.0}
    ranking = ranker.rank({"user": USER}, CONTEXT, {"item": ITEMS}, task_weights=weights)
    reply = json.loads(json.dumps(ranking.to_dict(), allow_nan=False))
    clicks = in_request_order(ranking, ranker)[0][:, 0]
    assert (np.diff(clicks[reply["order"]]) < 1e-5).all()
    assert np.ptp(clicks) > 1e-4
    assert set(reply["scores"]) == scores, "which would lose the order"
    np.testing.assert_allclose(reply["log_scores"], weight * np.log(clicks[reply["order"]]), rtol=1e-4)
    parts = [ranker.rank({"user": USER}, CONTEXT, {"item": part}, weights) for part in (ITEMS[:2], ITEMS[2:])]
    merged = sorted(chain(*(zip(item.log_scores, item.candidates, strict=True) for item in parts)), reverse=True)
    assert [candidate for _, candidate in merged] == reply["candidates"]


def test_string_ids(tmp_path: Path) -> None:
    ranker = Ranker.load(SmallModel(tmp_path, strings=True).folder)
    ranking = ranker.rank({"user": "id 5"}, CONTEXT, {"item": ["id 0", "nobody knows", "ünknown ✓"]})
    assert sorted(ranking.candidates) == ["id 0", "nobody knows", "ünknown ✓"]


# Requests before the end of the model's log, and long after it.


FUTURE, STALE = "They include its future", "they are stale"


def at(ranker: Ranker, moment: int) -> Any:
    return ranker.rank({"user": USER}, {"time": iso_time(moment)}, {"item": ITEMS}, explain=True)


def test_before_the_first_exact_moment_answers_are_as_of_it(ranker: Ranker) -> None:
    last = int(times_of(random_log(1, rows=600)).max())
    before, then = at(ranker, last + 1 - DAY // 2), at(ranker, last + 1)
    for first, second in zip(_by_place(before), _by_place(then), strict=True):
        assert (first.counters, first.histories) == (second.counters, second.histories)
    later = at(ranker, last + 3 * DAY)
    assert any(a.counters != b.counters for a, b in zip(_by_place(then), _by_place(later), strict=True))


def _by_place(ranking: Any) -> list[Any]:
    return [item for _, item in sorted(zip(ranking.order, ranking.explanations, strict=True), key=lambda pair: pair[0])]


def asked(ranker: Ranker, later: timedelta) -> list[str]:
    """Warnings for a request so much later than `tables_as_of`."""
    moment = datetime.fromisoformat(ranker.info.tables_as_of) + later
    return ranker.rank({"user": USER}, {"time": moment.isoformat()}, {"item": ITEMS}).warnings


@pytest.mark.parametrize(
    ("later", "sentence"),
    [
        (timedelta(microseconds=-1), FUTURE),
        (timedelta(0), FUTURE),  # of which the labels are known
        (timedelta(microseconds=1), None),
        (timedelta(days=7), None),
        (timedelta(days=7, microseconds=1), STALE),
    ],
    ids=str,
)
def test_a_time_that_does_not_fit_is_reported_once(ranker: Ranker, later: timedelta, sentence: str | None) -> None:
    actual = asked(ranker, later)
    if sentence is None:
        assert actual == []
        return
    (message,) = actual
    assert sentence in message
    known = datetime.fromisoformat(ranker.info.tables_as_of)
    assert f"{known.isoformat()}," in message
    assert f"the request's time {(known + later).isoformat()} is" in message


@pytest.mark.parametrize("days", [0.5, None])
def test_the_setting_travels_with_the_artifact(tmp_path: Path, days: float | None) -> None:
    small = SmallModel(tmp_path, serving={"matmul_backend": "blas", "stale_after_days": days})
    assert read_artifact(small.folder).stale_after_days == days
    ranker = Ranker.load(small.folder)
    assert asked(ranker, timedelta(hours=11)) == []
    (message,) = asked(ranker, timedelta(hours=13)) or ["never"]
    assert ("more than 0.5 days after" in message) == (days is not None)
    assert bool(asked(ranker, timedelta(days=4000))) == (days is not None)
    assert FUTURE in asked(ranker, -timedelta(seconds=1))[0]
