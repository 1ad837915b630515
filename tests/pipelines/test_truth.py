"""Test rows for a model whose features were made from another log than that of the settings."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.evaluate import open_encoded_split
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.preprocessing.build_inputs import open_model_logs
from tests.inference.small_model import SmallModel, small_settings
from tests.log.small_logs import BASE, log_rows, random_log, write_log


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    return SmallModel(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def ranker(model: SmallModel) -> Ranker:
    return Ranker.load(model.folder)


def test_rows_at_hand_are_taken_whatever_they_are_worth(model: SmallModel, ranker: Ranker) -> None:
    tasks = {**BASE["tasks"], "click": {**BASE["tasks"]["click"], "score_weight": 5.0, "loss_weight": 0.1}}
    settings = model.settings.model_copy(update={"tasks": small_settings(Path("x"), tasks=tasks).tasks})
    with open_encoded_split(settings, model.folder, ranker) as folder:
        assert folder == model.prepared.split("test")


def test_sampling_rates_are_those_of_the_settings(model: SmallModel, ranker: Ranker, tmp_path: Path) -> None:
    """The model's own log had none, so its features know of no such column."""
    log = random_log(1, rows=600)
    rates = np.random.default_rng(0).choice([0.25, 0.5, 1.0], len(log))
    write_log(tmp_path / "log", log.append_column("rate", pa.array(rates)))
    settings = small_settings(tmp_path, columns={**BASE["columns"], "sampling_rate": "rate"})
    with open_encoded_split(settings, model.folder, ranker) as folder:
        rows = pq.read_table(folder)
    start, _ = settings.split.windows()["test"]
    assert start is not None
    times = log["time"].cast(pa.int64()).to_numpy()
    assert sorted(rows["sampling_rate"].to_pylist()) == sorted(rates[times >= start].tolist())


def test_the_time_of_events_may_be_called_as_a_key_of_the_log(tmp_path: Path) -> None:
    log = random_log(1)
    write_log(tmp_path / "log", log)
    write_log(tmp_path / "events", pa.table({"user": log["user"], "brand": log["time"]}))
    events = {"bought": {"path": str(tmp_path / "events"), "time": "brand"}}
    features = {
        "brand": {"kind": "id", "column": "brand"},
        "bought": {"kind": "counter", "events": "bought", "by": ["user"]},
    }
    data = {"log": str(tmp_path / "log"), "work_dir": str(tmp_path / "work"), "events": events}
    settings = small_settings(tmp_path, data=data, features=features)
    pipeline = FeaturePipeline(settings.schema_)
    pipeline.record_key_types(log_rows(log, settings.schema_))
    assert pipeline.key_types["brand"] == "string"
    (bought,) = open_model_logs(settings, pipeline).events
    assert bought.rows == log.num_rows


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"click": BASE["tasks"]["click"]}, r"the model predicts click, liked, spent; the settings have click"),
        (
            {**BASE["tasks"], "liked": {**BASE["tasks"]["liked"], "label": "spent"}},
            r"was trained with 'tasks.liked.label' \"liked\", and it is \"spent\" in the settings",
        ),
        (
            {**BASE["tasks"], "liked": {"label": "liked", "objective": "satisfaction"}},
            r"was trained with 'tasks.liked.observed_when",
        ),
        (
            {**BASE["tasks"], "liked": {**BASE["tasks"]["liked"], "conditional_on": "click"}},
            r"'tasks.liked.conditional_on' missing, and it is \"click\"",
        ),
    ],
)
def test_other_labels_are_no_common_truth(
    model: SmallModel, ranker: Ranker, tmp_path: Path, tasks: dict[str, Any], message: str
) -> None:
    features = {"item": {"kind": "id", "column": "item"}}
    settings = small_settings(tmp_path, tasks=tasks, features=features)
    with pytest.raises(UserError, match=message), open_encoded_split(settings, model.folder, ranker):
        pass
