"""python -m tests.benchmarks.gpu --out results

Measure training and scoring on this machine's CUDA device:

training   rows a second of the trainer that `mmoe-rec train` runs (with Parquet, shuffling and validation), by batch
           size, precision and rows of each of 20 embedding tables, and the device's peak memory;
scoring    milliseconds from a list's encoded rows to its predictions in main memory, on the device and on the CPU.

Figures go to `gpu.json` in the folder of `--out`; the last line is the JSON. `--quick` takes small sizes. With
`--device cpu` everything runs without a GPU.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mmoe_rec.batches.batch import Batch, make_batch
from mmoe_rec.devices import pick_device
from mmoe_rec.features.layout import DenseInput, EncodedInputs, IdInput
from mmoe_rec.model.mmoe import build_model
from mmoe_rec.model.model_layout import EmbeddingTable, ModelLayout, ModelTask
from mmoe_rec.model.score import predictions
from mmoe_rec.model.tables import PlainTables
from mmoe_rec.preprocessing.count_and_encode import SplitCounts
from mmoe_rec.preprocessing.prepare import FeatureFolder
from mmoe_rec.settings.model import Model
from mmoe_rec.settings.training import Training
from mmoe_rec.training.distributed import process_group
from mmoe_rec.training.loop import STEPS_BETWEEN_LOGS, Trainer
from tests.batches.encoded_files import columns_of

IDS, DIM, NUMBERS, TASKS = 20, 16, 5, 2
WARM_UP = 5
MODEL = Model.model_validate(
    {
        "bottom": {"units": [], "cross_layers": 0, "piecewise": False},
        "experts": {"count": 8, "units": [128, 64]},
        "gates": {"dropout": 0},
        "towers": {"units": [32]},
    }
)


@dataclass(frozen=True)
class Sizes:
    """Sizes of both parts.

    Attributes:
        steps: Steps of each training.
        repeats: Timed repeats of each scoring.
        batches: Batch sizes; the tables then have `table_rows[0]` rows.
        table_rows: Rows of each table; the batch size then is `batches[0]`.
        lists: Candidates of a list.
    """

    steps: int = 100
    repeats: int = 20
    batches: tuple[int, ...] = (4096, 16_384, 65_536)
    table_rows: tuple[int, ...] = (50_000, 500_000, 2_000_000)
    precisions: tuple[str, ...] = ("bf16", "fp32")
    lists: tuple[int, ...] = (100, 500, 2_000, 16_384)


QUICK = Sizes(steps=60, repeats=3, batches=(256, 512), table_rows=(1_000, 5_000), lists=(100, 500))


@dataclass(frozen=True)
class Figure:
    """One measured value."""

    part: str
    case: str
    value: float
    unit: str


def layout(table_rows: int) -> ModelLayout:
    """Lay out one table for each id, the numbers and two binary tasks."""
    return ModelLayout(
        tuple(EmbeddingTable(f"id{index}", table_rows, DIM) for index in range(IDS)),
        tuple(IdInput(f"id{index}", f"id{index}") for index in range(IDS)),
        tuple(DenseInput(f"number{index}") for index in range(NUMBERS)),
        tuple(ModelTask(f"task{index}", "binary", "engagement") for index in range(TASKS)),
    )


def draw(rows: int, table_rows: int) -> tuple[EncodedInputs, np.ndarray]:
    """Draw encoded rows with uniform ids, the worst case for caches, and (rows, TASKS) float32 labels."""
    random = np.random.default_rng(0)
    numbers = random.normal(size=(rows, NUMBERS)).astype(np.float32)
    labels = (random.random((rows, TASKS)) < 1 / (1 + np.exp(-numbers[:, :TASKS]))).astype(np.float32)
    return EncodedInputs({f"id{index}": random.integers(0, table_rows, rows) for index in range(IDS)}, numbers), labels


def write(folder: Path, rows: int, table_rows: int, validation: int) -> None:
    """Write a features folder with `rows` training rows; the first `validation` of them validate as well."""
    encoded, labels = draw(rows, table_rows)
    columns = columns_of(encoded, layout(table_rows))
    tasks = {f"task{index}": values for index, values in enumerate(labels.T)}
    columns |= {f"label.{name}": pa.array(values, pa.float32()) for name, values in tasks.items()}
    columns["user"] = pa.array(np.arange(rows) // 20)
    for split, count in (("train", rows), ("validation", validation)):
        (folder / "encoded" / split).mkdir(parents=True)
        part = folder / "encoded" / split / "part-00000.parquet"
        pq.write_table(pa.table(columns).slice(0, count), part, row_group_size=65_536)
    (folder / "encoded" / "layout.json").write_text(layout(table_rows).row_layout().to_json(), encoding="utf-8")
    (folder / "layout.json").write_text(layout(table_rows).to_json(), encoding="utf-8")
    counts = SplitCounts()
    counts.add(tasks, *[np.ones(rows)] * 2, {})
    (folder / "manifest.json").write_text(json.dumps({"splits": {"train": asdict(counts)}}), encoding="utf-8")


def training(sizes: Sizes, device: torch.device) -> Iterator[Figure]:
    """Train with each batch size on the smallest tables, then with the smallest batch on the larger tables."""
    cases = [(batch, sizes.table_rows[0]) for batch in sizes.batches]
    cases += [(sizes.batches[0], table_rows) for table_rows in sizes.table_rows[1:]]
    for batch, table_rows in cases:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), batch * sizes.steps, table_rows, batch)
            for precision in sizes.precisions:
                case = f"batch {batch:,}, tables of {table_rows:,}, {precision}"
                settings = Training.model_validate(
                    {"device": device.type, "batch_size": batch, "precision": precision, "validations_per_epoch": 1}
                )
                yield Figure("training", case, _rows_per_second(Path(folder), settings, device), "rows/s")
                if device.type == "cuda":
                    yield Figure("training", case, torch.cuda.max_memory_allocated(device) / 2**30, "GiB")
                    torch.cuda.reset_peak_memory_stats(device)


def _rows_per_second(features: Path, settings: Training, device: torch.device) -> float:
    """Time the steps between the first and the last line of the training's log."""
    times: list[tuple[int, float]] = []

    def log(metrics: dict[str, float], step: int) -> None:
        if "train/learning_rate" in metrics and step % STEPS_BETWEEN_LOGS == 0:
            times.append((step, time.perf_counter()))

    with tempfile.TemporaryDirectory() as scratch, process_group(device):
        model = ModelLayout.read(features)
        Trainer(FeatureFolder(features), model, MODEL, settings, device, Path(scratch), log).run()
    (first, started), (last, ended) = times[0], times[-1]
    assert isinstance(settings.batch_size, int)
    return (last - first) * settings.batch_size / (ended - started)


