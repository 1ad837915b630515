"""How small a gain test rows can show: the error of an AUC over users, and the rows that it is taken from."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from mmoe_rec.auc import FEWEST
from mmoe_rec.profiling import health_counts
from mmoe_rec.profiling.forecast import PAIRED, Drawn, forecast, influence_on_auc
from mmoe_rec.profiling.health_counts import RATE_SMOOTHING, collect
from tests.profiling import encoded_data
from tests.profiling.encoded_data import SCHEMA, random_frames, write


def drawn_rows(seed: int, users: int, rows_of_each: int, share: float = 1.0) -> Drawn:
    """Rows of users of one taste each, by which labels of a user are alike; one number that tells most of them."""
    random = np.random.default_rng(seed)
    rows = users * rows_of_each
    user = np.arange(rows) % users
    number = random.normal(size=rows) + random.normal(size=users)[user]
    positive = number + random.normal(size=users)[user] + random.logistic(size=rows) > 1
    values = np.column_stack([number, random.normal(size=rows)]).astype(np.float32)
    is_test = user < users // 2
    return Drawn(values, np.empty((rows, 0, 1), np.float32), positive[:, None].astype(np.float32), user, is_test, share)


def test_influence_is_that_of_a_plain_loop_and_its_error_that_of_redrawn_users():
    random = np.random.default_rng(3)
    user = random.integers(0, 40, 400)
    prediction = (random.normal(size=400) + random.normal(size=40)[user]).round(1)  # with ties
    positive = prediction + random.logistic(size=400) > 0.5
    auc, influence = influence_on_auc(prediction, positive, user, 40)
    assert auc == pytest.approx(roc_auc_score(positive, prediction))
    expected = np.zeros(40)
    pairs = positive.sum() * (~positive).sum()
    for one in np.flatnonzero(positive):
        for other in np.flatnonzero(~positive):
            won = float(prediction[one] > prediction[other]) + 0.5 * float(prediction[one] == prediction[other])
            expected[user[one]] += (won - auc) / pairs
            expected[user[other]] += (won - auc) / pairs
    assert influence == pytest.approx(expected, abs=1e-12)
    redrawn = []
    for _ in range(200):
        rows = np.concatenate([np.flatnonzero(user == each) for each in random.integers(0, 40, 40)])
        redrawn.append(roc_auc_score(positive[rows], prediction[rows]))
    error = float(np.sqrt((influence**2).sum() * 40 / 39))
    assert error == pytest.approx(np.std(redrawn), rel=0.2)


def test_a_quick_model_is_near_the_best_and_its_interval_falls_with_the_users():
    small, large = (forecast(drawn_rows(5, users, 20), [0]) for users in (200, 3200))
    assert small is not None
    assert large is not None
    drawn = drawn_rows(5, 3200, 20)
    label, number = (each[drawn.is_test] for each in (drawn.positive[:, 0], drawn.values[:, 0]))
    assert large.auc == pytest.approx(roc_auc_score(label, number), abs=0.002)
    assert large.error == pytest.approx(small.error / 4, rel=0.25)
    assert 1.9 * PAIRED * large.error < large.half_width < 2.1 * PAIRED * large.error < large.detectable
    quarter = forecast(drawn_rows(5, 3200, 20, share=0.25), [0])
    assert quarter is not None
    assert quarter.error == pytest.approx(large.error / 2)


def test_numbers_that_are_not_finite_and_copies_of_a_feature_do_no_harm():
    rows = drawn_rows(9, 400, 20)
    spoilt = np.hstack([rows.values, rows.values, np.full((len(rows.user), 1), 3, np.float32)])
    spoilt[::500, 1] = np.inf
    spoilt[1::500, 1] = np.nan
    plain, found = (forecast(Drawn(**{**vars(rows), "values": each}), [0]) for each in (rows.values, spoilt))
    assert plain is not None
    assert found is not None
    assert found.auc == pytest.approx(plain.auc, abs=0.002)


def test_nothing_is_foretold_from_too_few_labels_or_of_one_user():
    rows = drawn_rows(6, 100, 20)
    rare = rows.positive.copy()
    rare[np.flatnonzero(rows.is_test & (rare[:, 0] == 1))[FEWEST - 1 :]] = 0
    for few in ({"positive": rare}, {"user": np.zeros_like(rows.user)}, {"values": rows.values[:, :0]}):
        assert forecast(Drawn(**{**vars(rows), **few}), [0]) is None


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
    found = forecast(drawn, [0])
    assert found is not None
    assert found.auc == pytest.approx(norm.cdf(0.5 / np.sqrt(2)), abs=0.03)  # of normal scores, half a deviation apart


def test_rows_are_drawn_by_whole_users_with_what_their_ids_say(tmp_path, monkeypatch):
    frames = random_frames(7)
    whole = collect(write(tmp_path / "whole", frames), SCHEMA, tmp_path / "scratch").drawn
    assert (whole.share, len(whole.user)) == (1.0, len(frames["validation"]) + len(frames["test"]))
    train, rows = frames["train"], pd.concat([frames["validation"], frames["test"]])
    overall = train["label.click"].mean()
    means = train.groupby("id.item")["label.click"].agg(["sum", "count"])
    rate = (means["sum"] + RATE_SMOOTHING * overall) / (means["count"] + RATE_SMOOTHING)
    expected = pd.DataFrame({"rate": rows["id.item"].map(rate).fillna(overall), "price": rows["dense.price"]})
    found = pd.DataFrame({"rate": whole.rates[:, 0, 0], "price": whole.values[:, 0]})
    of_rows, of_frames = (each.round(5).sort_values(["price", "rate"]).to_numpy() for each in (found, expected))
    assert of_rows == pytest.approx(of_frames, abs=1e-4)
    monkeypatch.setattr(health_counts, "MOST_ROWS", {"validation": 1000, "test": 1000})
    monkeypatch.setattr(health_counts, "LEAST_USERS", 10)
    some = collect(write(tmp_path / "some", frames), SCHEMA, tmp_path / "scratch").drawn
    assert some.share == 1 / 3
    sizes = np.bincount(some.user[some.is_test])
    assert set(sizes[sizes > 0]) <= set(frames["test"].groupby("user").size())
