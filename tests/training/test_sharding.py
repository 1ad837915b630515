"""One rank, two ranks and the plain model agree, before and after a training step."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from mmoe_rec.batches.batch import Batch, make_batch
from mmoe_rec.errors import StopRequest, UserError
from mmoe_rec.model.tables import PlainTables, torchrec_tables
from mmoe_rec.settings.training import Training
from mmoe_rec.training.checkpoint import load_unsharded
from mmoe_rec.training.distributed import process_group
from mmoe_rec.training.sharding import Cluster, Optimizers, ShardedModel, ShardingPlanner, shard, table_bytes
from mmoe_rec.training.steps import StepRunner
from tests.model.examples import LAYOUT, is_weight, random_rows, small_model
from tests.training.learnable import write_prepared
from tests.training.ranks import CPU, ROWS, SEED, join, join_and_train, save_weights, spawn, train_one_step
from tests.training.resuming import record_losses


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
    return torch.load(folder / f"rank{rank}.pt")


def plain_batch() -> Batch:
    encoded, labels = random_rows(ROWS)
    return make_batch(encoded, LAYOUT, labels, torchrec=False)


def test_first_outputs_agree(one_rank: Path, two_ranks: Path) -> None:
    plain = small_model(PlainTables(LAYOUT, SEED)).eval()(plain_batch()).logits
    torch.testing.assert_close(read(one_rank)["logits"], plain, atol=1e-6, rtol=0)
    both = torch.cat([read(two_ranks, rank)["logits"] for rank in (0, 1)])
    torch.testing.assert_close(both, plain, atol=1e-6, rtol=0)


def test_the_order_of_sharded_outputs_follows_the_plan(one_rank: Path, two_ranks: Path) -> None:
    """The trap that picking inputs by name avoids: had the order stayed the same, the test above would prove less."""
    names = [lookup_input.name for lookup_input in LAYOUT.lookup_inputs()]
    assert sorted(read(two_ranks)["order"]) == sorted(names)
    assert read(two_ranks)["order"] != names
    plan = read(two_ranks)["plan"]
    assert "rank 0" in plan
    assert "rank 1" in plan
    assert len(plan.splitlines()) == len(LAYOUT.tables)


def test_ranks_hold_as_many_bytes_as_their_plan_says(one_rank: Path, two_ranks: Path) -> None:
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for folder, ranks in ((one_rank, 1), (two_ranks, 2)):
        model = small_model(torchrec_tables(LAYOUT))
        _, planned = ShardingPlanner(
            LAYOUT, Cluster(ranks, ranks, "cpu", 0, host), ROWS // ranks, Training()
        ).estimate_plan(model)
        held = [read(folder, rank)["bytes"] for rank in range(ranks)]
        assert [item.table_bytes for item in planned] == held
        assert sum(held) == sum(table_bytes(table) for table in LAYOUT.tables)


def test_one_step_gives_the_same_weights(one_rank: Path, two_ranks: Path) -> None:
    first, left, two = (small_model(PlainTables(LAYOUT, seed)) for seed in (SEED, 98, 99))
    load_unsharded(left, one_rank / "after")
    load_unsharded(two, two_ranks / "after")
    for name, weights in left.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], weights, atol=1e-6, rtol=0, msg=f"{name} differs")
        assert torch.equal(first.state_dict()[name], weights) != is_weight(name), f"{name} was not trained"


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no complete checkpoint"):
        load_unsharded(small_model(PlainTables(LAYOUT)), tmp_path / "none")


def _fail_at_first_and_leave_rank_0_alone(rank: int, world: int, port: int, folder: Path) -> None:
    def work() -> None:
        raise UserError("no log")

    try:
        with join(rank, world, port) as ranks:
            with pytest.raises(UserError, match=r"^no log$"):
                ranks.run_on_first_rank(work)
            dist.all_reduce(torch.ones(1))
            if rank == 1:
                os._exit(0)
            dist.all_reduce(torch.ones(1))
    except UserError as error:
        (folder / "said").write_text(str(error))


def test_ranks_learn_why_the_first_has_failed_and_that_one_is_lost(tmp_path: Path) -> None:
    spawn(_fail_at_first_and_leave_rank_0_alone, tmp_path)
    said = (tmp_path / "said").read_text()
    assert said.startswith("Another of 2 ranks ended or doesn't respond, so rank 0 stops (")


def test_split_columns_are_those_of_whole_rows(tmp_path: Path) -> None:
    """In the sums that are looked up, and in the model that is served."""
    encoded, labels = random_rows(ROWS)
    batch = make_batch(encoded, LAYOUT, labels, torchrec=True)
    plain = small_model(PlainTables(LAYOUT, SEED)).eval()
    before, spread = (
        plain(plain_batch()).logits,
        Training(sharding="column_wise", shard_columns=4, table_learning_rate=0.1, seed=SEED),
    )
    with process_group(CPU):
        sharded = shard(
            small_model(torchrec_tables(LAYOUT)),
            LAYOUT,
            CPU,
            batch_size=ROWS,
            settings=spread,
        )
        assert "item: column_wise (rank 0: 60 rows of 4 columns)" in sharded.plan
        model = sharded.model.eval()
        logits = model(batch).logits
        torch.testing.assert_close(logits, before, atol=1e-6, rtol=0)
        logits.square().sum().backward()
        after = model(batch).logits.detach()
        save_weights(model, tmp_path / "after")
    load_unsharded(plain, tmp_path / "after")
    torch.testing.assert_close(plain(plain_batch()).logits, after, atol=1e-6, rtol=0)
    assert (after - before).abs().max() > 1e-3


def test_the_model_is_given_back_between_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the pipeline that is made where there is a GPU."""
    monkeypatch.setattr(ShardedModel, "pipelined", True)
    encoded, labels = random_rows(3 * ROWS)
    parts = [np.arange(part * ROWS, (part + 1) * ROWS) for part in range(3)]
    first, second, third = (make_batch(encoded.take(item), LAYOUT, labels[item], torchrec=True) for item in parts)
    with process_group(CPU):
        sharded = shard(small_model(torchrec_tables(LAYOUT)), LAYOUT, CPU, batch_size=ROWS, settings=Training())
        steps = StepRunner(
            sharded, Optimizers(sharded, Training()), LAYOUT, CPU, bf16=False, max_grad_norm=1.0, stop=StopRequest()
        )
        assert type(steps._pipeline) is TrainPipelineSparseDist
        for part in ([first, second], [third]):
            batches = iter(part)
            for _ in part:
                step = steps.run_next(batches, 1.0)
                assert step is not None
                assert step.nonfinite is None
            assert steps.run_next(batches, 1.0) is None
            steps.detach()
            with torch.no_grad():
                logits = sharded.model.module.eval()(third).logits
            sharded.model.module.train()
            assert logits.isfinite().all()


