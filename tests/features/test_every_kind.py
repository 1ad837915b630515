"""What holds for every kind of feature: a new one is tested here by its line in `EXAMPLES`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.features.encoder import Encoder, Kind, MemoryEncoder
from mmoe_rec.features.kinds import KINDS, NAMES
from mmoe_rec.features.kinds.counter import CounterEncoder, CounterFeature
from mmoe_rec.features.kinds.cross import CrossEncoder, CrossFeature, EmbeddedCross
from mmoe_rec.features.kinds.id import IdFeature
from mmoe_rec.features.pipeline import FeaturePipeline, largest_layout
from mmoe_rec.features.vocabulary import VocabularyFeature
from mmoe_rec.log.columns import column_uses
from mmoe_rec.log.rows import LogRows
from mmoe_rec.point_in_time.arrays import Ragged
from mmoe_rec.point_in_time.join import in_window
from mmoe_rec.settings.help import describe
from mmoe_rec.settings.schema import Remembering, Schema
from tests.log.small_logs import BASE, DAY, START, fit, log_rows, random_log, schema_of

ITEM = {"item": {"kind": "id", "column": "item", "min_count": 1, "max_size": 50}}
EXAMPLES: dict[str, dict[str, Any]] = {
    "id": {"column": "brand", "min_count": 1, "max_size": 50},
    "ids": {"column": "tags", "min_count": 1, "max_size": 50},
    "numeric": {"column": "price", "transform": "buckets"},
    "vector": {"column": "look", "size": 2},
    "time": {"column": "born", "parts": ["hour", "age"]},
    "cross": {"columns": ["brand", "age"], "buckets": 9},
    "history": {"task": "click", "of": "item", "length": 3},
    "counter": {"task": "click", "by": ["brand"]},
}
ROLES = {**BASE["roles"], "candidate": [*BASE["roles"]["candidate"], "look"]}


def _log(seed: int) -> pa.Table:
    rng, table = np.random.default_rng(seed), random_log(seed)
    return table.append_column("look", pa.array(rng.normal(size=(len(table), 2)).tolist(), pa.list_(pa.float64())))


def _schema(kind: str) -> Schema:
    return schema_of({**ITEM, "f": {"kind": kind, **EXAMPLES[kind]}}, roles=ROLES)


def test_every_kind_is_tested_and_described() -> None:
    assert set(EXAMPLES) == set(NAMES) == set(KINDS)
    files = Path("mmoe_rec/features/kinds").glob("*.py")
    assert {file.stem for file in files} - {"__init__"} == set(NAMES)
    guide = Path("configs/README.md").read_text(encoding="utf-8")
    template = Path("configs/template.yaml").read_text(encoding="utf-8")
    for name in NAMES:
        assert f"\n| `{name}` | " in guide
        assert f"kind: {name}" in template
        assert f"features.NAME (kind: {name}): " in describe()


@pytest.mark.parametrize("kind", NAMES)
def test_inputs_are_those_of_the_layout_and_survive_saving(kind: str, tmp_path: Path) -> None:
    schema = _schema(kind)
    pipeline = fit(_log(1), schema, START + 8 * DAY)
    rows = log_rows(_log(2), schema)
    outline, inputs = pipeline.encoders["f"].outline(), pipeline.encoders["f"].encode(rows).standardised()
    assert [name for name, _, _ in outline.ids] == list(inputs.ids)
    assert [each.name for each in outline.dense] == list(inputs.dense)
    assert inputs.ids or inputs.dense
    sizes = {table.name: table.rows for table in pipeline.layout.tables}
    for name, table, many in outline.ids:
        assert isinstance(inputs.ids[name], Ragged) == many
        assert (len(inputs.ids[name].lengths) if many else len(inputs.ids[name])) == len(rows)
        ids = inputs.ids[name].values if many else inputs.ids[name]
        assert ids.min() >= 0
        assert ids.max() < sizes[table]
    for each in inputs.dense.values():
        assert each.shape == (len(rows),)
        assert each.dtype == np.float32
        assert np.isfinite(each).all()
    pipeline.save(tmp_path)
    restored = FeaturePipeline.load(tmp_path, memories=False)
    for name, encoder in pipeline.memory_encoders.items():
        restored.memory_encoders[name].memory = encoder.memory
    again = restored.encoders["f"].encode(rows).standardised()
    assert restored.layout == pipeline.layout
    for name, each in inputs.dense.items():
        assert np.array_equal(again.dense[name], each)
    for name, each in inputs.ids.items():
        assert np.array_equal(getattr(again.ids[name], "values", again.ids[name]), getattr(each, "values", each))


@pytest.mark.parametrize("kind", NAMES)
def test_it_is_fitted_by_merging_what_parts_of_the_log_counted(kind: str) -> None:
    """As workers of a build do: what an encoder learns outside its `counts` would be lost."""
    schema, until = _schema(kind), START + 8 * DAY
    whole = fit(_log(1), schema, until)
    rows = [log_rows(part, schema) for part in (_log(1).slice(0, 100), _log(1).slice(100))]
    merged = FeaturePipeline(schema)
    for each in rows:
        worker = FeaturePipeline(schema)
        worker.learn(each.filter(in_window(each.times(), (None, until))), until)
        sent = {name: type(counts).from_table(counts.to_table()) for name, counts in worker.counts.items()}
        merged.merge(sent, worker.key_types)
    merged.finish()
    if isinstance(merged.encoders["f"], MemoryEncoder):
        assert getattr(merged.encoders["f"], "prior", 0) == getattr(whole.encoders["f"], "prior", 0)
    else:
        assert merged.encoders["f"].state() == whole.encoders["f"].state()


@pytest.mark.parametrize("kind", NAMES)
def test_what_a_kind_may_leave_out_is_there_where_it_is_needed(kind: str) -> None:
    schema = _schema(kind)
    feature, pipeline = schema.features["f"], fit(_log(1), schema, START + 8 * DAY)
    encoder, reads = pipeline.encoders["f"], feature.reads()
    assert set(feature.list_lengths) == {column for column, use in reads.items() if use == "vector"}
    assert feature.time_zones == ((feature.timezone,) if "timezone" in type(feature).model_fields else ())
    own = {table.name for table in encoder.outline().tables}
    others = {table for _, table, _ in encoder.outline().ids} - own
    assert others == ({feature.shares} if feature.shares else set())
    assert bool(encoder.column_types()) == isinstance(feature, VocabularyFeature)
    (use,) = set(reads.values()) or {"time"}
    if len(reads) == 1 and use in ("key", "keys", "number") and not isinstance(feature, Remembering):
        assert encoder.usual(use) is not None
    meaning = feature.meaning(schema)
    assert meaning.zeros_missing == (use == "vector")
    assert meaning.hashed == (kind == "cross")
    assert reads or schema.role_of("f") in (feature.fixed_role, "context")


@pytest.mark.parametrize("kind", NAMES)
def test_no_log_makes_larger_tables_than_are_planned_for(kind: str) -> None:
    schema = _schema(kind)
    planned = {table.name: table.rows for table in largest_layout(schema).tables}
    fitted = {table.name: table.rows for table in fit(_log(1), schema, START + 8 * DAY).layout.tables}
    assert fitted.keys() == planned.keys()
    for name, rows in fitted.items():
        assert rows <= planned[name]


@pytest.mark.parametrize("kind", NAMES)
def test_every_column_that_it_reads_is_told(kind: str) -> None:
    """What `reads` leaves out would be neither checked nor read in canonical form, and rows would not have it."""
    schema = _schema(kind)
    keys = {"user", "item", "time"}
    for column in {*schema.features["f"].reads()} - keys:
        left = [each for each in _log(2).column_names if each != column]
        with pytest.raises((UserError, KeyError)):
            fit(_log(2).select(left), schema, START + 8 * DAY)
    told = {*column_uses(schema)}
    pipeline = fit(_log(1), schema, START + 8 * DAY)
    rows = log_rows(_log(2).select([each for each in _log(2).column_names if each in told]), schema)
    pipeline.encoders["f"].encode(rows).standardised()


@pytest.mark.parametrize("kind", NAMES)
def test_rows_of_its_tables_have_names(kind: str) -> None:
    schema = _schema(kind)
    pipeline = fit(_log(1), schema, START + 8 * DAY)
    meaning = schema.features["f"].meaning(schema)
    assert meaning.columns
    assert set(meaning.columns) <= {*column_uses(schema)}
    for table in pipeline.encoders["f"].outline().tables:
        assert meaning.first_known < table.rows
        if meaning.row_name is None:
            assert table.name in pipeline.owners
        else:
            rows = range(meaning.first_known, table.rows)
            assert len({meaning.row_name(table.name, row) for row in rows}) == len(rows)


@pytest.mark.parametrize("kind", [name for name, each in KINDS.items() if hasattr(each.encoder, "precomputed")])
def test_what_a_request_may_give_instead_is_taken(kind: str) -> None:
    schema = _schema(kind)
    pipeline = fit(_log(1), schema, START + 8 * DAY)
    rows = log_rows(_log(2), schema)
    before = pipeline.encode(rows)
    encoder = pipeline.memory_encoders["f"]
    assert list(encoder.precomputed()) == list(encoder.result_names)
    for name, (use, _) in encoder.precomputed().items():
        given = pa.array([[0]] * len(rows)) if use == "keys" else pa.array(np.full(len(rows), 0.25))
        after = pipeline.encode(LogRows(rows.table.append_column(name, given), schema))
        assert not _equal(before, after)


def _equal(one: Any, other: Any) -> bool:
    ids = all(
        np.array_equal(getattr(each, "values", each), getattr(other.ids[name], "values", other.ids[name]))
        for name, each in one.ids.items()
    )
    return ids and np.array_equal(one.dense, other.dense)


# A kind that leaves something out cannot be registered.


@pytest.mark.parametrize("name", sorted(Encoder.__abstractmethods__))
def test_an_encoder_without_a_part_is_refused(name: str) -> None:
    parts = {each: getattr(CounterEncoder, each) for each in Encoder.__abstractmethods__ - {name}}
    lacking = type("Lacking", (Encoder,), parts)
    with pytest.raises(TypeError, match=f"Lacking lacks {name}"):
        Kind(CounterFeature, CounterFeature, lacking)


def test_a_feature_without_a_part_is_refused() -> None:
    class NoReads(CrossFeature):
        reads = CrossFeature.__mro__[1].reads  # type: ignore[assignment]

    with pytest.raises(TypeError, match="NoReads lacks reads"):
        Kind(NoReads, NoReads, CrossEncoder)
    with pytest.raises(TypeError, match="lacks the name of its file: kind: Literal"):
        Kind(other := type("Other", (CrossFeature,), {"__module__": "x.other"}), other, CrossEncoder)
    with pytest.raises(TypeError, match="a MemoryEncoder needs a Remembering feature"):
        Kind(CrossFeature, EmbeddedCross, CounterEncoder)
    with pytest.raises(TypeError, match="a MemoryEncoder needs a Remembering feature"):
        Kind(CounterFeature, CounterFeature, CrossEncoder)
    with pytest.raises(TypeError, match="EmbeddedCross must be a subclass of IdFeature"):
        Kind(IdFeature, EmbeddedCross, CrossEncoder)


def test_what_decides_features_is_no_choice_of_the_model() -> None:
    class Wider(CrossFeature):
        """With a key that `CrossFeature` has not."""

        seed: int = 0

    with pytest.raises(TypeError, match="Wider adds seed; only dim is a model's choice"):
        Kind(CrossFeature, Wider, CrossEncoder)
