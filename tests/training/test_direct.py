"""Tables that one process looks up by fbgemm's module itself, against torchrec's own way through ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmoe_rec.batches.batch import Batch, make_batch
from mmoe_rec.model.layout import ModelLayout
from mmoe_rec.model.tables import by_name, torchrec_tables
from mmoe_rec.training.ranks import process_group
from mmoe_rec.training.sharding import shard
from mmoe_rec.training.tables import Pooled, look_up_directly, table_batches, use_way, ways_on_offer
from tests.model.examples import LAYOUT, random_rows, small_model
from tests.training.ranks import CPU

# Inputs that share a table lie apart, and a table is wider than its neighbours.
MIXED = replace(
    LAYOUT,
    ids=(*LAYOUT.ids[3:], *LAYOUT.ids[:3]),
    tables=tuple(replace(each, dim=12 if index == 1 else each.dim) for index, each in enumerate(LAYOUT.tables)),
)


def steps(layout: ModelLayout, batch: Batch, way: Any, direct: bool) -> list[Tensor]:
    """Means of each input before and after two updates, in the layout's order, and what is stored then."""
    with process_group(CPU):
        model = (
            small_model(torchrec_tables(layout)) if layout is LAYOUT else small_model(torchrec_tables(layout), layout)
        )
        sharded = shard(model, layout, CPU, batch_size=64, table_learning_rate=0.1, way=way)
        tables = sharded.model.module.tables
        assert ("forward" in vars(tables)) is True
        if not direct:
            del tables.forward
        dims = {each.name: layout.table(each.table).dim for each in layout.ids}
        found = []
        for _ in range(3):
            sharded.table_optimizer.zero_grad()
            pooled = tables(batch.ids)
            assert isinstance(pooled, Pooled) is direct
            means = by_name(pooled, dims, batch.ragged, batch.shares)
            found += [means[each.name].detach().clone() for each in layout.ids]
            weights = torch.linspace(-1, 1, len(batch))[:, None]
            sum((number + 1) * (each * weights).sum() for number, each in enumerate(means.values())).backward()  # type: ignore[union-attr]
        (module,) = table_batches(sharded.model)
        return [*found, module.weights_host.detach().clone(), module.momentum1_host.clone()]


@pytest.mark.parametrize("way", ways_on_offer())
@pytest.mark.parametrize("layout", [LAYOUT, MIXED], ids=["layout", "mixed"])
def test_the_same_as_by_torchrec(layout: ModelLayout, way: Any) -> None:
    encoded, labels = random_rows(64)
    batch = make_batch(encoded, layout, labels, torchrec=True)
    for direct, other in zip(*(steps(layout, batch, way, each) for each in (True, False)), strict=True):
        assert direct.any()
        assert torch.equal(direct, other)


def test_a_batch_has_ids_of_one_table_side_by_side() -> None:
    encoded, _ = random_rows(8)
    ids = make_batch(encoded, MIXED, torchrec=True).ids
    names = ids.keys()
    tables = [next(each.table for each in MIXED.ids if each.name == name) for name in names]
    assert tables == sorted(tables, key=[each.name for each in MIXED.tables].index)
    assert [each.table for each in MIXED.ids] != tables
    for name, table in zip(names, tables, strict=True):
        assert (ids[name].values() < MIXED.table(table).rows).all()


def test_ids_in_another_order_are_found_by_name() -> None:
    encoded, labels = random_rows(64)
    batch = make_batch(encoded, LAYOUT, labels, torchrec=True)
    turned = replace(batch, ids=batch.ids.permute(list(reversed(range(len(batch.ids.keys()))))))
    assert turned.ids.keys() == batch.ids.keys()[::-1]
    one, other = steps(LAYOUT, batch, "fbgemm", True), steps(LAYOUT, turned, "fbgemm", True)
    assert all(map(torch.equal, one[:-2], other[:-2]))


def test_tables_that_lie_apart_are_left_to_torchrec(monkeypatch: pytest.MonkeyPatch) -> None:
    with process_group(CPU):
        sharded = shard(small_model(torchrec_tables(LAYOUT)), LAYOUT, CPU, batch_size=64, table_learning_rate=0.1)
        tables = sharded.model.module.tables
        del tables.forward
        monkeypatch.setattr(tables, "_lookups", [*tables._lookups] * 2)
        look_up_directly(sharded.model)
        assert "forward" not in vars(tables)
        use_way(sharded.model, "fbgemm")
