"""Features that a model can do without: permutations beside a plain loop, and runs without them."""

import zlib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from sklearn.metrics import roc_auc_score

from mmoe_rec.batches.encoded_dataset import EncodedDataset
from mmoe_rec.evaluation.evaluate import predict_rows
from mmoe_rec.evaluation.intervals import Difference
from mmoe_rec.experiments.importance import (
    choose_removable,
    find_uncompared,
    group_by_source,
    is_negligible,
    permutation_importance,
    sample_rows,
)
from mmoe_rec.experiments.runner import Network, Runner
from mmoe_rec.model.model_layout import ModelLayout
from mmoe_rec.model.score import UNCALIBRATED
from tests.batches import encoded_files
from tests.commands import run_and_read
from tests.inference.small_model import SmallModel
from tests.log.small_logs import BASE, fit, random_log, schema_of, times_of, with_requests, write_log
from tests.pipelines.learnable_log import learnable_log, settings_tree
from tests.pipelines.short_trainings import RATES, SMALL


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    """A model of random weights with every kind of feature, on requests whose rows lie anywhere."""
    work = tmp_path_factory.mktemp("permuted")
    sections = {"columns": {**BASE["columns"], "request": "request"}, "evaluation": {"resamples": 100}}
    return SmallModel(work, log=[with_requests(random_log(3, rows=1500))], **sections)


def exchange(world: SmallModel, feature: str, repeat: int, folder: Path) -> Path:
    """Rows in which a feature's columns come from other ones: a loop over values."""
    layout, schema = world.prepared.layout, world.settings.schema_
    files = sorted(world.prepared.split("validation").glob("*.parquet"))
    rows = pa.concat_tables([pq.read_table(file) for file in files])
    columns, generator = rows.to_pydict(), np.random.default_rng([zlib.crc32(feature.encode()), repeat])
    requests = list(dict.fromkeys(columns["request"]))
    others = [requests[place] for place in generator.permutation(len(requests))]
    donor_of = dict(zip(requests, others, strict=True))
    of_requests = [columns["request"].index(donor_of[item]) for item in columns["request"]]
    of_rows = generator.permutation(len(rows)).tolist()
    donors = of_requests if schema.role_of(feature) in ("user", "context") else of_rows
    own = [f"id.{item.name}" for item in layout.ids if item.feature == feature]
    own += [f"dense.{item.name}" for item in layout.dense if item.feature == feature]
    exchanged = columns | {column: [columns[column][donor] for donor in donors] for column in own}
    folder.mkdir(parents=True)
    pq.write_table(pa.table(exchanged, rows.schema), folder / "rows.parquet")
    return folder


def measure(world: SmallModel, folder: Path) -> float:
    rows = [part for part, _ in EncodedDataset(folder, world.model_layout).stream(100)]
    predicted = predict_rows(world.model, world.model_layout, rows, UNCALIBRATED)[0][:, 0]
    label = np.concatenate([part.labels for part in rows])[:, 0]
    return float(roc_auc_score(label[~np.isnan(label)], predicted[~np.isnan(label)]))


