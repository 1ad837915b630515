"""Saved state: the same for any order of rows, the same after a round trip, and enough for what it is for."""

import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmoe_rec.errors import UserError
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.log.rows import compute_labels
from mmoe_rec.preprocessing.count_and_encode import encode_rows
from tests.log.small_logs import (
    ALL_KINDS,
    DAY,
    START,
    assert_same,
    files_of,
    fit,
    log_rows,
    memory_table,
    random_log,
    save_memories,
    schema_of,
    times_of,
    with_column,
)

SCHEMA = schema_of(ALL_KINDS)
UNTIL = START + 6 * DAY
FIRST = START - 365 * DAY  # before the log: memories saved as of then are whole


def _saved(pipeline: FeaturePipeline, folder, moment=FIRST) -> dict[str, bytes]:
    folder.mkdir()
    pipeline.save(folder)
    save_memories(pipeline, folder, moment)
    return files_of(folder)


@settings(max_examples=settings().max_examples // 4)
@given(seed=st.integers(0, 10**6), strings=st.booleans(), data=st.data())
def test_neither_an_order_of_rows_or_files_nor_a_round_trip_changes_the_state(tmp_path_factory, seed, strings, data):
    table = random_log(seed, rows=60, strings=strings)
    cuts = data.draw(st.lists(st.integers(0, 60), max_size=5).map(sorted))
    shuffled = table.take(pa.array(np.random.default_rng(data.draw(st.integers(0, 99))).permutation(60)))
    folder = tmp_path_factory.mktemp("state")
    pipeline = fit(table, SCHEMA, UNTIL)
    saved = _saved(pipeline, folder / "one")
    assert _saved(fit(shuffled, SCHEMA, UNTIL, cuts=tuple(cuts)), folder / "other") == saved
    loaded = FeaturePipeline.load(folder / "one")
    assert (loaded.schema, loaded.layout) == (SCHEMA, pipeline.layout)
    assert_same(loaded.encode(log_rows(table, SCHEMA)), pipeline.encode(log_rows(table, SCHEMA)))
    assert _saved(loaded, folder / "again") == saved


@pytest.mark.parametrize("seed", range(3))
def test_statistics_come_from_training_rows_alone(seed):
    """Later rows may be others, and more."""
    table, rng = random_log(seed), np.random.default_rng(seed)
    training, later = (table.filter(pa.array(mask)) for mask in (times_of(table) < UNTIL, times_of(table) >= UNTIL))
    for name in ("item", "brand", "price", "born", "click", "liked", "spent", "slot"):
        later = with_column(later, name, table[name].take(pa.array(rng.integers(0, len(table), len(later)))))
    first, second = fit(table, SCHEMA, UNTIL), fit(pa.concat_tables([training, later, later]), SCHEMA, UNTIL)
    assert first.layout == second.layout
    for name, encoder in first.encoders.items():
        assert encoder.state() == second.encoders[name].state(), name
    assert not memory_table(first.encoders["clicked"]).equals(memory_table(second.encoders["clicked"]))


def test_the_latest_state_drops_what_no_later_request_can_ask_for(tmp_path):
    table = random_log(0, rows=300)
    pipeline = fit(table, SCHEMA, UNTIL)
    _saved(pipeline, tmp_path / "latest", START + 11 * DAY)
    loaded = FeaturePipeline.load(tmp_path / "latest")
    users = len(set(table["user"].to_pylist()))
    assert len(loaded.encoders["clicked"].store.events) <= users * 3
    assert len(loaded.encoders["brand_spent"].store.events) <= 4
    assert len(pipeline.encoders["clicked"].store.events) > users * 3


def test_state_is_refused_where_there_is_none_or_another_format(tmp_path):
    with pytest.raises(UserError, match=r"holds no feature state \(pipeline.json\)"):
        FeaturePipeline.load(tmp_path)
    _saved(fit(random_log(0), SCHEMA, UNTIL), tmp_path / "state")
    tmp_path /= "state"
    (tmp_path / "item.vocabulary.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"is damaged \("):
        FeaturePipeline.load(tmp_path)
    text = json.loads((tmp_path / "pipeline.json").read_text())
    (tmp_path / "pipeline.json").write_text(json.dumps({**text, "format": 99}))
    with pytest.raises(UserError, match="were made by another version of mmoe_rec"):
        FeaturePipeline.load(tmp_path)


def test_placement_may_be_absent():
    table = random_log(0)
    pipeline = fit(table, SCHEMA, UNTIL)
    rows = log_rows(table, SCHEMA)
    without = pipeline.encode(type(rows)(rows.table.drop_columns(["slot"]), SCHEMA))
    assert (without.ids["slot"] == 0).all()
    assert (pipeline.encode(rows).ids["slot"] > 0).all()
    np.testing.assert_array_equal(without.dense, pipeline.encode(rows).dense)


def test_a_request_may_bring_its_own_history_and_statistics():
    table = random_log(0)
    pipeline = fit(table, SCHEMA, UNTIL)
    rows = log_rows(table.slice(0, 2), SCHEMA)
    known = pipeline.encoders["item"].vocabulary.ids[:4].to_pylist()
    given = rows.table.append_column("clicked", pa.array([known, None], pa.list_(pa.int64())))
    given = given.append_column(
        "item_click_log_count",
        pa.array([pipeline.encoders["item_click"].numbers["item_click_log_count"].standardizer.mean] * 2),
    )
    encoded = pipeline.encode(type(rows)(given, SCHEMA))
    history = encoded.ids["clicked"]
    assert history.lengths.tolist() == [3, 0]
    assert history.values.tolist() == [6, 7, 8]  # the last three of four, oldest first
    index = [item.name for item in pipeline.layout.dense].index("item_click_log_count")
    assert encoded.dense[:, index].tolist() == [0.0, 0.0]


def test_labels_and_rates_that_differ_by_little_stay_distinct():
    log = random_log(3)
    spent = np.round(100 * np.nan_to_num(log["spent"].to_numpy()))
    far = log.set_column(log.column_names.index("spent"), "spent", pa.array(1.7e9 + spent))
    near = log.set_column(log.column_names.index("spent"), "spent", pa.array(spent))
    actual = []
    for table in (near, far):
        pipeline = fit(table, SCHEMA, UNTIL)
        rows = log_rows(table, SCHEMA)
        place = [item.name for item in pipeline.layout.dense].index("brand_spent_rate")
        labels = compute_labels(rows, UNTIL + 1000 * DAY)
        encoded = encode_rows(pipeline, pipeline.layout, rows, labels)
        task = next(item for item in pipeline.layout.tasks if item.name == "spent")
        label = encoded["label.spent"].to_numpy()
        actual.append((pipeline.encode(rows).dense[:, place], (label - task.mean) / task.std))
        assert len(np.unique(label)) == len(np.unique(table["spent"].to_numpy()))
    for first, second in zip(*actual, strict=True):
        assert np.ptp(first) > 1
        np.testing.assert_allclose(second, first, atol=2e-3)
