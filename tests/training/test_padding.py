"""Tables of widths that kernels do not take are trained as if they took them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmoe_rec.batches.batch import make_batch
from mmoe_rec.model.layout import ModelLayout
from mmoe_rec.model.tables import (
    PlainTables,
    from_stored,
    initial_rows,
    plain_tables,
    stored_width,
    to_stored,
    torchrec_tables,
)
from mmoe_rec.training.checkpoint import load_plain
from mmoe_rec.training.planning import table_bytes
from mmoe_rec.training.ranks import process_group
from mmoe_rec.training.sharding import shard
from tests.model.examples import LAYOUT, random_rows, small_model
from tests.reference.model import adagrad
from tests.training.ranks import CPU
from tests.training.saving import save_weights

RATE = 0.05
# One width that kernels take, and all remainders.
WIDTHS = {"t0": 1, "t1": 2, "t2": 7, "t3": 8, "t4": 5}


@pytest.fixture(scope="module")
def layout() -> ModelLayout:
    return replace(LAYOUT, tables=tuple(replace(table, dim=WIDTHS[table.name]) for table in LAYOUT.tables))


@pytest.mark.parametrize("dim", range(1, 13))
def test_what_is_stored_is_what_was_meant(dim: int) -> None:
    weights = torch.randn(9, dim)
    stored = to_stored(weights)
    assert stored.shape == (9, stored_width(dim))
    assert stored_width(dim) % 4 == 0
    assert 0 <= stored_width(dim) - dim < 4
    assert (stored[:, dim:] == 0).all()
    torch.testing.assert_close(from_stored(stored, dim), weights)
    if dim % 4 == 0:
        assert from_stored(stored, dim) is stored is weights


def test_tables_of_any_width_are_trained_by_row_wise_adagrad(layout: ModelLayout, tmp_path: Path) -> None:
    plain = small_model(plain_tables(layout, 3), layout)
    assert isinstance(plain.tables, PlainTables)
    momentum = {name: torch.zeros(len(weight)) for name, weight in plain.tables.named_parameters()}
    with process_group(CPU):
        sharded = shard(
            small_model(torchrec_tables(layout), layout), layout, CPU, batch_size=32, table_learning_rate=RATE, seed=3
        )
        for step in range(6):
            encoded, labels = random_rows(32, seed=step, layout=layout)
            one = plain(make_batch(encoded, layout, labels, torchrec=False)).logits
            other = sharded.model(make_batch(encoded, layout, labels, torchrec=True)).logits
            torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-4)
            for logits in (one, other):
                (logits - 1).square().sum().backward()
            for name, weight in plain.tables.named_parameters():
                assert weight.grad is not None
                adagrad(weight.data, momentum[name], weight.grad, RATE)
                weight.grad = None
            sharded.table_optimizer.step()
        save_weights(sharded.model, tmp_path / "trained")
    loaded = small_model(plain_tables(layout, 99), layout)
    load_plain(loaded, tmp_path / "trained")
    for table in layout.tables:
        name = f"tables.embedding_bags.{table.name}.weight"
        trained = loaded.state_dict()[name]
        assert trained.shape == (table.rows, table.dim)
        assert (trained - initial_rows(table, 3, 0, table.rows)).abs().max() > RATE
        torch.testing.assert_close(trained, plain.state_dict()[name], atol=1e-5, rtol=1e-4)


def test_plans_count_what_is_stored(layout: ModelLayout) -> None:
    stored = {"t0": 4, "t1": 4, "t2": 8, "t3": 8, "t4": 8}
    for table in layout.tables:
        assert table_bytes(table) == 4 * table.rows * (stored[table.name] + 1)
