"""Embedding tables: the plain form against torchrec's, and their reproducible first weights."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from mmoe_rec.batches.batch import make_batch
from mmoe_rec.model import tables as tables_module
from mmoe_rec.model.layout import EmbeddingTable
from mmoe_rec.model.tables import INITIAL_DEVIATION, initial_rows, plain_tables, torchrec_tables
from tests.model.examples import LAYOUT, random_rows


@pytest.mark.parametrize("seed", range(3))
def test_plain_tables_equal_torchrec(seed: int) -> None:
    encoded, labels = random_rows(23, seed)
    plain = plain_tables(LAYOUT, seed)
    collection = torchrec_tables(LAYOUT, "cpu")
    assert list(plain.state_dict()) == list(collection.state_dict())
    collection.load_state_dict(plain.state_dict())
    ours = plain(make_batch(encoded, LAYOUT, labels, torchrec=False).ids)
    theirs = collection(make_batch(encoded, LAYOUT, labels, torchrec=True).ids)
    for each in LAYOUT.ids:
        torch.testing.assert_close(ours[each.name], theirs[each.name], atol=1e-7, rtol=0)


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
