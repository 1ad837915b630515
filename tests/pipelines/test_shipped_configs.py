"""Every config that is shipped trains, on rows made to fit it, and gives a model that can be served."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mmoe_rec.features.kinds.cross import CrossFeature
from mmoe_rec.features.kinds.id import IdFeature
from mmoe_rec.features.kinds.ids import IdsFeature
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.inference.writing import write_artifact
from mmoe_rec.jobs.places import build_features
from mmoe_rec.model.layout import ModelLayout
from mmoe_rec.model.mmoe import build_model
from mmoe_rec.model.tables import PlainTables
from mmoe_rec.settings.load import load_settings
from mmoe_rec.settings.sections import Settings
from mmoe_rec.training.checkpoint import load_plain
from mmoe_rec.training.loop import Trainer
from mmoe_rec.training.ranks import process_group
from tests.fitting_log import write_fitting_logs

CONFIGS = sorted(Path("configs").glob("*.yaml"))
CPU = torch.device("cpu")
HERE = [
    "--data.engine=local",
    "--data.workers=1",
    "--training.device=cpu",
    "--training.precision=fp32",
    "--training.products=blas",
    "--training.tables=fbgemm",
    "--training.threads=1",
]
SHORT = ["--training.batch_size=100", "--training.epochs=1"]
NARROW = ["--model.bottom.units=[32]", "--model.experts.units=[16]"]


def test_there_are_configs() -> None:
    assert {"template", "movielens", "complete_journey", "synthetic", "cluster"} <= {each.stem for each in CONFIGS}


def _smaller(settings: Settings) -> Iterator[str]:
    """Overrides for tables that do not fit into a test."""
    for name, feature in settings.features.items():
        if isinstance(feature, CrossFeature):
            yield f"--features.{name}.buckets={min(feature.buckets, 1000)}"
        elif isinstance(feature, IdFeature | IdsFeature):
            yield f"--features.{name}.oov_buckets={min(feature.oov_buckets, 64)}"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_a_shipped_config_trains(config: Path, tmp_path: Path) -> None:
    overrides = [*HERE, *SHORT, *NARROW, *_smaller(load_settings(config)), "--data.work", str(tmp_path / "work")]
    settings = load_settings(config, [*overrides, *write_fitting_logs(load_settings(config), tmp_path)])
    prepared = build_features(settings)
    layout = ModelLayout.of(prepared.layout, settings)
    with process_group(CPU):
        trainer = Trainer(
            prepared, layout, settings.model, settings.training, CPU, tmp_path / "checkpoints", lambda *_: None
        )
        result = trainer.run()
    assert result.steps >= 5
    assert result.best is not None
    assert np.isfinite(list(result.best.loss.values())).all()

    model = build_model(layout, settings.model, PlainTables(layout))
    load_plain(model, result.best_checkpoint)
    write_artifact(tmp_path / "model", settings=settings, prepared=prepared, state_dict=model.state_dict())
    example = json.loads((tmp_path / "model" / "example_request.json").read_text(encoding="utf-8"))
    ranking = Ranker.load(tmp_path / "model").rank(**example)
    assert set(settings.tasks) <= set(ranking.predictions)
    assert np.isfinite(ranking.scores).all()
