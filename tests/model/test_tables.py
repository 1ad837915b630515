"""Embedding tables: the plain form against torchrec's, and their reproducible first weights."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from mmoe_rec.batches.batch import make_batch
from mmoe_rec.features.encoded import Encoded
from mmoe_rec.model import tables as tables_module
from mmoe_rec.model.layout import EmbeddingTable
from mmoe_rec.model.tables import INITIAL_DEVIATION, by_name, initial_rows, plain_tables, torchrec_tables
from mmoe_rec.point_in_time.lists import Ragged
from tests.model.examples import LAYOUT, random_rows

DIMS = {each.name: LAYOUT.table(each.table).dim for each in LAYOUT.ids}


@pytest.mark.parametrize("seed", range(3))
def test_plain_tables_equal_torchrec(seed: int) -> None:
    encoded, labels = random_rows(23, seed)
    plain = plain_tables(LAYOUT, seed)
    collection = torchrec_tables(LAYOUT, "cpu")
    assert list(plain.state_dict()) == list(collection.state_dict())
    collection.load_state_dict(plain.state_dict())
    ours = plain(make_batch(encoded, LAYOUT, labels, torchrec=False).ids)
    batch = make_batch(encoded, LAYOUT, labels, torchrec=True)
    theirs = by_name(collection(batch.ids), DIMS, batch.ragged, batch.shares)
    assert ours.keys() == theirs.keys()
    for name, means in ours.items():
        torch.testing.assert_close(means, theirs[name], atol=1e-7, rtol=0)


@pytest.mark.parametrize("longest", [0, 1, 2, 9])
def test_gradients_equal_those_of_plain_means(longest: int) -> None:
    """Ids repeated in a row and between rows and inputs, empty rows; inputs all of whose rows have one id."""
    random = np.random.default_rng(longest)
    encoded, _ = random_rows(31, longest)
    history = random.integers(0, longest + 1, 31).astype(np.int32)
    ids = {**encoded.ids, "tags": Ragged(random.integers(0, 90, 31), np.ones(31, np.int32))}
    ids["history"] = Ragged(random.integers(0, 5, history.sum()), history)
    encoded = Encoded(ids, encoded.dense)
    plain, collection = plain_tables(LAYOUT), torchrec_tables(LAYOUT, "cpu")
    collection.load_state_dict(plain.state_dict())
    batch = make_batch(encoded, LAYOUT, torchrec=True)
    assert batch.ragged == ("history",)
    ours = plain(make_batch(encoded, LAYOUT, torchrec=False).ids)
    theirs = by_name(collection(batch.ids), DIMS, batch.ragged, batch.shares)
    into = {name: torch.randn(each.shape) for name, each in ours.items()}
    for pooled in (ours, theirs):
        torch.stack([(pooled[name] * each).sum() for name, each in into.items()]).sum().backward()
    for one, other in zip(plain.parameters(), collection.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-5)


def test_an_input_without_ids_gives_zeros() -> None:
    encoded, _ = random_rows(50)
    empty = encoded.ids["tags"].lengths == 0  # type: ignore[union-attr]
    assert empty.any()
    pooled = plain_tables(LAYOUT)(make_batch(encoded, LAYOUT, torchrec=False).ids)["tags"].detach().numpy()
    assert not pooled[empty].any()
    assert np.abs(pooled[~empty]).min(1).all()


def test_first_weights_do_not_depend_on_how_rows_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables_module, "BLOCK_ROWS", 7)
    table = EmbeddingTable("t", 40, 3)
    whole = initial_rows(table, 1, 0, 40)
    for bounds in ([0, 20, 40], [0, 7, 14, 40], [0, 5, 6, 33, 40]):
        parts = [initial_rows(table, 1, a, b) for a, b in pairwise(bounds)]
        assert torch.equal(torch.cat(parts), whole)


def test_first_weights_differ_by_seed_table_and_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables_module, "BLOCK_ROWS", 500)
    table = EmbeddingTable("t", 1000, 8)
    weights = initial_rows(table, 1, 0, 1000)
    assert weights.std().item() == pytest.approx(INITIAL_DEVIATION, rel=0.05)
    others = [
        initial_rows(table, 2, 0, 1000),
        initial_rows(EmbeddingTable("u", 1000, 8), 1, 0, 1000),
        weights.roll(500, 0),
    ]
    for other in others:
        assert abs(np.corrcoef(weights.flatten(), other.flatten())[0, 1]) < 0.1
