"""The steps that commands are made of, each from settings to a folder or a result."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmoe_rec.errors import UserError
from mmoe_rec.features.build import Prepared, event_streams, prepare
from mmoe_rec.features.log import EventRows, Log
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.features.splits import encode_splits
from mmoe_rec.settings import Settings


def prepare_features(settings: Settings) -> Prepared:
    """Fitted features and encoded rows; what is there already is taken if it is still right."""
    return prepare(settings.data.log, settings.schema_, settings.split.windows(), Path(settings.data.work))


@dataclass(frozen=True)
class Trained:
    """A finished training: the model's artifact folder and, if it was registered, its version."""

    artifact: Path
    result: Any
    version: str | None = None
    run_id: str | None = None


def train_model(settings: Settings) -> Trained | None:
    """Features -> training on all ranks -> artifact -> registry. Gives None on ranks other than 0."""
    import torch.distributed as dist

    from mmoe_rec import tracking
    from mmoe_rec.devices import pick_device
    from mmoe_rec.training.loop import train
    from mmoe_rec.training.sharding import process_group

    work = Path(settings.data.work)
    device = pick_device(settings.training.device)
    first = int(os.environ.get("RANK", "0")) == 0
    if first:
        prepared = prepare_features(settings)
    with process_group(device):
        # Other ranks wait here until the first has built the features.
        dist.barrier()
        prepared = Prepared(work / "features")
        with tracking.open_run(settings.tracking.uri, settings.tracking.experiment or settings.name, active=first) as run:
            _log_start(run, settings, prepared)
            result = train(prepared, settings.model, settings.training, device, work / "checkpoint", run.log_metrics)
            dist.barrier()
            if not first:
                return None
            return _finish(run, settings, prepared, result, work)


def _log_start(run: Any, settings: Settings, prepared: Prepared) -> None:
    run.log_params(settings.model_dump(mode="json", include={"model", "training", "split"}))
    run.log_text(settings.to_yaml(), "settings.yaml")
    run.log_dict(prepared.manifest, "data.json")
    run.log_text((prepared.folder / "pipeline" / "pipeline.json").read_text(encoding="utf-8"), "features/pipeline.json")
    run.log_text(prepared.layout.to_json(), "features/layout.json")


def _finish(run: Any, settings: Settings, prepared: Prepared, result: Any, work: Path) -> Trained:
    from mmoe_rec import tracking
    from mmoe_rec.evaluation.plots import gate_weights_figure
    from mmoe_rec.model.mmoe import build_model
    from mmoe_rec.model.tables import plain_tables
    from mmoe_rec.serving.artifact import write_artifact
    from mmoe_rec.training.sharding import load_plain

    run.log_text(result.plan, "sharding_plan.txt")
    layout = prepared.layout
    gates = {task.name: result.best.gates[index].numpy() for index, task in enumerate(layout.tasks)}
    run.log_figure(gate_weights_figure(gates), "plots/gate_weights.png")
    run.log_metrics({f"best.{name}": value for name, value in result.best.flat().items()}, result.best_step)
    model = build_model(layout, settings.model, plain_tables(layout))
    load_plain(model, work / "checkpoint")
    artifact = work / "model"
    write_artifact(artifact, settings=settings, prepared=prepared, state_dict=model.state_dict())
    version = tracking.register(run, artifact, settings.registered_model, settings.tracking.alias)
    return Trained(artifact, result, version, run.run_id)


def test_rows(settings: Settings, artifact: Path) -> Path:
    """Folder of encoded test rows for a model: those at hand if the model's features made them, or freshly encoded."""
    from mmoe_rec.serving.artifact import read_artifact

    about = read_artifact(artifact)
    prepared = prepare_features(settings)
    if prepared.manifest["fingerprint"] == about.fingerprint:
        return prepared.split("test")
    pipeline = FeaturePipeline.load(artifact / "features")
    if set(pipeline.schema.tasks) != set(settings.tasks):
        raise UserError(
            f"the model predicts {', '.join(pipeline.schema.tasks)}, but the settings' tasks are {', '.join(settings.tasks)}"
        )
    log = Log(settings.data.log, pipeline.schema)
    folder = Path(settings.data.work) / "evaluation" / "encoded"
    encode_splits(log, pipeline, {"test": settings.split.windows()["test"]}, folder)
    return folder / "test"
