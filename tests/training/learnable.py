"""Encoded rows from which a model can learn, for any layout, and the shortest way from them to a trained model."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mmoe_rec.batches.batch import make_batch
from mmoe_rec.batches.encoded_dataset import EncodedDataset, ValidationPart
from mmoe_rec.features.layout import AttentionHistory, EncodedInputs, label_types
from mmoe_rec.model.mmoe import RankingModel, build_model
from mmoe_rec.model.model_layout import ModelLayout, ModelTask
from mmoe_rec.model.tables import PlainTables
from mmoe_rec.point_in_time.arrays import Ragged
from mmoe_rec.preprocessing.count_and_encode import SplitCounts
from mmoe_rec.preprocessing.prepare import FeatureFolder
from mmoe_rec.settings.model import Model
from mmoe_rec.settings.training import Training
from mmoe_rec.training.checkpoint import load_unsharded
from mmoe_rec.training.distributed import process_group
from mmoe_rec.training.loop import Trainer, TrainingResult
from tests.batches.encoded_files import columns_of
from tests.model.examples import LAYOUT, random_rows

CPU = torch.device("cpu")
ROWS = {"train": 12_000, "validation": 4_000}
MODEL = Model.model_validate(
    {
        "bottom": {"units": [16], "cross_layers": 1, "cross_rank": 8},
        "experts": {"count": 2, "units": [8]},
        "towers": {"units": [4]},
        "placement": {"units": [4], "dropout": 0.0},
    }
)
TRAINING = Training.model_validate(
    {
        "device": "cpu",
        "precision": "fp32",
        "matmul_backend": "blas",
        "table_backend": "fbgemm",
        "threads": 1,
        "epochs": 1,
        "batch_size": 60,
        "learning_rate": 0.01,
        "table_learning_rate": 0.1,
        "shuffle_buffer_rows": 2_000,
        "validations_per_epoch": 1,
    }
)


FIVE_TASKS = (
    *(ModelTask(f"task{i}", "binary", "engagement") for i in range(4)),
    # In seconds, say. The unit of a regression's label must not decide how much the other tasks learn.
    ModelTask("rating", "regression", "satisfaction", mean=500.0, std=300.0),
)
# A like needs a click.
GIVEN = replace(LAYOUT, tasks=(LAYOUT.tasks[0], replace(LAYOUT.tasks[1], conditional_on="click"), LAYOUT.tasks[2]))
LAYOUTS = {
    "everything": LAYOUT,
    "five tasks": replace(LAYOUT, tasks=FIVE_TASKS),
    "one task": replace(LAYOUT, tasks=LAYOUT.tasks[:1]),
    "one regression": replace(LAYOUT, tasks=LAYOUT.tasks[2:]),
    "no placement": replace(
        LAYOUT,
        ids=tuple(item for item in LAYOUT.ids if not item.placement),
        dense=tuple(item for item in LAYOUT.dense if not item.placement),
    ),
    "no ids": replace(LAYOUT, ids=(), tables=(), attention=()),
    "no dense": replace(
        LAYOUT,
        dense=(),
        ids=tuple(item for item in LAYOUT.ids if not item.name.startswith("history_")),
        tables=tuple(table for table in LAYOUT.tables if table.name != "ages"),
        attention=(),
    ),
}


def learnable_rows(layout: ModelLayout, rows: int, seed: int) -> tuple[EncodedInputs, np.ndarray]:
    """Random inputs, of which each adds to each task's logit; a third of the labels (rows, T) is NaN."""
    encoded, labels = random_rows(rows, seed, layout)
    labels = labels.astype(np.float64)
    # The effects are the same for every seed of the rows.
    effects = np.random.default_rng(1)
    logits = np.zeros(labels.shape)
    for item in layout.ids:
        effect = effects.normal(0, _strength(item.placement), (layout.table(item.table).rows, len(layout.tasks)))
        logits += _mean_effect(encoded.ids[item.name], effect)
    for column, dense in zip(encoded.dense.T, layout.dense, strict=True):
        signs = effects.choice([-1, 1], len(layout.tasks))
        logits += column[:, None] * signs * _strength(dense.placement)
    chance = np.random.default_rng(seed + 1_000)
    for index, task in enumerate(layout.tasks):
        noise = chance.normal(0, 0.3, rows) if task.kind == "regression" else chance.logistic(0, 0.5, rows)
        value = logits[:, index] + noise
        drawn = task.mean + task.std * value / 1.5 if task.kind == "regression" else value > 0
        labels[:, index] = np.where(np.isnan(labels[:, index]), np.nan, drawn)
    return encoded, labels


def _strength(placement: bool) -> float:
    """Placement, which validation does not see, decides little."""
    return 0.2 if placement else 1.0


