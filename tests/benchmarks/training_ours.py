"""This project's training on the rows of `tests/benchmarks/training.py`, by the trainer that `mmoe-rec train` runs."""

import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch.distributed as dist
import yaml

from mmoe_rec.devices import pick_device
from mmoe_rec.features.layout import DenseInput, Encoded, IdInput
from mmoe_rec.model.layout import EmbeddingTable, ModelLayout, ModelTask
from mmoe_rec.preprocessing.prepare import FeatureFolder
from mmoe_rec.preprocessing.splits import SplitCounts
from mmoe_rec.settings.model import Model
from mmoe_rec.settings.training import Training
from mmoe_rec.training.loop import STEPS_BETWEEN_LOGS, Trainer
from mmoe_rec.training.ranks import process_group
from tests.batches.encoded_files import columns_of
from tests.benchmarks.training_rows import (
    BATCH,
    DIM,
    EXPERT_UNITS,
    EXPERTS,
    ID_NAMES,
    NUMBER_NAMES,
    TASKS,
    TOWER_UNITS,
    TrainingRows,
)

MODEL = Model.model_validate(
    {
        "bottom": {"units": [], "cross_layers": 0, "piecewise": False},
        "experts": {"count": EXPERTS, "units": EXPERT_UNITS},
        "gates": {"dropout": 0},
        "towers": {"units": TOWER_UNITS},
    }
)
TRAINING = Training(device="cpu", batch_size=BATCH, validations_per_epoch=1)


def layout(table_rows: int) -> ModelLayout:
    """A table for each id."""
    return ModelLayout(
        tuple(EmbeddingTable(name, table_rows, DIM) for name in ID_NAMES),
        tuple(IdInput(name, name) for name in ID_NAMES),
        tuple(DenseInput(name) for name in NUMBER_NAMES),
        tuple(ModelTask(f"task{index}", "binary", "engagement") for index in range(TASKS)),
    )


def write(folder: Path, rows: TrainingRows, table_rows: int) -> None:
    """What a build of features would leave: encoded rows, of which a few are for validation too."""
    encoded = Encoded(dict(zip(ID_NAMES, np.ascontiguousarray(rows.ids.T), strict=True)), rows.numbers)
    columns = columns_of(encoded, layout(table_rows))
    for index, labels in enumerate(rows.labels.T):
        columns[f"label.task{index}"] = pa.array(labels, pa.float32())
    columns["user"] = pa.array(np.arange(len(rows.labels)) // 20)
    table = pa.table(columns)
    for split, count in (("train", len(table)), ("validation", BATCH)):
        (folder / "encoded" / split).mkdir(parents=True)
        pq.write_table(table.slice(0, count), folder / "encoded" / split / "part-00000.parquet", row_group_size=65_536)
    (folder / "encoded" / "layout.json").write_text(layout(table_rows).of_rows().to_json(), encoding="utf-8")
    (folder / "layout.json").write_text(layout(table_rows).to_json(), encoding="utf-8")
    counts = SplitCounts()
    counts.add(
        {f"task{index}": labels for index, labels in enumerate(rows.labels.T)}, *[np.ones(len(rows.labels))] * 2, {}
    )
    (folder / "manifest.json").write_text(json.dumps({"splits": {"train": asdict(counts)}}), encoding="utf-8")


@dataclass(frozen=True)
class Trained:
    """rows_per_s: of all ranks, from the first line of the log to the last; choices: what the training chose."""

    rows_per_s: float
    choices: dict[str, Any]


def train(features: Path, training: Training = TRAINING) -> Trained | None:
    """Trains as one rank or as one of several; on the first, what it found."""
    device = pick_device(training.device)
    times: list[tuple[int, float]] = []

    def log(metrics: dict[str, float], step: int) -> None:
        if "train/learning_rate" in metrics and step % STEPS_BETWEEN_LOGS == 0:
            times.append((step, time.perf_counter()))

    with tempfile.TemporaryDirectory() as folder, process_group(device):
        trainer = Trainer(
            FeatureFolder(features), ModelLayout.read(features), MODEL, training, device, Path(folder), log
        )
        trainer.run()
        first = dist.get_rank() == 0
    (begin, started), (end, ended) = times[0], times[-1]
    speed = (end - begin) * training.batch_size / (ended - started)
    return Trained(speed, asdict(trainer.choices)) if first else None


def main() -> None:
    """Trains, as one process or as a rank under torchrun, and prints what it found; arguments: features, settings."""
    changes = {name: yaml.safe_load(value) for name, value in (each.split("=", 1) for each in sys.argv[2:])}
    found = train(Path(sys.argv[1]), Training.model_validate(TRAINING.model_dump() | changes))
    if found is not None:
        print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main()
