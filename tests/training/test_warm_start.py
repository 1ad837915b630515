"""A model started from another one, on features that grew, gives at first what that one gave, for all rows."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from mmoe_rec.batches.batch import make_batch
from mmoe_rec.errors import UserError
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.log.reader import Log
from mmoe_rec.log.rows import LogRows
from mmoe_rec.model.mmoe import RankingModel, build_model
from mmoe_rec.model.model_layout import EmbeddingTable, ModelLayout
from mmoe_rec.model.tables import PlainTables, initial_rows, torchrec_tables
from mmoe_rec.model.warm_start import WarmStart
from mmoe_rec.preprocessing.build_inputs import BuildInputs
from mmoe_rec.preprocessing.extend import extend
from mmoe_rec.preprocessing.prepare import FeatureFolder, prepare
from mmoe_rec.settings.model import Model
from mmoe_rec.settings.training import Training
from mmoe_rec.training.checkpoint import load_unsharded
from mmoe_rec.training.distributed import process_group
from mmoe_rec.training.sharding import shard
from tests.inference.small_model import SmallModel
from tests.log.small_logs import ALL_KINDS, DAY, START, random_log, remember
from tests.training.ranks import join, save_weights, spawn

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Grown:
    """A model, and features that were extended from its own by two days with further items and brands."""

    small: SmallModel
    before: FeatureFolder
    prepared: FeatureFolder
    rows: LogRows

    @property
    def layout(self) -> ModelLayout:
        """The grown layout, with what the settings make of it."""
        return ModelLayout.of(self.prepared.layout, self.small.settings)

    def warm_start(self, settings: Model | None = None, second: SmallModel | None = None) -> WarmStart:
        """Starts with another structure, or with other features."""
        made_with = self.small.settings.model
        prepared = self.prepared if second is None else second.prepared
        layout = self.layout if second is None else ModelLayout.of(prepared.layout, second.settings)
        return WarmStart(self.small.folder, made_with, prepared, layout, settings or made_with)

    def plain(self) -> RankingModel:
        """A model of the grown features with other random weights."""
        layout = self.layout
        return build_model(layout, self.small.settings.model, PlainTables(layout, 99), 99).eval()

    def outputs(self, model: RankingModel, prepared: FeatureFolder) -> torch.Tensor:
        """Logits of all rows with placement, encoded by a state that remembers the whole log."""
        pipeline = FeaturePipeline.load(prepared.serving, stores=False)
        remember(pipeline, [self.rows])
        layout = ModelLayout.of(prepared.layout, self.small.settings)
        batch = make_batch(pipeline.encode(self.rows), layout, torchrec=False)
        with torch.inference_mode():
            torch.manual_seed(0)  # of the rows whose placement is hidden
            return model.train()(batch).logits


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Grown:
    work = tmp_path_factory.mktemp("grown")
    # Means alone: two new ids that shared a bucket were the same to attention, and no longer are.
    small = SmallModel(work, features=ALL_KINDS)
    shutil.copytree(small.prepared.folder, work / "before")
    table = random_log(5, rows=200, days=2.0)
    # No two at once: a history would take those in the order of their table rows, which differ.
    times = table["time"].cast(pa.int64()).to_numpy() + 11 * DAY + np.arange(table.num_rows)
    later = pa.array(times).cast(table["time"].type)
    items = pa.array([item + 5 if item < 0 else item for item in table["item"].to_pylist()])
    brands = pa.array([f"{brand}2" if brand == "a" else brand for brand in table["brand"].to_pylist()])
    for name, values in {"time": later, "item": items, "brand": brands}.items():
        table = table.set_column(table.column_names.index(name), name, values)
    pq.write_table(table, work / "log" / "1.parquet")
    end = START + 12 * DAY
    windows = {"train": (None, end), "validation": (end, end + DAY // 2), "test": (end + DAY // 2, None)}
    schema = small.settings.schema_
    extended = extend(BuildInputs(str(work / "log"), schema, windows, work))
    assert extended.new_ids["item"] > 2
    assert extended.new_ids["brand"] == 1
    tables = [rows.table for rows in Log(str(work / "log"), schema).stream()]
    rows = LogRows(pa.concat_tables(tables).combine_chunks(), schema)
    return Grown(small, FeatureFolder(work / "before"), extended.features, rows)


def test_first_outputs_are_those_of_the_other_model(grown: Grown) -> None:
    model = grown.plain()
    grown.warm_start().fill(model)
    expected = grown.outputs(grown.small.model, grown.before)
    assert expected.std() > 0.01
    torch.testing.assert_close(grown.outputs(model, grown.prepared), expected, atol=1e-6, rtol=0)

    # New rows that start at random would be noticed.
    weight = model.get_parameter("tables.embedding_bags.item.weight")
    known, table = grown.before.layout.table("item").rows, grown.layout.table("item")
    with torch.no_grad():
        weight[known:] = initial_rows(table, 0, known, table.rows)
    assert (grown.outputs(model, grown.prepared) - expected).abs().max() > 1e-3


def test_new_ids_start_from_their_buckets(grown: Grown) -> None:
    old = FeaturePipeline.load(grown.before.serving, stores=False).vocabularies["item"]
    new = FeaturePipeline.load(grown.prepared.serving, stores=False).vocabularies["item"]
    weights = load_file(grown.small.folder / "weights.safetensors")["tables.embedding_bags.item.weight"]
    table = grown.layout.table("item")
    rows = grown.warm_start().rows(table, 0, table.rows)
    assert torch.equal(rows[: len(weights)], weights)
    for place, item in enumerate(new.ids.to_pylist()):
        (bucket,) = old.encode(pa.array([item]))
        assert (bucket <= ALL_KINDS["item"]["oov_buckets"]) == (place >= len(old.ids))
        assert torch.equal(rows[1 + new.feature.oov_buckets + place], weights[bucket])


def test_any_range_of_rows_is_that_part_of_all(grown: Grown) -> None:
    start = grown.warm_start()
    for table in grown.layout.tables:
        whole = start.rows(table, 0, table.rows)
        for first in range(0, table.rows + 1, 3):
            for last in range(first, table.rows + 1, 2):
                assert torch.equal(start.rows(table, first, last), whole[first:last])


def _shard(prepared: FeatureFolder, layout: ModelLayout, artifact: Path, structure: Model, out: Path) -> str:
    """Shards a started model, saves it, and gives the plan."""
    start = WarmStart(artifact, structure, prepared, layout, structure)
    model = build_model(layout, structure, torchrec_tables(layout), seed=99)
    start.fill_dense(model)
    sharded = shard(model, layout, CPU, batch_size=8, settings=Training(), row_initializer=start.rows)
    save_weights(sharded.model, out)
    return sharded.plan


def _join_and_shard(
    rank: int, world: int, port: int, prepared: FeatureFolder, layout: ModelLayout, *arguments: Any
) -> None:
    with join(rank, world, port):
        plan = _shard(prepared, layout, *arguments)
    assert "rank 0" in plan
    assert "rank 1" in plan


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.thorough)])
def test_sharded_tables_start_like_plain_ones(grown: Grown, tmp_path: Path, world: int) -> None:
    arguments = (grown.prepared, grown.layout, grown.small.folder, grown.small.settings.model, tmp_path / "saved")
    if world == 1:
        with process_group(CPU):
            _shard(*arguments)
    else:
        spawn(_join_and_shard, *arguments, ranks=world)
    saved, expected = grown.plain(), grown.plain()
    load_unsharded(saved, tmp_path / "saved")
    grown.warm_start().fill(expected)
    for name, weight in expected.state_dict().items():
        assert torch.equal(saved.state_dict()[name], weight), name


# Refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": {"count": 4, "units": [8]}}, r"'model.experts.count' is 3 in the model, and 4 in the settings"),
        ({"bottom": {"units": [16], "piecewise": False}}, r"'model.bottom.piecewise' is true in the model, and false"),
        ({"towers": {"units": [4, 4]}}, r"'model.towers.units' is \[4\] in the model, and \[4, 4\]"),
    ],
)
def test_other_structures_are_refused(grown: Grown, change: dict[str, Any], message: str) -> None:
    tree = {**grown.small.settings.model.model_dump(), **change}
    with pytest.raises(UserError, match=r"Training can't start from the model in '.*': .*" + message):
        grown.warm_start(Model.model_validate(tree))
    grown.warm_start(Model.model_validate({**grown.small.settings.model.model_dump(), "trees": {}}))  # grown anew


def _with(changes: dict[str, Any]) -> dict[str, Any]:
    return {"features": {**ALL_KINDS, **changes}}


@pytest.mark.parametrize(
    ("sections", "log", "message"),
    [
        (
            _with({"item": {**ALL_KINDS["item"], "dim": 3}}),
            1,
            r"'features.item.dim' is 16 in the model, and 3 in the settings",
        ),
        (
            _with({"clicked": {**ALL_KINDS["clicked"], "pooling": "attention"}}),
            1,
            r"'features.clicked.pooling' is .mean. in the model, and .attention",
        ),
        (
            _with({"extra": {"kind": "id", "column": "brand"}}),
            1,
            r"'features.extra' is missing in the model, and present",
        ),
        (
            _with({"item": {**ALL_KINDS["item"], "oov_buckets": 3}}),
            1,
            r"'features.item.oov_buckets' is 4 in the model, and 3",
        ),
        (_with({}), 2, r"IDs of feature 'item' have other rows"),
        ({"features": {"price": ALL_KINDS["price"]}}, 1, r"'features.item' is present in the model, and missing"),
    ],
)
def test_other_features_are_refused(
    grown: Grown, tmp_path: Path, sections: dict[str, Any], log: int, message: str
) -> None:
    second = SmallModel(tmp_path, **sections)
    if log != 1:
        pq.write_table(random_log(log, rows=600), tmp_path / "log" / "0.parquet")
        schema, windows = second.settings.schema_, second.settings.split.windows()
        second.prepared = prepare(BuildInputs(second.settings.data.log, schema, windows, tmp_path))
    with pytest.raises(UserError, match=message):
        grown.warm_start(second=second)


def test_statistics_of_other_rows_are_refused(tmp_path: Path) -> None:
    """Without ids, that these differ is all that tells the features of one log from those of another."""
    sections = {"features": {name: ALL_KINDS[name] for name in ("price", "when")}}
    left = SmallModel(tmp_path / "one", **sections)
    pq.write_table(random_log(3, rows=600), tmp_path / "one" / "log" / "0.parquet")
    settings = left.settings
    prepared = prepare(replace(BuildInputs.of(settings), work=tmp_path / "other"))
    with pytest.raises(UserError, match=r"feature or task 'price' was fitted to other rows"):
        WarmStart(left.folder, settings.model, prepared, ModelLayout.of(prepared.layout, settings), settings.model)


def test_weights_that_cannot_be_read(grown: Grown, tmp_path: Path) -> None:
    shutil.copytree(grown.small.folder, tmp_path / "model")
    settings = grown.small.settings.model
    start = WarmStart(tmp_path / "model", settings, grown.prepared, grown.layout, settings)
    (tmp_path / "model" / "weights.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"the weights of the model in '.*' can't be read"):
        start.rows(EmbeddingTable("item", 20, 16), 0, 5)
    with pytest.raises(UserError, match=r"the weights of the model in '.*' can't be read"):
        start.fill_dense(grown.plain())