# Trainings of 200 steps on one, two and four ranks, stopped after 100 and gone on with on as many or another number.


COLUMNS = {"sharding": "column_wise", "shard_columns": 4}
RANKS = (1, 2, 4)


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """(steps, T) losses of all ranks together, by the numbers of ranks before and after, and of two ranks by what they
    send each other. Another number of ranks goes on for 20 steps.

    The columns of wider tables are split, so that these are on several ranks, and row-wise Adagrad has several numbers
    for a row.
    """
    folder = tmp_path_factory.mktemp("losses")
    prepared = write_prepared(folder / "prepared", LAYOUT)
    for ranks in RANKS:
        spawn(record_losses, prepared, [(folder / f"{ranks}", 101, COLUMNS)], ranks=ranks)
    for ranks in RANKS:
        for before in RANKS:
            shutil.copytree(folder / f"{before}", folder / f"{before}-{ranks}")
        jobs = [(folder / f"{before}-{ranks}", None if before == ranks else 120, COLUMNS) for before in RANKS]
        if ranks == 2:
            jobs.append((folder / "bf16", None, COLUMNS | {"communication_dtype": "bf16"}))
        spawn(record_losses, prepared, jobs, ranks=ranks)
    actual = {}
    for file in folder.glob("*/losses.json"):
        by_step = json.loads(file.read_text())
        actual[file.parent.name] = torch.tensor([by_step[f"{step + 1}"] for step in range(len(by_step))])
    return actual


@pytest.mark.thorough
@pytest.mark.parametrize("after", RANKS)
@pytest.mark.parametrize("before", RANKS)
def test_any_number_of_ranks_has_the_same_losses(losses: dict[str, torch.Tensor], before: int, after: int) -> None:
    actual = losses[f"{before}-{after}"]
    assert len(actual) == (200 if before == after else 120)
    torch.testing.assert_close(actual, losses["1-1"][: len(actual)], atol=1e-5, rtol=0)


@pytest.mark.thorough
def test_half_of_the_bits_change_losses_by_little(losses: dict[str, torch.Tensor]) -> None:
    error = (losses["bf16"] - losses["1-1"]).abs().max()
    assert 1e-5 < error < 5e-3, error
