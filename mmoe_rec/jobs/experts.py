"""Experts of a trained model: added, removed or masked; and what fewer of them for each row cost and lose."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmoe_rec.atomic import atomic_file
from mmoe_rec.errors import UserError
from mmoe_rec.jobs.run_page import as_code, command
from mmoe_rec.jobs.workspace import CHALLENGER
from mmoe_rec.settings.model import Model
from mmoe_rec.settings.sections import Settings
from mmoe_rec.tracking import registry, runs
from mmoe_rec.tracking.registry import Version, describe_version, find_model

if TYPE_CHECKING:
    from rich.table import Table

    from mmoe_rec.batches.encoded_rows import EncodedRows
    from mmoe_rec.evaluation.intervals import Interval
    from mmoe_rec.inference.ranker import Ranker


@dataclass(frozen=True)
class EditedModel:
    """done: what was done, in words; experts: number of all experts; shared: number of those that all tasks share;
    address: in the registry."""

    done: str
    experts: int
    shared: int
    address: str


def edit_model(
    settings: Settings,
    address: str,
    out: Path,
    add: int | None,
    copied: Sequence[int] | None,
    remove: int | None,
    mask: int | None,
) -> EditedModel:
    """Edits the model at an address, writes it to a folder and registers it as challenger; one of the three is given.

    Raises UserError for an expert that can't be edited that way.
    """
    if out.exists() and not (out / "model.json").exists():
        raise UserError(f"'{out}' exists and holds no model: name another folder with --out, or remove it")
    registry.check_names(settings.tracking.address, settings.registered_model, CHALLENGER)
    found = find_model(address, settings.tracking.address)
    folder = found.folder
    from mmoe_rec.inference.artifact import read_artifact, read_weights
    from mmoe_rec.inference.writing import rewrite_artifact
    from mmoe_rec.model.surgery import add_experts, mask_expert, remove_expert

    about = read_artifact(folder)
    model = Model.model_validate(about.model)
    state = read_weights(folder / "weights.safetensors")
    if add is not None:
        chosen = list(copied or (index % max(1, model.experts.count) for index in range(add)))
        state, model = add_experts(state, model, chosen)
        done = f"added {add}, copied from {', '.join(map(str, chosen))}"
    elif remove is not None:
        state, model = remove_expert(state, model, remove)
        done = f"removed expert {remove}"
    else:
        assert mask is not None, "one of the three is given"
        state, done = mask_expert(state, model, mask), f"put expert {mask} out of use"
    rewrite_artifact(folder, out, model, state)
    with runs.open_run(settings.tracking.address, settings.experiment, run_name="edit_experts") as run:
        run.set_tags({"edited_from": address, "edited_from.run": found.run_id or "unknown", "edit": done})
        version = registry.register_model(run, out, settings.registered_model, CHALLENGER)
        made = Version(settings.registered_model, version, run.run_id)
        told = f"{address}: {done}, by\n\n{as_code(command())}"
        run.describe("Experts", told)
        describe_version(made, told, {}, settings.tracking.address)
    own = model.experts.task_count * len(about.tasks)
    registered = f"models:/{settings.registered_model}/{version}"
    return EditedModel(done, model.experts.count + own, model.experts.count, registered)


FILE = "experts.json"
REQUEST_ROWS = 500
RESAMPLES = 100


def measure_fewer_experts(
    settings: Settings, address: str, out: Path, numbers: Sequence[int], split: str = "test"
) -> list[dict[str, Any]]:
    """Scores the rows of a split with each number of experts per row and gate; writes `experts.json` to a folder and to
    the model's run.

    Returns:
        For each number, as given: `k`; `milliseconds`, the median time that one thread takes for 500 rows without their
        features; and `tasks`: binary task -> metric -> interval.

    Raises:
        UserError: the model does not have so many experts.
    """
    model = find_model(address, settings.tracking.address)
    from mmoe_rec.batches.encoded_rows import EncodedRows
    from mmoe_rec.inference.ranker import Ranker
    from mmoe_rec.jobs.metrics import rows_to_measure

    ranker = Ranker.load(model.folder)
    seen = int(ranker.model.visible_experts.sum(1).max())
    if (most := max(numbers)) > seen:
        raise UserError(f"--experts-per-row names {most}, and a gate of the model sees {seen} experts")
    # The model's own number is not asked for: levels below may see more experts than the last one's gates.
    own = ranker.model.mixture.gates[-1].experts_a_row() or seen
    with rows_to_measure(settings, model.folder, ranker, split) as folder:
        rows = EncodedRows(folder, ranker.layout)
        measured = [
            {"k": k, **_measure(ranker, rows, settings.evaluation.batch_size, None if k == own else k)} for k in numbers
        ]
    with atomic_file(out / FILE) as file:
        file.write_text(json.dumps(measured, indent=1, default=asdict), encoding="utf-8")
    uri, experiment = settings.tracking.address, settings.experiment
    with runs.open_run(uri, experiment, run_name="fewer experts", run_id=model.run_id) as run:
        run.log_artifact(out / FILE, "experts")
    return measured


def _measure(ranker: Ranker, rows: EncodedRows, batch_size: int, k: int | None) -> dict[str, Any]:
    from mmoe_rec.evaluation.scoring import score_rows
    from mmoe_rec.evaluation.summary import summarise

    scored = score_rows(ranker.model, ranker.layout, rows, batch_size, calibration=ranker.calibration, top_k=k)
    tasks = {
        name: {metric: group.get(metric) for metric in ("auc", "gauc_user", "calibration", "logloss")}
        for name, group in summarise(scored.measure(), RESAMPLES).tasks.items()
        if group.kind == "binary"
    }
    return {"milliseconds": _milliseconds(ranker, rows, k), "tasks": tasks}


def _milliseconds(ranker: Ranker, rows: EncodedRows, k: int | None) -> float:
    import torch

    from mmoe_rec.batches.batch import make_batch
    from mmoe_rec.devices import limit_threads

    part, _ = next(rows.stream(REQUEST_ROWS))
    batch, seconds = make_batch(part.encoded, ranker.layout, torchrec=False), []
    with limit_threads(1), torch.inference_mode():  # as in the server
        for _ in range(30):
            started = time.perf_counter()
            ranker.model(batch, top_k=k)
            seconds.append(time.perf_counter() - started)
    return float(np.median(seconds) * 1000)


def table_of(measured: Sequence[Mapping[str, Any]]) -> Table:
    """One row for each number of experts."""
    from rich.table import Table

    table = Table(caption="AUC ± half the 95% interval, bootstrap over users; ms for a request of 500 rows")
    metrics = {"auc": "AUC", "gauc_user": "GAUC", "calibration": "calib."}
    names = [f"{task} {label}" for task in measured[0]["tasks"] for label in metrics.values()]
    for name in ("experts", *names, "ms"):
        table.add_column(name, justify="right", no_wrap=name == "experts")
    for each in measured:
        values = [(metric, task[metric]) for task in each["tasks"].values() for metric in metrics]
        table.add_row(str(each["k"]), *(_cell(*value) for value in values), f"{each['milliseconds']:.2f}")
    return table


def _cell(metric: str, value: Interval) -> str:
    text = "-" if value.value is None else f"{value.value:.4f}"
    if metric != "auc" or value.low is None or value.high is None:
        return text
    return f"{text} ±{(value.high - value.low) / 2:.4f}"
