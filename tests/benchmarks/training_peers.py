"""One peer's training, in an environment that holds torch and the peers: see `tests/benchmarks/training.py`.

Each peer trains with its own loader, model and loop, as its documentation shows, and with Adam. What its model can't be
without (torch-rechub's batch normalisation), it keeps.
"""

import contextlib
import io
import json
import sys
import tempfile
import time
from typing import Any

import numpy as np
import torch

from tests.benchmarks.peers.mixtures import deepctr_mixture, rechub_mixture
from tests.benchmarks.training_rows import BATCH, DIM, ID_NAMES, NUMBER_NAMES, TASKS, Clock, TrainingRows, draw


def rechub(rows: TrainingRows, table_rows: int, seconds: float) -> float:
    """Rows a second of torch-rechub."""
    from torch_rechub.basic.features import DenseFeature, SparseFeature
    from torch_rechub.trainers import MTLTrainer
    from torch_rechub.utils.data import DataGenerator

    features = [SparseFeature(name, vocab_size=table_rows, embed_dim=DIM) for name in ID_NAMES]
    features += [DenseFeature(name) for name in NUMBER_NAMES]
    columns = rows.by_name()
    model = rechub_mixture(features, TASKS)
    few = {name: column[:BATCH] for name, column in columns.items()}
    loader, _, _ = DataGenerator(columns, rows.labels).generate_dataloader(
        few, rows.labels[:BATCH], few, rows.labels[:BATCH], batch_size=BATCH
    )
    clock = Clock(seconds)
    with tempfile.TemporaryDirectory() as folder:
        trainer = MTLTrainer(model, ["classification"] * TASKS, n_epoch=1, model_path=folder)
        trainer.train_one_epoch(clock.watch(loader))
    return clock.rows_per_s


def deepctr(rows: TrainingRows, table_rows: int, seconds: float) -> float:
    """Rows a second of DeepCTR-Torch; one short training tells how many rows the time allows."""
    from deepctr_torch.inputs import DenseFeat, SparseFeat

    features: list[Any] = [SparseFeat(name, vocabulary_size=table_rows, embedding_dim=DIM) for name in ID_NAMES]
    features += [DenseFeat(name, 1) for name in NUMBER_NAMES]
    model = deepctr_mixture(features, [f"task{index}" for index in range(TASKS)])

    def fit(count: int) -> float:
        columns = {name: column[:count] for name, column in rows.by_name().items()}
        started = time.perf_counter()
        model.fit(columns, rows.labels[:count], batch_size=BATCH, epochs=1, verbose=0)
        return count / (time.perf_counter() - started)

    speed = fit(3 * BATCH)
    batches = int(np.clip(seconds * speed / BATCH, 3, len(rows.labels) // BATCH))
    return fit(batches * BATCH)


def main() -> None:
    """Trains and prints rows a second."""
    peer, table_rows, row_count, seconds = sys.argv[1], *map(int, sys.argv[2:5])
    rows = draw(row_count, table_rows)
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        speed = {"rechub": rechub, "deepctr": deepctr}[peer](rows, table_rows, seconds)
    print(json.dumps(speed))


if __name__ == "__main__":
    main()
