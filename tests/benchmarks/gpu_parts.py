"""The parts of `tests.benchmarks.gpu`: each gives its figures as it finds them."""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmoe_rec.batches.batch import Batch, make_batch
from mmoe_rec.features.layout import Encoded
from mmoe_rec.model.layout import ModelLayout
from mmoe_rec.model.levels import Level
from mmoe_rec.model.mmoe import build_model
from mmoe_rec.model.score import predictions
from mmoe_rec.model.tables import PlainTables
from mmoe_rec.preprocessing.prepare import FeatureFolder
from mmoe_rec.settings.model import Model
from mmoe_rec.training.loop import Trainer
from mmoe_rec.training.ranks import process_group
from tests.benchmarks.gpu import Sizes
from tests.benchmarks.training_ours import MODEL, TRAINING, layout, train, write
from tests.benchmarks.training_rows import ID_NAMES, draw

WARM_UP = 5
PROFILED = 10
WIDTH, TASKS = 256, 2
# Words in the names of a GPU's kernels and of a CPU's operators, and what they are part of; the first that fits.
KINDS = {
    "tables": ("embedding", "tbe", "split_", "jagged", "permute", "bounds_check", "radix", "lxu", "sort"),
    "optimizer": ("adam", "multi_tensor", "foreach", "lpnorm", "clip"),
    "copies": ("memcpy", "memset", "copy"),
    "products": ("gemm", "cutlass", "cublas", "nvjet", "mm", "linear", "wgrad"),
}


@dataclass(frozen=True)
class Figure:
    """One cell of the table."""

    part: str
    case: str
    name: str
    value: float
    unit: str


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(step: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median of the times of a step, after a few that are not counted."""
    times = []
    for number in range(WARM_UP + repeats):
        wait(device)
        started = time.perf_counter()
        step()
        wait(device)
        if number >= WARM_UP:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


# Training


def training(sizes: Sizes, device: torch.device) -> Iterator[Figure]:
    """Every batch size at the first number of table rows, every other number at the first batch size."""
    batch, table_rows = sizes.batches[0], sizes.table_rows[0]
    cases = [(each, table_rows) for each in sizes.batches] + [(batch, each) for each in sizes.table_rows[1:]]
    for size, of_table in cases:
        with tempfile.TemporaryDirectory() as folder:
            features = Path(folder)
            write(features, draw(size * sizes.steps, of_table), of_table)
            for precision in sizes.precisions:
                case = f"batch {size:,}, tables of {of_table:,}, {precision}"
                changes = {"device": device.type, "batch_size": size, "precision": precision}
                settings = TRAINING.model_copy(update=changes)
                found = train(features, settings)
                assert found is not None, "there is one rank"
                yield Figure("training", case, "whole", found.rows_per_s, "rows/s")
                for name, value, unit in _steps(features, settings, device, sizes.steps):
                    yield Figure("training", case, name, value, unit)


def _steps(features: Path, settings: Any, device: torch.device, steps: int) -> Iterator[tuple[str, float, str]]:
    """Of batches that lie ready: their rate, and what the device does in them."""
    with tempfile.TemporaryDirectory() as folder, process_group(device):
        prepared, model = FeatureFolder(features), ModelLayout.read(features)
        trainer = Trainer(prepared, model, MODEL, settings, device, Path(folder), lambda *_: None)
        try:
            made = trainer._batches(trainer.reader, trainer.position, 1)
            ready = list(itertools.islice(made, min(8, steps)))
            batches = itertools.cycle(ready)

            def run(count: int) -> None:
                for _ in range(count):
                    assert trainer.steps.next(batches, 1.0) is not None

            run(WARM_UP)
            wait(device)
            started = time.perf_counter()
            run(steps)
            wait(device)
            yield "steps", steps * settings.batch_size / (time.perf_counter() - started), "rows/s"
            yield from _split(lambda: run(PROFILED), device)
            trainer.steps.release()
            if device.type == "cuda":
                yield "memory", torch.cuda.max_memory_allocated(device) / 2**30, "GiB"
                torch.cuda.reset_peak_memory_stats(device)
        finally:
            trainer.checkpoints.close()


def _split(work: Callable[[], None], device: torch.device) -> Iterator[tuple[str, float, str]]:
    """Shares of the time: of a GPU's own, or of the operators of a CPU."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        started = time.perf_counter()
        work()
        wait(device)
        took = (time.perf_counter() - started) * 1e6
    spent = dict.fromkeys([*KINDS, "others"], 0.0)
    for event in profiled.key_averages():
        spent[kind_of(event.key)] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    for name, microseconds in spent.items():
        yield f"share in {name}", 100 * microseconds / took, "%"
    yield "share idle", max(0.0, 100 * (1 - sum(spent.values()) / took)), "%"


def kind_of(name: str) -> str:
    """What a kernel or operator is part of."""
    name = name.lower()
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "others")


# Experts


def experts(sizes: Sizes, device: torch.device) -> Iterator[Figure]:
    """Dense and grouped take turns on the same rows and weights."""
    hidden = torch.randn(sizes.rows, WIDTH, device=device, requires_grad=True)
    for units, bf16, count, k in itertools.product(sizes.units, (True, False), sizes.experts, sizes.k):
        steps = {}
        for way in ("dense", "grouped"):
            torch.manual_seed(0)
            section = {"experts": {"count": count, "units": units, "compute": way}}
            gates = {"gates": {"routing": "top_k", "top_k": k}}
            level = Level(WIDTH, WIDTH, TASKS, 0, Model.model_validate(section | gates)).to(device)
            steps[way] = _level_step(level, hidden, bf16)
        times = {way: seconds(step, device, sizes.repeats) for way, step in steps.items()}
        case = f"{count} of {list(units)}, {k} a row and gate, {'bf16' if bf16 else 'fp32'}"
        for way, took in times.items():
            yield Figure("experts", case, way, took * 1e3, "ms")
        yield Figure("experts", case, "grouped / dense", times["grouped"] / times["dense"], "")


def _level_step(level: Level, hidden: torch.Tensor, bf16: bool) -> Callable[[], None]:
    def step() -> None:
        level.zero_grad()
        hidden.grad = None
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=bf16):
            mixed, _ = level([hidden], [hidden])
        mixed.float().square().mean().backward()

    return step


# Scoring


def scoring(sizes: Sizes, device: torch.device) -> Iterator[Figure]:
    """From a list's encoded rows in main memory to its predictions there, in fp32."""
    of_table = sizes.table_rows[0]
    inputs = layout(of_table)
    kinds = [task.kind for task in inputs.tasks]
    for size in sizes.lists:
        rows = draw(size, of_table)
        encoded = Encoded(dict(zip(ID_NAMES, np.ascontiguousarray(rows.ids.T), strict=True)), rows.numbers)
        times = {}
        for where in dict.fromkeys((torch.device("cpu"), device)):
            model = build_model(inputs, MODEL, PlainTables(inputs)).to(where).eval()

            @torch.inference_mode()
            def score(model: Any = model, where: torch.device = where, encoded: Encoded = encoded) -> None:
                batch: Batch = make_batch(encoded, inputs, torchrec=False)
                predictions(model(batch.to(where)).logits.cpu(), kinds).numpy()

            times[where.type] = seconds(score, where, sizes.repeats)
            yield Figure("scoring", f"{size:,} candidates", where.type, times[where.type] * 1e3, "ms")
        if device.type in times and device.type != "cpu":
            yield Figure("scoring", f"{size:,} candidates", "device / cpu", times[device.type] / times["cpu"], "")