def _mean_effect(ids: np.ndarray | Ragged, effect: np.ndarray) -> np.ndarray:
    if not isinstance(ids, Ragged):
        return effect[ids]
    total = np.zeros((len(ids.lengths), effect.shape[1]))
    np.add.at(total, np.repeat(np.arange(len(ids.lengths)), ids.lengths), effect[ids.values])
    return total / np.maximum(ids.lengths, 1)[:, None]


def write_prepared(
    folder: Path, layout: ModelLayout, labels: dict[str, np.ndarray] | None = None, unit: float | None = None
) -> FeatureFolder:
    """The folder that `prepare` would make, with as much in it as training reads.

    labels: split -> labels instead of the learnable ones; unit: a column of uneven weights has so many times 1 to 13.
    """
    counts = {split: SplitCounts() for split in ROWS}
    for seed, (split, rows) in enumerate(ROWS.items()):
        encoded, drawn = learnable_rows(layout, rows, seed)
        values = (labels or {}).get(split, drawn)
        if split == "validation" and "city" in encoded.ids:  # Training then hides some cities.
            unseen = np.arange(rows) % 8 == 0
            encoded.ids["city"] = np.where(unseen, 1 + np.arange(rows) % 3, np.asarray(encoded.ids["city"]))
        columns = columns_of(encoded, layout)
        known = {task.name: values[:, index] for index, task in enumerate(layout.tasks)}
        for name, (given, task) in layout.joint_outcomes.items():
            known[name] = np.where(values[:, given] == 0, 0.0, np.where(values[:, given] == 1, values[:, task], np.nan))
        for name, column in known.items():
            columns[f"label.{name}"] = pa.array(column, label_types(layout)[name], mask=np.isnan(column))
        columns["user"] = pa.array(np.arange(rows) // 20)
        rates = np.where(values[:, 0] == 0, 0.25, 1.0)
        weights = np.ones(rows) if unit is None else unit * (1 + 8 * (values[:, 0] == 1) + np.arange(rows) % 5)
        counts[split].add(known, weights, rates, {})
        columns |= {} if unit is None else {"weight": pa.array(weights)}
        columns["sampling_rate"] = pa.array(rates, pa.float32())
        (folder / "encoded" / split).mkdir(parents=True)
        pq.write_table(pa.table(columns), folder / "encoded" / split / "part-00000.parquet", row_group_size=1_000)
    (folder / "encoded" / "layout.json").write_text(layout.row_layout().to_json(), encoding="utf-8")
    (folder / "layout.json").write_text(layout.to_json(), encoding="utf-8")
    manifest = {"splits": {split: asdict(item) for split, item in counts.items()}}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return FeatureFolder(folder)


def layout_of(prepared: FeatureFolder) -> ModelLayout:
    """The layout that `write_prepared` was given."""
    return ModelLayout.read(prepared.folder)


@dataclass
class SmallTraining:
    """A training's result, its checkpoint, and what it logged: (step, metrics)."""

    prepared: FeatureFolder
    result: TrainingResult
    checkpoint: Path
    logged: list[tuple[int, dict[str, float]]]
    model_settings: Model

    def model(self) -> RankingModel:
        """The plain model of the checkpoint."""
        return plain_model(layout_of(self.prepared), self.checkpoint, self.model_settings)


def plain_model(layout: ModelLayout, checkpoint: Path, model: Model = MODEL) -> RankingModel:
    """The plain model of a checkpoint."""
    plain = build_model(layout, model, PlainTables(layout, seed=99), seed=99)
    load_unsharded(plain, checkpoint)
    return plain.eval()


def trained(
    prepared: FeatureFolder, checkpoint: Path, model: Model = MODEL, device: torch.device = CPU, **changes: object
) -> SmallTraining:
    """Trains on one rank; `changes` replace those of `TRAINING`."""
    logged: list[tuple[int, dict[str, float]]] = []
    with process_group(device):
        result = Trainer(
            prepared,
            layout_of(prepared),
            model,
            TRAINING.model_copy(update=changes),
            device,
            checkpoint,
            lambda metrics, step: logged.append((step, metrics)),
        ).run()
    return SmallTraining(prepared, result, result.best_checkpoint, logged, model)


def scores(model: RankingModel, prepared: FeatureFolder, split: str = "validation") -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels (N, T) of a split's rows in file order, without placement; of validation those that select."""
    attention = tuple(AttentionHistory(name, length) for length, (name, *_) in model.histories)
    layout: Any = replace(LAYOUT, **vars(prepared.layout), attention=attention)
    part = ValidationPart.SELECTION if split == "validation" else None
    parts: Sequence = list(EncodedDataset(prepared.split(split), layout, part=part).stream(10_000))
    with torch.inference_mode():
        logits = [model(make_batch(rows.encoded, layout, torchrec=False)).logits.numpy() for rows, _ in parts]
    return np.concatenate(logits), np.concatenate([rows.labels for rows, _ in parts])
