"""A small log, its features, and an artifact with random weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mmoe_rec.features.encoder import Inputs
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.inference.artifact import read_example
from mmoe_rec.inference.artifact_writer import write_artifact
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.log.reader import Log
from mmoe_rec.log.rows import LogRows
from mmoe_rec.model.mmoe import RankingModel, build_model
from mmoe_rec.model.model_layout import ModelLayout
from mmoe_rec.model.score import Calibration
from mmoe_rec.model.tables import PlainTables
from mmoe_rec.point_in_time.arrays import Ragged
from mmoe_rec.preprocessing.build_inputs import BuildInputs
from mmoe_rec.preprocessing.prepare import FeatureFolder, prepare
from mmoe_rec.settings.sections import Settings
from mmoe_rec.training.stacking import grow_trees
from tests.log.small_logs import ALL_KINDS, BASE, DAY, START, log_rows, random_log, remember, with_column, write_log

USER = 5
ITEMS = [3 * 10**17, -(10**17), 0, 7 * 10**17, 99]  # the last one is unknown
CONTEXT = {"time": "2023-11-29T12:00:00+01:00", "born": "2022-01-02T03:04:05"}


_LOOKED_AT = {"pooling": "attention", "attributes": ["brand"]}
ATTENTION: dict[str, Any] = {
    "clicked": ALL_KINDS["clicked"] | {"pooling": "attention"},
    "liked_items": ALL_KINDS["liked_items"] | _LOOKED_AT,
}

WITHOUT_COMPARISONS = {
    name: feature for name, feature in (ALL_KINDS | ATTENTION).items() if name not in ("among", "clicked_together")
}


def small_settings(work: Path, **sections: Any) -> Settings:
    """Settings of a random log, with every kind of feature."""
    day = [np.datetime64(START + days * DAY, "us").item().isoformat() for days in (6, 8)]
    return Settings.model_validate(
        {
            "name": "small",
            "data": {"log": str(work / "log"), "work_dir": str(work)},
            **BASE,
            "features": ALL_KINDS | ATTENTION,
            "split": {"train_end": day[0], "validation_end": day[1]},
            "model": {"bottom": {"units": [16]}, "experts": {"count": 3, "units": [8]}, "towers": {"units": [4]}},
            "serving": {"max_candidates": 50, "matmul_backend": "blas"},
            **sections,
        }
    )


class SmallModel:
    """Settings, prepared features, model and artifact folder in `work`; of a random log, unless tables are given, each
    of which becomes a file."""

    def __init__(self, work: Path, strings: bool = False, log: Sequence[pa.Table] = (), **sections: Any) -> None:
        self.settings = small_settings(work, **sections)
        write_log(work / "log", *(log or [random_log(1, rows=600, strings=strings)]))
        self.prepared: FeatureFolder = prepare(BuildInputs.of(self.settings))
        self.model_layout = layout = ModelLayout.of(self.prepared.layout, self.settings)
        self.model: RankingModel = build_model(layout, self.settings.model, PlainTables(layout))
        generator = torch.Generator().manual_seed(1)  # not the global one, whose state depends on what ran before
        for parameter in self.model.tables.parameters():
            # Initial embeddings are so small that a wrong one would go unnoticed.
            parameter.data.normal_(0.0, 0.5, generator=generator)
        for name, parameter in self.model.mixture.named_parameters():
            if name.startswith("histories."):  # adds nothing at first
                parameter.data.normal_(0.0, 0.1, generator=generator)
        self.model.eval()
        if self.settings.model.trees is not None:
            self.model.trees = grow_trees(self.settings, self.prepared, layout, self.model)
        self.folder = work / "model"
        self.write(self.folder)

    def write(self, folder: Path, calibration: Calibration | None = None) -> None:
        """The artifact, calibrated or not."""
        write_artifact(
            folder,
            settings=self.settings,
            prepared=self.prepared,
            state_dict=self.model.state_dict(),
            trees=self.model.trees,
            calibration=calibration,
        )

    def config(self) -> Path:
        """A settings file, for commands."""
        file = Path(self.settings.data.work_dir) / "settings.yaml"
        file.write_text(self.settings.to_yaml(), encoding="utf-8")
        return file

    def full_pipeline(self) -> FeaturePipeline:
        """The features with the whole past, as batch jobs use them."""
        pipeline = FeaturePipeline.load(self.prepared.serving)
        remember(pipeline, list(Log(self.settings.data.log, self.settings.schema_).stream()))
        return pipeline

    def later_rows(self, rows: int = 20) -> tuple[pa.Table, LogRows]:
        """Logged rows after the log's end, by one user at one time, as a log has them and in canonical types."""
        table = random_log(7, rows=rows)
        moments = {"time": START + 15 * DAY, "born": START - 900 * DAY}
        for name, value in {"user": USER, "age": 2, **moments}.items():
            values = pa.array([value] * rows)
            table = with_column(table, name, values.cast(table[name].type) if name in moments else values)
        return table, log_rows(table, self.settings.schema_)


def random_inputs(layout: ModelLayout, rows: int, random: np.random.Generator) -> Inputs:
    """Any table rows and numbers; lists of up to two, the parts of a history equally long."""
    inputs = Inputs(dense={name: random.normal(size=rows).astype(np.float32) for name in layout.dense_names(False)})
    lengths = {item.feature: random.integers(0, 3, rows).astype(np.int32) for item in layout.ids}
    for item in layout.ids:
        length = lengths[item.feature] if item.is_list else np.ones(rows, np.int32)
        drawn = random.integers(0, layout.table(item.table).rows, length.sum())
        inputs.ids[item.name] = Ragged(drawn, length) if item.is_list else drawn
    return inputs


def draw_requests(folder: Path, ranker: Ranker, requests: int) -> list[dict[str, Any]]:
    """Arguments of `Ranker.rank`: users and candidates that the model knows, in the context of its example."""
    random, names, example = np.random.default_rng(0), ranker.pipeline.schema.columns, read_example(folder)
    users, candidates = (
        pq.read_table(folder / "features" / f"latest.{role}.parquet").column(key).combine_chunks()
        for role, key in (("user", names.user), ("candidate", names.candidate))
    )
    drawn = []
    for _ in range(requests):
        shown = candidates.take(random.choice(len(candidates), min(50, len(candidates)), replace=False)).to_pylist()
        user = {names.user: users[int(random.integers(len(users)))].as_py()}
        drawn.append(example | {"user": user, "candidates": {names.candidate: shown}})
    return drawn


def as_request(table: pa.Table) -> dict[str, Any]:
    """Logged rows of one request as JSON values, with all their attributes."""
    first = table.slice(0, 1).to_pylist()[0]
    return {
        "user": {"user": first["user"], "age": first["age"]},
        "context": {"time": first["time"].isoformat(), "born": first["born"].isoformat()},
        "candidates": {name: table[name].to_pylist() for name in ("item", "brand", "price", "tags")},
    }