def scoring(sizes: Sizes, device: torch.device) -> Iterator[Figure]:
    """Score lists in fp32 on the CPU and on the device."""
    inputs = layout(sizes.table_rows[0])
    kinds = [task.kind for task in inputs.tasks]
    for size in sizes.lists:
        encoded, _ = draw(size, sizes.table_rows[0])
        for where in dict.fromkeys((torch.device("cpu"), device)):
            model = build_model(inputs, MODEL, PlainTables(inputs)).to(where).eval()

            @torch.inference_mode()
            def score(
                model: torch.nn.Module = model, where: torch.device = where, encoded: EncodedInputs = encoded
            ) -> None:
                batch: Batch = make_batch(encoded, inputs, torchrec=False)
                predictions(model(batch.to(where)).logits.cpu(), kinds).numpy()

            yield Figure("scoring", f"{size:,} candidates, {where.type}", 1e3 * _seconds(score, sizes.repeats), "ms")


def _seconds(step: Callable[[], None], repeats: int) -> float:
    """Median time of a step that ends with its result in main memory, after some repeats that are not counted."""
    times = []
    for _ in range(WARM_UP + repeats):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return statistics.median(times[WARM_UP:])


PARTS = {"scoring": scoring, "training": training}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(default: all)")
    parser.add_argument("--out", type=Path, default=Path("gpu_benchmark"), help="folder (default: %(default)s)")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device. To try the benchmark on a CPU, add --device cpu --quick")
    device, sizes = pick_device(options.device), QUICK if options.quick else Sizes()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    figures: list[Figure] = []
    options.out.mkdir(parents=True, exist_ok=True)
    for part in options.parts:
        for figure in PARTS[part](sizes, device):
            print(f"{figure.part:10} {figure.case:50} {figure.value:12,.4g} {figure.unit}", flush=True)
            figures.append(figure)
            actual = {"device": name, "torch": torch.__version__, "figures": [asdict(item) for item in figures]}
            (options.out / "gpu.json").write_text(json.dumps(actual, indent=1), encoding="utf-8")
    print(json.dumps(actual))


if __name__ == "__main__":
    main()
