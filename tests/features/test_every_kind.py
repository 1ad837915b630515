"""What holds for every kind of feature: a new one is tested here by its line in `EXAMPLES`."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.features.encoder import PointInTimeEncoder
from mmoe_rec.features.kinds import FEATURE_KINDS, NAMES
from mmoe_rec.features.kinds.relative import RelativeEncoder, RelativeFeature
from mmoe_rec.features.pipeline import FeaturePipeline, max_layout
from mmoe_rec.log.columns import column_uses
from mmoe_rec.log.rows import LogRows
from mmoe_rec.point_in_time.arrays import Ragged
from mmoe_rec.point_in_time.join import in_window
from mmoe_rec.settings.load import describe_settings
from mmoe_rec.settings.schema import EventFeature, Schema
from tests.log.small_logs import BASE, DAY, START, assert_same, assert_same_inputs, fit, log_rows, random_log, schema_of

ITEM = {"item": {"kind": "id", "column": "item", "min_count": 1, "max_size": 50}}
EXAMPLES: dict[str, dict[str, Any]] = {
    "id": {"column": "brand", "min_count": 1, "max_size": 50},
    "ids": {"column": "tags", "min_count": 1, "max_size": 50},
    "numeric": {"column": "price", "transform": "buckets"},
    "vector": {"column": "look", "size": 2},
    "time": {"column": "born", "parts": ["hour", "age"]},
    "cross": {"columns": ["brand", "age"], "buckets": 9},
    "match": {"columns": ["likes", "tags"], "compare": ["overlap", "jaccard"]},
    "history": {"task": "click", "of": "item", "length": 3},
    "counter": {"task": "click", "by": ["brand"]},
    "cooccurrence": {"task": "click", "last": 3},
    "relative": {"columns": ["price"]},
}
ROLES = {**BASE["roles"], "user": ["age", "likes"], "candidate": [*BASE["roles"]["candidate"], "look"]}


UNTIL = START + 8 * DAY


def _log(seed: int) -> pa.Table:
    rng, table = np.random.default_rng(seed), random_log(seed)
    table = table.append_column("look", pa.array(rng.normal(size=(len(table), 2)).tolist(), pa.list_(pa.float64())))
    return table.append_column("likes", table["tags"].combine_chunks().take(pa.array(rng.permutation(len(table)))))


def _schema(kind: str) -> Schema:
    return schema_of({**ITEM, "f": {"kind": kind, **EXAMPLES[kind]}}, roles=ROLES)


def test_every_kind_is_tested_and_described() -> None:
    assert set(EXAMPLES) == set(NAMES) == set(FEATURE_KINDS)
    files = Path("mmoe_rec/features/kinds").glob("*.py")
    assert {file.stem for file in files} - {"__init__"} == set(NAMES)
    guide = Path("docs/how-to/choose-features.md").read_text(encoding="utf-8")
    template = Path("configs/template.yaml").read_text(encoding="utf-8")
    for name in NAMES:
        assert f"\n| `{name}` | " in guide
        assert f"kind: {name}" in template
        assert f"features.NAME (kind: {name}): " in describe_settings()


@lru_cache(1)
def _fitted(kind: str) -> tuple[Schema, FeaturePipeline, LogRows]:
    """The schema, a pipeline fitted to one log, and rows of another one."""
    schema = _schema(kind)
    return schema, fit(_log(1), schema, UNTIL), log_rows(_log(2), schema)


@pytest.mark.parametrize("kind", NAMES)
def test_inputs_are_those_of_the_layout_and_survive_saving(kind: str, tmp_path: Path) -> None:
    schema, pipeline, rows = _fitted(kind)
    input_spec, inputs = pipeline.encoders["f"].input_spec(), pipeline.encoders["f"].encode(rows).standardized()
    assert [name for name, _, _ in input_spec.ids] == list(inputs.ids)
    assert [item.name for item in input_spec.dense] == list(inputs.dense)
    assert inputs.ids or inputs.dense
    sizes = {table.name: table.rows for table in pipeline.layout.tables}
    for name, table, is_list in input_spec.ids:
        given = inputs.ids[name]
        assert isinstance(given, Ragged) == is_list
        values, count = (given.values, len(given.lengths)) if isinstance(given, Ragged) else (given, len(given))
        assert count == len(rows)
        assert (values.min() >= 0, values.max() < sizes[table]) == (True, True)
    for value in inputs.dense.values():
        assert (value.shape, value.dtype) == ((len(rows),), np.float32)
        assert np.isfinite(value).all()
    planned = {table.name: table.rows for table in max_layout(schema).tables}
    assert sizes.keys() == planned.keys()
    assert all(size <= planned[name] for name, size in sizes.items()), "no log makes larger tables"
    pipeline.save(tmp_path)
    restored = FeaturePipeline.load(tmp_path, stores=False)
    for name, encoder in pipeline.point_in_time_encoders.items():
        restored.point_in_time_encoders[name].store = encoder.store
    assert restored.layout == pipeline.layout
    assert_same_inputs(restored.encoders["f"].encode(rows).standardized(), inputs)


@pytest.mark.parametrize("kind", NAMES)
def test_it_is_fitted_by_merging_what_parts_of_the_log_counted(kind: str) -> None:
    """As workers of a build do: what an encoder learns outside its `counts` would be lost."""
    schema, whole, _ = _fitted(kind)
    merged = FeaturePipeline(schema)
    for part in (_log(1).slice(0, 100), _log(1).slice(100)):
        worker, rows = FeaturePipeline(schema), log_rows(part, schema)
        worker.partial_fit(rows.filter(in_window(rows.times(), (None, UNTIL))), UNTIL)
        sent = {name: type(counts).from_table(counts.to_table()) for name, counts in worker.counts.items()}
        merged.merge(sent, worker.key_types)
    merged.finish_fit()
    first, second = merged.encoders["f"], whole.encoders["f"]
    if isinstance(first, PointInTimeEncoder | RelativeEncoder):  # Later steps of a build fit their numbers.
        assert getattr(first, "prior", 0) == getattr(second, "prior", 0)
    else:
        assert first.state() == second.state()


@pytest.mark.parametrize("kind", NAMES)
def test_what_a_kind_may_leave_out_is_there_where_it_is_needed(kind: str) -> None:
    schema, pipeline, _ = _fitted(kind)
    feature, encoder = schema.features["f"], pipeline.encoders["f"]
    reads, input_spec, semantics = feature.reads(), encoder.input_spec(), feature.semantics(schema)
    assert set(feature.list_lengths) == {column for column, use in reads.items() if use == "vector"}
    others = {table for _, table, _ in input_spec.ids} - {table.name for table in input_spec.tables}
    assert others == ({feature.table_owner} if feature.table_owner else set())
    (use,) = set(reads.values()) or {"time"}
    if len(reads) == 1 and use in ("key", "keys", "number") and not isinstance(feature, EventFeature | RelativeFeature):
        assert encoder.example_value(use) is not None
    assert semantics.zeros_missing == (use == "vector")
    assert reads or schema.role_of("f") in (feature.fixed_role, "context")
    assert semantics.columns
    assert set(semantics.columns) <= {*column_uses(schema)}
    for table in input_spec.tables:
        assert semantics.first_seen_row < table.rows
        if semantics.row_name is None:
            assert table.name in pipeline.vocabularies
        else:
            rows = range(semantics.first_seen_row, table.rows)
            assert len({semantics.row_name(table.name, row) for row in rows}) == len(rows)


@pytest.mark.parametrize("kind", NAMES)
def test_every_column_that_it_reads_is_reported(kind: str) -> None:
    """What `reads` leaves out would be neither checked nor read in canonical form, and `log_rows` does not have it."""
    schema, _, _ = _fitted(kind)
    for column in {*schema.features["f"].reads()} - {"user", "item", "time"}:
        left = [column_name for column_name in _log(2).column_names if column_name != column]
        with pytest.raises((UserError, KeyError)):
            fit(_log(2).select(left), schema, UNTIL)


@pytest.mark.parametrize(
    "kind", [name for name, item in FEATURE_KINDS.items() if issubclass(item.encoder, PointInTimeEncoder)]
)
def test_what_a_request_may_give_instead_is_taken(kind: str) -> None:
    schema, pipeline, rows = _fitted(kind)
    before = pipeline.encode(rows)
    for name, (use, _) in pipeline.point_in_time_encoders["f"].result_columns().items():
        given = pa.array([[0]] * len(rows)) if use == "keys" else pa.array(np.full(len(rows), 0.25))
        after = pipeline.encode(LogRows(rows.table.append_column(name, given), schema))
        with pytest.raises(AssertionError):
            assert_same(before, after)
