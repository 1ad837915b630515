"""What `explain` adds to a reply, against the trained model run by hand and loops over the log."""

import json
import math
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mmoe_rec.batches.batch import make_batch
from mmoe_rec.errors import UserError
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.inference.ranking import Explanation, Ranking
from mmoe_rec.log.rows import LogRows
from tests.inference.small_model import CONTEXT, ITEMS, USER, SmallModel, as_request
from tests.log.small_logs import DAY, START
from tests.reference.log import in_units

TASKS = ("click", "liked", "spent")


def by_hand(small: SmallModel, rows: LogRows) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, T) and gates (N, T, E) of the model that was trained, by the whole past's features."""
    batch = make_batch(small.full_pipeline().encode(rows), small.model_layout, torchrec=False)
    with torch.inference_mode():
        outputs = small.model(batch)
    return outputs.logits.numpy(), outputs.routings[-1].weights.numpy()


def explained(ranking: Ranking) -> list[Explanation]:
    assert ranking.explanations is not None
    assert len(ranking.explanations) == len(ranking.order)
    return ranking.explanations


@pytest.mark.parametrize("top_k", [None, 4])
def test_calibration_and_gates_equal_the_model_run_by_hand(
    small: SmallModel, calibrated: Ranker, top_k: int | None
) -> None:
    table, rows = small.later_rows()
    logits, gates = by_hand(small, rows)
    ranking = calibrated.rank(**as_request(table), explain=True, top_k=top_k)
    assert len(ranking.order) == (top_k or len(rows))
    for place, item in zip(ranking.order, explained(ranking), strict=True):
        before = [*(1 / (1 + np.exp(-logits[place, :2]))), logits[place, 2]]
        after = 1 / (1 + np.exp(1.5 - 0.6 * logits[place, 0]))
        np.testing.assert_allclose([item.uncalibrated[name] for name in TASKS], before, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(item.calibrated["click"], after, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose([item.gates[name] for name in TASKS], gates[place], atol=1e-6)
    for name in TASKS:
        assert [item.calibrated[name] for item in explained(ranking)] == ranking.predictions[name]


def test_gates_of_fewer_experts(ranker: Ranker) -> None:
    ranking = ranker.rank({"user": USER}, CONTEXT, {"item": ITEMS}, mask_experts=[1], gate_top_k=1, explain=True)
    for item in explained(ranking):
        for weights in item.gates.values():
            assert weights[1] == 0
            assert sorted(weights) == pytest.approx([0, 0, 1])


def test_one_gate_for_all_tasks_is_shown_for_each(tmp_path: Any) -> None:
    plain = {"bottom": {"units": [16]}, "experts": {"count": 3, "units": [8]}, "towers": {"units": [4]}}
    small = SmallModel(tmp_path, model={**plain, "gates": {"per_task": False}})
    (first, *_) = explained(Ranker.load(small.folder).rank({"user": USER}, CONTEXT, {"item": ITEMS}, explain=True))
    assert first.gates["click"] == first.gates["liked"] == first.gates["spent"]
    assert sum(first.gates["click"]) == pytest.approx(1)


def test_counters_and_histories_equal_loops_over_the_log(small: SmallModel, ranker: Ranker) -> None:
    log = pq.read_table(f"{small.settings.data.log}/0.parquet").to_pylist()
    table, _ = small.later_rows()
    request = as_request(table)
    moment = table["time"][0].as_py()
    training = [row for row in log if row["time"].timestamp() * 1e6 < START + 6 * DAY]

    def mean(rows: list[dict[str, Any]], label: str) -> float:
        return float(np.mean([in_units(row[label]) for row in rows if row[label] is not None]))

    def rate(rows: list[dict[str, Any]], label: str) -> float:
        known = [in_units(row[label]) for row in rows if row[label] is not None]
        return (sum(known) + 20 * mean(training, label)) / (len(known) + 20)

    clicked = [row["item"] for row in log if row["user"] == USER and row["click"] == 1]
    ranking = ranker.rank(**request, explain=True)
    brands = 0
    for place, entry in zip(ranking.order, explained(ranking), strict=True):
        item, brand = (request["candidates"][name][place] for name in ("item", "brand"))
        of_item = [row for row in log if row["item"] == item]
        positive = [row["time"] for row in of_item if row["click"] == 1]
        observed = [row for row in of_item if row["click"] is not None]
        expected: dict[str, float | None] = {
            "item_click_log_sum": math.log1p(len(positive)),
            "item_click_log_count": math.log1p(len(observed)),
            "item_click_rate": rate(of_item, "click"),
            "item_click_recency": None,
            "item_click_log_sum_1d": 0.0,
        }
        if positive:
            expected["item_click_recency"] = math.log1p((moment - max(positive)).total_seconds() / 86_400)
        if brand is not None:
            brands += 1
            expected["brand_spent_rate"] = rate([row for row in log if row["brand"] == brand], "spent")
        for name, value in expected.items():
            assert entry.counters[name] == pytest.approx(value, rel=1e-9), name
        assert entry.histories["clicked"] == clicked[-3:]
    assert brands > 3


def test_given_values_are_shown_and_nothing_found_is_null(ranker: Ranker) -> None:
    unknown = 10**17 + 1
    user = {"user": 12345, "clicked": [1, None, ITEMS[0], unknown, 4]}
    candidates = {"item": [unknown, ITEMS[0]], "brand_spent_rate": [0.25, None]}
    ranking = ranker.rank(user, CONTEXT, candidates, explain=True)
    by_place = dict(zip(ranking.order, explained(ranking), strict=True))
    assert by_place[0].counters["brand_spent_rate"] == 0.25
    assert by_place[1].counters["brand_spent_rate"] is None
    assert by_place[0].counters["item_click_recency"] is None
    assert by_place[0].counters["item_click_log_sum"] == 0
    assert by_place[0].histories == {"clicked": [ITEMS[0], unknown, 4], "liked_items": None, "liked_items_brand": None}
    json.dumps(ranking.to_dict(), allow_nan=False)
    encoders = ranker.pipeline.point_in_time_encoders.values()
    shown = {*by_place[0].counters, *by_place[0].histories}
    assert shown == {name for encoder in encoders for name in encoder.result_columns()}


def test_lists_that_an_explanation_shows_can_be_given(ranker: Ranker) -> None:
    for user in range(-7, 8):  # the first one whose lists are whole
        known = ranker.rank({"user": user}, CONTEXT, {"item": ITEMS}, explain=True)
        lists = explained(known)[0].histories
        if len(lists["liked_items_brand"] or ()) == 2 and None not in lists["liked_items_brand"]:
            break
    assert ranker.rank({"user": user, **lists}, CONTEXT, {"item": ITEMS}).scores == known.scores
    second = {"user": user, **lists, "liked_items_brand": [f"not {brand}" for brand in lists["liked_items_brand"]]}
    assert ranker.rank(second, CONTEXT, {"item": ITEMS}).scores != known.scores
    for change, said in (
        (
            {"liked_items_brand": lists["liked_items_brand"][:1]},
            "as lists that are equally long in each row, without nulls",
        ),
        ({"liked_items_brand": None}, "give all of liked_items, liked_items_brand"),
    ):
        given = {name: item for name, item in {**lists, **change}.items() if item is not None}
        with pytest.raises(UserError, match=said):
            ranker.rank({"user": user, **given}, CONTEXT, {"item": ITEMS})


def test_without_explain_nothing_is_added_or_computed(ranker: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("computed unasked")

    monkeypatch.setattr(type(ranker.pipeline), "explain", refuse)
    for options in ({}, {"explain": False}, {"explain": None}):
        ranking = ranker.rank({"user": USER}, CONTEXT, {"item": ITEMS}, **options)
        assert ranking.explanations is None
        assert "explanations" not in ranking.to_dict()
