"""One peer's multi-gate mixture-of-experts, trained on rows of `rows.py` by its own loop, in the peers' environment:

    python -m tests.benchmarks.peers.trained PEER FOLDER EPOCHS BATCH SEED OUT

The peers can't leave out a label that is not known. So tasks that are known of the same rows are predicted by a
training of their own, on these rows only; what is not known of other tasks is learnt as 0. After each epoch the
validation rows are predicted; what counts is the state with the highest mean AUC there of the training's tasks. OUT
gets the predictions (N, T) of the test rows, as .npy; the last line is JSON: task -> its state's epoch and AUC.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from tests.benchmarks.peers.mixtures import deepctr_mixture, rechub_mixture
from tests.benchmarks.training_rows import DIM

SPLITS = ("train", "validation", "test")
Epoch = Callable[[], tuple[np.ndarray, np.ndarray]]


class Rows:
    """What was written: `inputs`, and of each split its `columns`, name -> array, and `labels` (N, T)."""

    def __init__(self, folder: Path) -> None:
        about = json.loads((folder / "inputs.json").read_text(encoding="utf-8"))
        self.ids, self.numbers, self.tasks = about["ids"], about["numbers"], about["tasks"]
        names = [*self.ids, *(["numbers"] if self.numbers else [])]
        self.columns = {split: {name: np.load(folder / f"{split}.{name}.npy") for name in names} for split in SPLITS}
        self.labels = {split: np.load(folder / f"{split}.labels.npy") for split in SPLITS}

    def known_together(self) -> list[list[int]]:
        """The places of tasks that are known of the same training rows."""
        groups: dict[bytes, list[int]] = {}
        for task, known in enumerate(~np.isnan(self.labels["train"]).T):
            groups.setdefault(known.tobytes(), []).append(task)
        return list(groups.values())

    def known(self, task: int) -> Rows:
        """The same with those training rows only whose label of the task is known."""
        kept = copy.copy(self)
        chosen = ~np.isnan(self.labels["train"][:, task])
        kept.columns = self.columns | {"train": {name: each[chosen] for name, each in self.columns["train"].items()}}
        kept.labels = self.labels | {"train": self.labels["train"][chosen]}
        return kept

    def learnt(self, split: str) -> np.ndarray:
        """(N, T) float32, 0 where a label is not known."""
        return np.nan_to_num(self.labels[split])

    def tables(self) -> Iterator[tuple[str, str | None, int, bool]]:
        """Name, the input whose table it shares, rows of the table with the one for padding, and whether it is a list;
        those that own a table come first."""
        owner: dict[str, str] = {}
        for name, each in sorted(self.ids.items(), key=lambda item: item[1]["list"]):
            shared = owner.setdefault(each["table"], name)
            yield name, None if shared == name else shared, each["rows"] + 1, each["list"]


def rechub(rows: Rows, batch: int) -> Epoch:
    """torch-rechub: `MTLTrainer.fit`, an epoch at a time."""
    from torch_rechub.basic.features import DenseFeature, SequenceFeature, SparseFeature
    from torch_rechub.trainers import MTLTrainer
    from torch_rechub.utils.data import DataGenerator

    features: list[Any] = []
    for name, shared, size, is_list in rows.tables():
        if is_list:
            features.append(SequenceFeature(name, size, DIM, pooling="mean", shared_with=shared, padding_idx=0))
        else:
            features.append(SparseFeature(name, size, DIM, shared_with=shared))
    if rows.numbers:
        features.append(DenseFeature("numbers", rows.numbers))
    kinds = ["classification"] * len(rows.tasks)
    model = rechub_mixture(features, len(rows.tasks))
    trainer = MTLTrainer(model, kinds, n_epoch=1, model_path=tempfile.mkdtemp())
    train, validation, test = DataGenerator(rows.columns["train"], rows.learnt("train")).generate_dataloader(
        rows.columns["validation"],
        rows.learnt("validation"),
        rows.columns["test"],
        rows.learnt("test"),
        batch_size=batch,
    )

    def epoch() -> tuple[np.ndarray, np.ndarray]:
        trainer.train_one_epoch(train)
        found = (trainer.predict(model, [x for x, _ in each]) for each in (validation, test))
        first, second = (np.array(each) for each in found)
        return first, second

    return epoch


def deepctr(rows: Rows, batch: int) -> Epoch:
    """DeepCTR-Torch: `fit`, an epoch at a time."""
    from deepctr_torch.inputs import DenseFeat, SparseFeat, VarLenSparseFeat

    features: list[Any] = []
    for name, shared, size, is_list in rows.tables():
        feature = SparseFeat(name, size, DIM, embedding_name=shared or name)
        if is_list:
            feature = VarLenSparseFeat(feature, rows.columns["train"][name].shape[1], combiner="mean")
        features.append(feature)
    if rows.numbers:
        features.append(DenseFeat("numbers", rows.numbers))
    model = deepctr_mixture(features, rows.tasks, seed=torch.initial_seed())

    def epoch() -> tuple[np.ndarray, np.ndarray]:
        model.fit(dict(rows.columns["train"]), rows.learnt("train"), batch_size=batch, epochs=1, verbose=0)
        first, second = (model.predict(dict(rows.columns[split]), 8192) for split in ("validation", "test"))
        return first, second

    return epoch


def areas(labels: np.ndarray, predicted: np.ndarray) -> list[float]:
    """The AUC of each task over the rows whose label is known."""
    known = ~np.isnan(labels)
    return [
        float(roc_auc_score(labels[known[:, task], task], predicted[known[:, task], task]))
        for task in range(labels.shape[1])
    ]


def main() -> None:
    """Trains and predicts."""
    peer, folder, epochs, batch, seed, out = sys.argv[1:7]
    torch.manual_seed(int(seed))
    np.random.seed(int(seed))
    rows, told = Rows(Path(folder)), {}
    predicted = np.zeros(rows.labels["test"].shape, np.float32)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for tasks in rows.known_together():
            best, epoch = -1.0, {"rechub": rechub, "deepctr": deepctr}[peer](rows.known(tasks[0]), int(batch))
            for number in range(int(epochs)):
                validation, test = epoch()
                found = areas(rows.labels["validation"][:, tasks], validation[:, tasks])
                if np.mean(found) > best:
                    best, predicted[:, tasks] = float(np.mean(found)), test[:, tasks]
                    told |= {rows.tasks[task]: [number + 1, area] for task, area in zip(tasks, found, strict=True)}
    np.save(out, predicted)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