def test_losses_are_those_of_a_plain_loop(world: SmallModel, tmp_path: Path) -> None:
    names = ["item", "clicked", "item_click"]
    network = Network(world.model, world.model_layout, UNCALIBRATED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmoe_rec.experiments.importance.MAX_REPEATS", 2)
        held: Any = SimpleNamespace(settings=world.settings, prepared=world.prepared)
        actual = permutation_importance(held, network, names, 0.001)
    assert actual["objective"] == "auc of click"
    whole, losses = (
        measure(world, world.prepared.split("validation")),
        {name: message for name, message, _ in actual["rows"]},
    )
    for name in names:
        folders = [exchange(world, name, repeat, tmp_path / name / str(repeat)) for repeat in range(2)]
        loss = whole - np.mean([measure(world, folder) for folder in folders])
        assert float(losses[name].split()[0]) == pytest.approx(loss, abs=1e-4), name
    ordered = [float(message.split()[0]) for _, message, _ in actual["rows"]]
    assert ordered == sorted(ordered)


def test_groups_are_those_of_one_source(world: SmallModel) -> None:
    schema = world.settings.schema_
    sources = group_by_source(schema)
    assert {name for features in sources.values() for name in features} == {*schema.features}
    assert "item" in sources["values of candidate"]
    assert "item_click" in sources["counters of click"]


def loss(value: float, reach: float, p_value: float = 1.0) -> Difference:
    return Difference(value, value - reach, value + reach, p_value=p_value, corrected_p_value=p_value)


def test_what_may_be_left_out_together() -> None:
    """Copies of each other are harmless alone and not together; what others read stays with them."""
    losses = {"copy": loss(0.0004, 0.0001), "noise": loss(0.0001, 0.0001), "other_copy": loss(0.0003, 0.0001)}
    losses |= {"table": loss(0.0, 0.0001), "reader": loss(0.02, 0.001, p_value=0.0), "wide": loss(-0.002, 0.0031)}
    asked = list[list[str]]()

    def joint(names: Sequence[str]) -> Difference:
        asked.append(list(names))
        both = {"copy", "other_copy"} <= {*names}
        return loss(0.01 if both else 0.0, 0.0005, p_value=0.0 if both else 1.0)

    assert choose_removable(losses, 0.001, joint, {"table": ["reader"]}) == ["noise", "other_copy"]
    assert asked == [["noise", "other_copy", "copy"], ["noise", "other_copy"]]
    assert choose_removable({"reader": losses["reader"]}, 0.001, joint, {}) == []
    assert not is_negligible(loss(0.0006, 0.0002, p_value=0.01), 0.001), "half of the margin where a loss is shown"


def test_whole_users_are_held(tmp_path: Path) -> None:
    plain = encoded_files.LAYOUT
    layout = ModelLayout(plain.tables, plain.ids, plain.dense, plain.tasks)  # type: ignore[arg-type]
    random, tables = np.random.default_rng(0), []
    for start in range(0, 3000, 500):
        table = encoded_files.table(range(start, start + 500))
        users = pa.array([f"user {integer}" for integer in random.integers(0, 300, 500)])
        table = table.set_column(table.column_names.index("user"), "user", users)
        tables.append(table.append_column("request", users).append_column("candidate", users))
        pq.write_table(tables[-1], tmp_path / f"{start:05d}.parquet")
    whole = pa.concat_tables(tables).to_pandas()
    settings: Any = SimpleNamespace(training=SimpleNamespace(sampling_correction="none"))
    for most in (1, 700, 3000):
        held, beside = sample_rows(settings, tmp_path, layout, most)
        expected = whole[whole["user"].isin(set(beside["user"].to_pylist()))]
        assert beside["user"].to_pylist() == expected["user"].tolist()
        np.testing.assert_array_equal(held.encoded.dense[:, 0], expected["dense.price"])
        assert len(held) == len(expected)
        assert most - 60 < len(held) <= most or most == 1
    assert len(held) == 3000


@pytest.mark.thorough
def test_noise_is_left_out_and_copies_are_not(tmp_path: Path) -> None:
    """Permuted, both copies of what decides are used; trained without one, nothing is lost. A second command trains
    nothing."""
    log, tree = learnable_log(rows=8_000), settings_tree(tmp_path, training=SMALL | RATES)
    random = np.random.default_rng(0).normal(size=len(log))
    log = log.append_column("same_price", log["price"]).append_column("noise", pa.array(random))
    tree["roles"]["candidate"] += ["same_price", "noise"]
    del tree["features"]["item"], tree["features"]["clicked"]
    tree["features"] |= {name: {"kind": "numeric", "column": name} for name in ("same_price", "noise")}
    write_log(tmp_path / "log", log)
    config = tmp_path / "settings.yaml"
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    words = ["compare", "--config", config, "--features", "--margin", 0.02, "--seeds", 2]
    words += ["--only", "noise", "price", "same_price"]
    printed = run_and_read(*words)
    assert "candidates to leave out together: `noise`" in printed
    assert "`without price` does not differ significantly from `these settings`" in printed
    assert "`without noise` does not differ significantly from `these settings`" in printed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "train_run", None)  # All runs are complete.
        assert run_and_read(*words) == printed


def test_ids_on_both_sides_are_untested_until_they_are_compared() -> None:
    rows, rng = 400, np.random.default_rng(0)
    skills = [f"skill {number}" for number in range(12)]
    columns: dict[str, Any] = {name: rng.choice(skills, rows) for name in ("wish", "skill")}
    columns |= {
        "town": rng.choice(["a", "b"], rows),
        "place": rng.choice(["a", "b"], rows),
        "sort": rng.choice(12, rows),
    }
    table = random_log(0, rows)
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values))
    roles = {"user": ["wish", "town"], "candidate": ["skill", "place", "sort"]}
    features = {name: {"kind": "id", "column": name, "min_count": 1} for name in columns}
    until = int(times_of(table).max())
    assert find_uncompared(fit(table, schema_of(features, roles=roles), until)) == {"wish": "skill", "skill": "wish"}
    features["same"] = {"kind": "match", "columns": ["skill", "wish"], "compare": "equal"}
    assert find_uncompared(fit(table, schema_of(features, roles=roles), until)) == {}
