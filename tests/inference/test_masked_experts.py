"""A request is answered without the experts that it masks."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.inference.ranking import Ranking
from tests.inference.small_model import CONTEXT, ITEMS, USER, SmallModel

EXPERTS = 3
WAYS = {
    "soft": {},
    "top_k": {"gates": {"routing": "top_k", "top_k": 2}},
    "task experts": {"experts": {"count": 1, "task_count": 1, "units": [8]}},
    "two levels": {"experts": {"count": 1, "task_count": 1, "levels": 2, "units": [8]}},
}


@pytest.fixture(scope="module", params=list(WAYS))
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    plain = {"bottom": {"units": [16]}, "experts": {"count": EXPERTS, "units": [8]}, "towers": {"units": [4]}}
    return SmallModel(tmp_path_factory.mktemp("small"), model={**plain, **WAYS[request.param]})


@pytest.fixture(scope="module")
def ranker(small: SmallModel) -> Ranker:
    return Ranker.load(small.folder)


def rank(ranker: Ranker, **options: Any) -> Ranking:
    return ranker.rank({"user": USER}, CONTEXT, {"item": ITEMS}, **options)


def values(ranking: Ranking) -> np.ndarray:
    """(N, T) predictions in the request's order."""
    best_first = np.array(list(ranking.predictions.values())).T
    return best_first[np.argsort(ranking.order)]


def experts_of(small: SmallModel) -> int:
    return int(small.model.visible_experts.shape[1])


def test_each_expert_may_be_masked_and_the_other_weights_are_renormalised(
    small: SmallModel, ranker: Ranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, rankings = values(rank(ranker)), [rank(ranker, mask_experts=[index]) for index in range(experts_of(small))]
    np.testing.assert_array_equal(values(rank(ranker)), whole)
    assert all(ranking.warnings == [] for ranking in rankings)
    assert not any(np.allclose(values(ranking), whole, atol=1e-7) for ranking in rankings)
    monkeypatch.setattr(ranker.scorer, "fused", None)  # which keeps the weights that were loaded
    for gates in ranker.model.mixture.gates:
        gates.masked[0] = True
    permanent = values(rank(ranker))
    for gates in ranker.model.mixture.gates:
        gates.masked[0] = False
    np.testing.assert_allclose(values(rankings[0]), permanent, atol=1e-6)


def test_an_expert_that_gives_no_numbers_is_an_error_until_it_is_masked(
    small: SmallModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranker = Ranker.load(small.folder)
    expected = values(rank(ranker, mask_experts=[0]))
    monkeypatch.setattr(ranker.scorer, "fused", None)  # which keeps the weights that were loaded
    for parameter in ranker.model.mixture.expert_levels()[-1].experts[0].parameters():
        parameter.data = parameter.index_fill(0, torch.tensor([0]), math.nan)
    with pytest.raises(RuntimeError, match="gives predictions that are not finite numbers"):
        rank(ranker)
    np.testing.assert_array_equal(values(rank(ranker, mask_experts=[0])), expected)


def test_with_all_experts_lost_the_answer_is_flagged(small: SmallModel, ranker: Ranker) -> None:
    ranking = rank(ranker, mask_experts=list(range(experts_of(small))))
    actual = values(ranking)
    assert np.isfinite(actual).all()
    np.testing.assert_allclose(actual, np.broadcast_to(actual[0], actual.shape), rtol=1e-5)
    assert (np.ptp(values(rank(ranker)), axis=0) > 1e-4).all(), "with experts, candidates differ"
    assert ranking.warnings == [
        f"no expert is left for '{task}': its prediction is the same for every candidate" for task in ranker.task_names
    ]


def test_fewer_experts_serve_when_asked_for(small: SmallModel, ranker: Ranker) -> None:
    seen = int(small.model.visible_experts[0].sum())
    whole = values(rank(ranker))
    first = values(rank(ranker, gate_top_k=1))
    assert not np.allclose(first, whole, atol=1e-7)
    # The shared gate of a first level sees more experts than a task does.
    if small.settings.model.gates.routing == "soft" and small.settings.model.experts.levels == 1:
        np.testing.assert_allclose(values(rank(ranker, gate_top_k=seen)), whole, atol=1e-6)
