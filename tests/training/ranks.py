"""What each rank of `test_sharding` does. A module of its own so that spawned processes can import it."""

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from mmoe_rec.batches.batch import make_batch
from mmoe_rec.model.tables import mean_embeddings, torchrec_tables
from mmoe_rec.settings.training import Training
from mmoe_rec.training.distributed import RankContext, process_group
from mmoe_rec.training.losses import masked_loss
from mmoe_rec.training.sharding import ShardedModel, shard
from tests.fork_server import call
from tests.model.examples import LAYOUT, random_rows, small_model
from tests.processes import until

ROWS = 64
SEED = 3
CPU = torch.device("cpu")


def name_rank(rank: int, world: int, port: int) -> None:
    """Puts into the environment what torchrun does."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(number) for name, number in numbers.items()}, MASTER_ADDR="127.0.0.1")


@contextmanager
def join(rank: int, world: int, port: int) -> Iterator[RankContext]:
    """The group of ranks."""
    name_rank(rank, world, port)
    torch.set_num_threads(1)
    with process_group(CPU) as ranks:
        yield ranks


def spawn(work: Callable[..., None], *arguments: object, ranks: int = 2) -> None:
    """Runs `work(rank, ranks, port, *arguments)` in as many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [call(work, rank, ranks, port, *arguments) for rank in range(ranks)]
    try:
        until(
            lambda: any(process.poll() for process in processes) or all(process.poll() == 0 for process in processes),
            pause=0.05,
        )
        failed = next((process for process in processes if process.returncode), None)
        assert failed is None, failed and failed.stderr
    finally:
        for process in processes:
            process.kill()


def join_and_train(rank: int, world: int, port: int, folder: Path) -> None:
    """One step on one of several ranks."""
    with join(rank, world, port):
        train_one_step(folder)


def train_one_step(folder: Path) -> None:
    """Shards the model, scores this rank's rows, takes one step, and saves everything to compare."""
    rank, world = dist.get_rank(), dist.get_world_size()
    share = ROWS // world
    sharded = shard(
        small_model(torchrec_tables(LAYOUT)),
        LAYOUT,
        CPU,
        batch_size=share,
        settings=Training(table_learning_rate=0.05, seed=SEED),
    )
    encoded, labels = random_rows(ROWS)
    mine = torch.arange(rank * share, (rank + 1) * share).numpy()
    batch = make_batch(encoded.take(mine), LAYOUT, labels[mine], torchrec=True)
    sharded.model.eval()
    with torch.no_grad():
        logits = sharded.model(batch).logits
        module = sharded.model.module
        order = list(mean_embeddings(module.tables(batch.ids), module.dims, (), None))

    dense = torch.optim.SGD(sharded.dense_parameters().values(), lr=0.1)
    sharded.model.train()
    counts = batch.observed.sum(0)
    dist.all_reduce(counts)
    loss, _ = masked_loss(
        sharded.model(batch).logits,
        batch.labels,
        batch.observed,
        tasks=LAYOUT.tasks,
        global_counts=counts,
        world_size=world,
    )
    loss.backward()
    dense.step()
    sharded.table_optimizer.step()
    save_weights(sharded.model, folder / "after")
    read = {"logits": logits, "order": order, "plan": sharded.plan, "bytes": held_bytes(sharded)}
    torch.save(read, folder / f"rank{rank}.pt")


def held_bytes(sharded: ShardedModel) -> int:
    """What this rank holds of the tables and of their optimizer."""
    tables = [item for name, item in sharded.model.state_dict().items() if name.startswith("tables.")]
    states = [value for state in sharded.table_optimizer.state_dict()["state"].values() for value in state.values()]
    local = [
        shard.tensor if hasattr(shard, "tensor") else shard
        for table in [*tables, *states]
        for shard in (table.local_shards() if hasattr(table, "local_shards") else [table])
    ]
    return sum(item.numel() * item.element_size() for item in local)


def save_weights(model: nn.Module, folder: Path) -> None:
    """Writes what `load_unsharded` reads. A collective call."""
    import torch.distributed.checkpoint as dcp

    shutil.rmtree(folder, ignore_errors=True)
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder)
