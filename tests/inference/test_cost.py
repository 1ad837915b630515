"""What a request costs: no more where more is remembered, and no other scores where it is faster."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch

from mmoe_rec.features.kinds.history import HistoryMemory
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.inference.scorer import Scorer
from mmoe_rec.model.products import Products, has_onednn
from mmoe_rec.point_in_time.counters import CounterMemory
from tests.inference.small_model import CONTEXT, ITEMS, USER, SmallModel


def _peak_bytes(small: SmallModel, events: int) -> int:
    """Most memory that a request takes at a time, where each memory has so many more events."""
    ranker = Ranker.load(small.folder)
    random = np.random.default_rng(0)
    keys = random.integers(0, 2**64, events, np.uint64)
    known = random.integers(1_690_000_000_000_000, 1_700_000_000_000_000, events)
    for encoder in ranker.pipeline.memory_encoders.values():
        memory = encoder.memory
        if isinstance(memory, HistoryMemory):
            encoder.memory = memory.extended(keys, known, np.zeros(events, np.int64))
        else:
            assert isinstance(memory, CounterMemory)
            labels = None if memory.label_sum is None else np.ones(events)
            encoder.memory = memory.extended(keys, known, labels)
        assert len(encoder.memory.events) > events * 0.9
    request = {"user": {"user": USER}, "context": CONTEXT, "candidates": {"item": ITEMS}}
    ranker.rank(**request)  # type: ignore[arg-type]
    tracemalloc.start()
    try:
        ranker.rank(**request)  # type: ignore[arg-type]
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_request_touches_no_more_where_ten_times_as_much_is_remembered(small: SmallModel) -> None:
    few, many = _peak_bytes(small, 20_000), _peak_bytes(small, 200_000)
    assert many < few * 1.1 + 10_000


@pytest.mark.skipif(not has_onednn(), reason="torch has no oneDNN in fp32 here")
@pytest.mark.parametrize("count", [1, 5, 16, 17, 50])
def test_faster_products_give_the_same_scores(ranker: Ranker, small: SmallModel, count: int) -> None:
    items = [int(each) * 10**17 for each in np.random.default_rng(count).integers(-5, 12, count)]
    before = ranker.rank({"user": USER}, CONTEXT, {"item": items})
    faster = Ranker.load(small.folder)
    faster.scorer.multiply_by("onednn")
    after = faster.rank({"user": USER}, CONTEXT, {"item": items})
    np.testing.assert_allclose(after.scores, before.scores, rtol=1e-5)
    assert sorted(after.order) == sorted(before.order)


@pytest.mark.skipif(not has_onednn(), reason="torch has no oneDNN in fp32 here")
@pytest.mark.parametrize(("seconds", "taken"), [((1.0, 0.9), "blas"), ((1.0, 0.5), "onednn"), ((0.5, 1.0), "blas")])
def test_other_products_must_be_clearly_faster(
    small: SmallModel, seconds: tuple[float, float], taken: Products, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([seconds[0]] * 4 + [seconds[1]] * 4)
    monkeypatch.setattr(Scorer, "_seconds", lambda *_: next(times))
    ranker = Ranker.load(small.folder)
    assert ranker.best_products() == "blas"  # as the settings say
    ranker.about = replace(ranker.about, products="auto")
    ranker.serve_faster()
    layers = {each.products for each in ranker.model.modules() if hasattr(each, "products")}
    assert (ranker.scorer.products, layers) == (taken, {taken})


def test_rows_that_fill_up_are_not_part_of_the_answer(small: SmallModel) -> None:
    ranker = Ranker.load(small.folder)
    inputs = torch.randn(37, ranker.request_inputs.width)
    expected = ranker.scorer.score(inputs)
    ranker.scorer.products = "onednn"  # rows are filled up; layers still multiply as before
    found = ranker.scorer.score(inputs)
    assert found.values.shape == expected.values.shape == (37, len(ranker.names))
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-5, atol=1e-6)
