"""The quick model of a task, and the rows that it is fitted and measured on."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from mmoe_rec.auc import FEWEST
from mmoe_rec.profiling import health_counts
from mmoe_rec.profiling.health_counts import RATE_SMOOTHING, Drawn, collect, measure_quick_model
from tests.profiling import encoded_data
from tests.profiling.encoded_data import SCHEMA, random_frames, write


def drawn_rows(seed: int, users: int, rows_of_each: int) -> Drawn:
    """Rows of users of one taste each, by which labels of a user are alike; one number that tells most of them."""
    random = np.random.default_rng(seed)
    rows = users * rows_of_each
    user = np.arange(rows) % users
    number = random.normal(size=rows) + random.normal(size=users)[user]
    positive = number + random.normal(size=users)[user] + random.logistic(size=rows) > 1
    values = np.column_stack([number, random.normal(size=rows)]).astype(np.float32)
    is_test = user < users // 2
    return Drawn(values, np.empty((rows, 0, 1), np.float32), positive[:, None].astype(np.float32), user, is_test)


def test_a_quick_model_is_near_the_best_and_its_error_falls_with_the_users():
    small, large = (measure_quick_model(drawn_rows(5, users, 20), 0) for users in (200, 3200))
    assert small is not None
    assert large is not None
    drawn = drawn_rows(5, 3200, 20)
    label, number, user = (each[drawn.is_test] for each in (drawn.positive[:, 0], drawn.values[:, 0], drawn.user))
    assert large["auc"] == pytest.approx(roc_auc_score(label, number), abs=0.002)
    rows = [label[user == each] for each in range(1600)], [number[user == each] for each in range(1600)]
    within = [roc_auc_score(*pair) for pair in zip(*rows, strict=True) if 0 < pair[0].mean() < 1]
    assert large["gauc_user"] == pytest.approx(np.mean(within), abs=0.002)
    assert large["gauc_error"] == pytest.approx(np.std(within) / np.sqrt(len(within)), rel=0.05)
    assert large["gauc_error"] == pytest.approx(small["gauc_error"] / 4, rel=0.25)


def test_numbers_that_are_not_finite_and_copies_of_a_feature_do_no_harm():
    rows = drawn_rows(9, 400, 20)
    spoilt = np.hstack([rows.values, rows.values, np.full((len(rows.user), 1), 3, np.float32)])
    spoilt[::500, 1] = np.inf
    spoilt[1::500, 1] = np.nan
    plain, found = (measure_quick_model(replace(rows, values=each), 0) for each in (rows.values, spoilt))
    assert plain is not None
    assert found is not None
    assert found["auc"] == pytest.approx(plain["auc"], abs=0.002)


def test_nothing_is_measured_on_too_few_labels_nor_within_users_of_one_label():
    rows = drawn_rows(6, 100, 20)
    rare = rows.positive.copy()
    rare[np.flatnonzero(rows.is_test & (rare[:, 0] == 1))[FEWEST - 1 :]] = 0
    assert measure_quick_model(replace(rows, positive=rare), 0) is None
    assert measure_quick_model(replace(rows, values=rows.values[:, :0]), 0) is None
    alone = measure_quick_model(replace(rows, user=np.arange(len(rows.user))), 0)
    assert alone is not None
    assert alone["auc"] > 0.5
    assert alone["gauc_user"] is alone["gauc_error"] is None


def test_placement_features_are_left_out_because_serving_lacks_them(tmp_path, monkeypatch):
    """Placement nearly gives the label away. Of the others, the counter's rate alone says more than chance."""
    frames, random = random_frames(7), np.random.default_rng(1)
    for frame in frames.values():
        shown = (frame["label.click"] == 1) ^ (random.random(len(frame)) < 0.05)
        frame["dense.price"], frame["id.item"] = shown.astype(float), shown.astype(int)
        frame["dense.item_click_rate"] = frame["label.click"] + 2 * random.normal(size=len(frame))
        frame[["id.tags", "id.user_item"]] = frame[["id.tags", "id.user_item"]].to_numpy()[::-1]
    placement = {"price", "price_missing", "item"}
    parts = {
        name: tuple(replace(each, placement=each.name in placement) for each in getattr(encoded_data.LAYOUT, name))
        for name in ("ids", "dense")
    }
    monkeypatch.setattr(encoded_data, "LAYOUT", replace(encoded_data.LAYOUT, **parts))
    drawn = collect(write(tmp_path / "data", frames), SCHEMA, tmp_path / "scratch").drawn
    found = measure_quick_model(drawn, 0)
    assert found is not None
    assert found["auc"] == pytest.approx(
        norm.cdf(0.5 / np.sqrt(2)), abs=0.03
    )  # of normal scores, half a deviation apart


def test_rows_are_drawn_by_whole_requests_with_what_their_ids_say(tmp_path, monkeypatch):
    frames = random_frames(7)
    whole = collect(write(tmp_path / "whole", frames), SCHEMA, tmp_path / "scratch").drawn
    assert len(whole.user) == len(frames["validation"]) + len(frames["test"])
    train, rows = frames["train"], pd.concat([frames["validation"], frames["test"]])
    overall = train["label.click"].mean()
    means = train.groupby("id.item")["label.click"].agg(["sum", "count"])
    rate = (means["sum"] + RATE_SMOOTHING * overall) / (means["count"] + RATE_SMOOTHING)
    expected = pd.DataFrame({"rate": rows["id.item"].map(rate).fillna(overall), "price": rows["dense.price"]})
    found = pd.DataFrame({"rate": whole.rates[:, 0, 0], "price": whole.values[:, 0]})
    of_rows, of_frames = (each.round(5).sort_values(["price", "rate"]).to_numpy() for each in (found, expected))
    assert of_rows == pytest.approx(of_frames, abs=1e-4)
    monkeypatch.setattr(health_counts, "MOST_ROWS", {"validation": 1000, "test": 1000})
    some = collect(write(tmp_path / "some", frames), SCHEMA, tmp_path / "scratch").drawn
    assert [some.is_test.sum(), (~some.is_test).sum()] == pytest.approx([1000, 1000], rel=0.15)
    test = frames["test"]
    is_drawn = test["dense.item_click_rate"].astype(np.float32).isin(some.values[some.is_test, 5])
    assert set(is_drawn.groupby(test["request"]).mean()) == {0, 1}
