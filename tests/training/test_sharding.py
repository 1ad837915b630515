"""One rank, two ranks and the plain model agree, before and after a training step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmoe_rec.batches.batch import Batch, make_batch
from mmoe_rec.errors import UserError
from mmoe_rec.model.layout import ModelLayout
from mmoe_rec.model.tables import plain_tables, torchrec_tables
from mmoe_rec.training.checkpoint import load_plain
from mmoe_rec.training.ranks import process_group
from mmoe_rec.training.sharding import shard
from tests.model.examples import LAYOUT, is_weight, random_rows, small_model
from tests.training.ranks import CPU, ROWS, SEED, join_and_train, spawn, train_one_step
from tests.training.saving import save_weights


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one_rank")
    with process_group(CPU):
        train_one_step(folder)
    return folder


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two_ranks")
    spawn(join_and_train, folder)
    return folder


def read(folder: Path, rank: int = 0) -> dict[str, Any]:
    saved: dict[str, Any] = torch.load(folder / f"rank{rank}.pt")
    return saved


def plain_batch() -> Batch:
    encoded, labels = random_rows(ROWS)
    return make_batch(encoded, LAYOUT, labels, torchrec=False)


def test_first_outputs_agree(one_rank: Path, two_ranks: Path) -> None:
    plain = small_model(plain_tables(LAYOUT, SEED)).eval()(plain_batch()).logits
    torch.testing.assert_close(read(one_rank)["logits"], plain, atol=1e-6, rtol=0)
    both = torch.cat([read(two_ranks, rank)["logits"] for rank in (0, 1)])
    torch.testing.assert_close(both, plain, atol=1e-6, rtol=0)


def test_the_order_of_sharded_outputs_follows_the_plan(one_rank: Path, two_ranks: Path) -> None:
    """The trap that picking inputs by name avoids: had the order stayed the same, the test above would prove less."""
    names = [each.name for each in LAYOUT.ids]
    assert sorted(read(two_ranks)["order"]) == sorted(names)
    assert read(two_ranks)["order"] != names
    plan = read(two_ranks)["plan"]
    assert "rank 0" in plan
    assert "rank 1" in plan
    assert len(plan.splitlines()) == len(LAYOUT.tables)


def test_one_step_gives_the_same_weights(one_rank: Path, two_ranks: Path) -> None:
    first, one, two = (small_model(plain_tables(LAYOUT, seed)) for seed in (SEED, 98, 99))
    load_plain(one, one_rank / "after")
    load_plain(two, two_ranks / "after")
    for name, weights in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], weights, atol=1e-6, rtol=0, msg=f"{name} differs")
        assert torch.equal(first.state_dict()[name], weights) != is_weight(name), f"{name} was not trained"


def test_a_checkpoint_of_two_ranks_holds_the_first_weights(two_ranks: Path) -> None:
    first, loaded = (small_model(plain_tables(LAYOUT, seed)) for seed in (SEED, 99))
    load_plain(loaded, two_ranks / "before")
    for name, weights in first.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weights), name


def test_a_layout_without_tables(tmp_path: Path) -> None:
    layout = ModelLayout((), (), LAYOUT.dense, LAYOUT.tasks)
    encoded, labels = random_rows(8, layout=layout)
    batch = make_batch(encoded, layout, labels, torchrec=True)
    with process_group(CPU):
        sharded = shard(
            small_model(torchrec_tables(layout), layout), layout, CPU, batch_size=8, table_learning_rate=0.1
        )
        assert sharded.plan == ""
        logits = sharded.model(batch).logits
        logits.sum().backward()
        sharded.table_optimizer.step()
        save_weights(sharded.model, tmp_path / "model")
    plain = small_model(plain_tables(layout), layout)
    load_plain(plain, tmp_path / "model")
    torch.testing.assert_close(plain(make_batch(encoded, layout, torchrec=False)).logits, logits)


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no complete checkpoint"):
        load_plain(small_model(plain_tables(LAYOUT)), tmp_path / "none")
