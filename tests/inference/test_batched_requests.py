"""Requests answered together against each of them alone; what is looked up once against a row for each candidate."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from mmoe_rec.batches.batch import make_batch
from mmoe_rec.errors import RequestError
from mmoe_rec.inference import ranker as rankers
from mmoe_rec.inference import scorer
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.inference.ranking import Ranking
from mmoe_rec.inference.request_reader import Request
from mmoe_rec.log.rows import LogRows
from mmoe_rec.model import attention
from mmoe_rec.model.matmul import MatmulBackend, has_onednn
from tests.inference.small_model import CONTEXT, ITEMS, USER, SmallModel


def request(user: Any, candidates: Any, context: Any = CONTEXT, **options: Any) -> Request:
    """A request, in a shorter way."""
    return Request(user=user, context=context, candidates=candidates, **options)


WRONG = [
    request({"user": "5"}, {"item": ITEMS}),
    request({}, {"item": ITEMS}),
    request({"user": 5}, {"item": []}),
    request({"user": 5}, {"item": ITEMS, "price": [1.0]}),
    request({"user": 5}, {"item": ITEMS}, gate_top_k=99),
    request({"user": 5}, {"item": ITEMS}, {"time": "soon"}),
]


def drawn(random: np.random.Generator) -> Request:
    """A request with some of the columns that it may give, some of them null."""
    count = int(random.integers(1, 8))
    user: dict[str, Any] = {"user": int(random.integers(0, 12))}
    context: dict[str, Any] = {"time": f"2023-11-{random.integers(20, 30)}T{random.integers(0, 24):02}:00:00"}
    candidates: dict[str, Any] = {"item": [int(integer) * 10**17 for integer in random.integers(-5, 12, count)]}
    if random.random() < 0.3:
        user["age"] = [None, 30, 41.5][random.integers(3)]
    if random.random() < 0.3:
        user["clicked"] = [int(integer) * 10**17 for integer in random.integers(0, 5, random.integers(0, 5))]
    if random.random() < 0.3:
        context["born"] = [None, "2001-02-03"][random.integers(2)]
    if random.random() < 0.3:
        candidates["price"] = [None if random.random() < 0.3 else float(item) for item in random.normal(size=count)]
    if random.random() < 0.2:
        candidates["item_click_rate"] = random.random(count).tolist()
    options: dict[str, Any] = {}
    if random.random() < 0.3:
        options["top_k"] = int(random.integers(1, 9))
    if random.random() < 0.3:
        options["task_weights"] = {"click": float(random.random())}
    if random.random() < 0.2:
        options["mask_experts"] = [int(random.integers(3))]
    if random.random() < 0.5:
        options["explain"] = bool(random.integers(2))
    return request(user, candidates, context, **options)


def assert_same(answer: Ranking | RequestError, alone: Ranking | RequestError) -> None:
    """Equal but for the last bits, which differ with the number of rows."""
    assert type(answer) is type(alone)
    if isinstance(answer, RequestError) or isinstance(alone, RequestError):
        assert str(answer) == str(alone)
        return
    np.testing.assert_allclose(answer.scores, alone.scores, rtol=1e-5)
    # Candidates that are equal but for the last bits may change places.
    actual, expected = _by_place(answer), _by_place(alone)
    for place in actual.keys() & expected.keys():
        assert actual[place][0] == expected[place][0]
        np.testing.assert_allclose(actual[place][1:], expected[place][1:], rtol=1e-5, atol=1e-6)
    assert (answer.explanations is None) == (alone.explanations is None)
    shown, message = (dict(zip(item.order, item.explanations or (), strict=False)) for item in (answer, alone))
    for place in shown.keys() & message.keys():
        first, second = shown[place], message[place]
        assert (first.counters, first.histories) == (second.counters, second.histories)
        for task in first.gates:
            np.testing.assert_allclose(first.gates[task], second.gates[task], atol=1e-6)
            np.testing.assert_allclose(first.uncalibrated[task], second.uncalibrated[task], rtol=1e-5, atol=1e-6)
    assert (answer.request_time, answer.tables_as_of) == (alone.request_time, alone.tables_as_of)
    assert answer.warnings == alone.warnings


def _by_place(ranking: Ranking) -> dict[int, tuple[Any, ...]]:
    rows = zip(ranking.candidates, ranking.scores, *ranking.predictions.values(), strict=True)
    return dict(zip(ranking.order, rows, strict=True))


@pytest.mark.parametrize("rows_at_a_time", [7, rankers.FEATURE_BATCH_ROWS])
def test_answers_do_not_depend_on_neighbours(
    ranker: Ranker, rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(rows_at_a_time)
    requests = [drawn(random) for _ in range(60)]
    for place, wrong in zip(random.integers(0, 60, len(WRONG)), WRONG, strict=True):
        requests.insert(int(place), wrong)
    alone = [ranker.rank_many([request])[0] for request in requests]
    assert sum(isinstance(item, RequestError) for item in alone) == len(WRONG)
    monkeypatch.setattr(rankers, "FEATURE_BATCH_ROWS", rows_at_a_time)
    monkeypatch.setattr(scorer, "CHUNK_ROWS", min(rows_at_a_time, scorer.CHUNK_ROWS))
    for answer, expected in zip(ranker.rank_many(requests), alone, strict=True):
        assert_same(answer, expected)


def test_requests_alike_share_one_pass(ranker: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    score = scorer.Scorer.score

    def counted(self: scorer.Scorer, inputs: torch.Tensor, *choice: Any) -> scorer.Scored:
        runs.append(len(inputs))
        return score(self, inputs, *choice)

    monkeypatch.setattr(scorer.Scorer, "score", counted)
    ranker.rank_many([request({"user": user}, {"item": ITEMS}) for user in range(20)])
    assert runs == [20 * len(ITEMS)]


def test_what_is_looked_up_once_equals_a_row_for_each_candidate(
    ranker: Ranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_PAIRS", 7)  # fewer than a request has
    random, layout = np.random.default_rng(5), ranker.layout
    dims = {item.name: layout.table(item.table).dim for item in layout.ids}
    names = [name for name in layout.id_names(placement=False) for _ in range(dims[name])]
    histories = [item.history for item in layout.attention]
    seen, looked_at = 0, np.isin([*names, *layout.dense_names(placement=False)], histories)
    for _ in range(20):
        requests = [request({"user": int(user)}, drawn(random).candidates) for user in random.permutation(12)[:4]]
        columns = {tuple(request.candidates) for request in requests}
        for same in columns:
            rows = ranker.reader.rows([item for item in requests if tuple(item.candidates) == same])
            actual = ranker.input_builder.build_matrix(*ranker.pipeline.request_inputs(rows), rows.request_index)
            table = pa.table({name: rows.raw_column(name) for name in (*rows._columns, *rows.shared._columns)})
            batch = make_batch(ranker.pipeline.encode(LogRows(table, rows.schema)), ranker.layout, torchrec=False)
            expected = ranker.model.concat_inputs(batch)[0].detach()
            # What attention adds is summed in another order, and in pieces.
            others = ~looked_at
            np.testing.assert_allclose(actual[:, others], expected[:, others], rtol=1e-6, atol=1e-7)
            np.testing.assert_allclose(actual[:, looked_at], expected[:, looked_at], rtol=1e-6, atol=2e-6)
            seen += int((actual[:, looked_at] != 0).sum())
    assert seen > 100


# What a request costs: no more where more is remembered, and no other scores where it is faster


@pytest.mark.skipif(not has_onednn(), reason="torch has no oneDNN in fp32 here")
@pytest.mark.parametrize(("setting", "taken"), [("auto", "onednn"), ("onednn", "onednn"), ("blas", "blas")])
def test_products_are_those_of_the_setting(small: SmallModel, setting: str, taken: MatmulBackend) -> None:
    ranker = Ranker.load(small.folder)
    ranker.apply_serving_settings({"matmul_backend": setting})
    before = ranker.rank({"user": USER}, CONTEXT, {"item": ITEMS})
    ranker.apply_matmul_backend()
    layers = {module.matmul_backend for module in ranker.model.modules() if hasattr(module, "matmul_backend")}
    assert (ranker.scorer.matmul_backend, layers) == (taken, {taken})
    after = ranker.rank({"user": USER}, CONTEXT, {"item": ITEMS})
    np.testing.assert_allclose(after.scores, before.scores, rtol=1e-5)
    assert (after.scores == before.scores) == (taken == "blas")
