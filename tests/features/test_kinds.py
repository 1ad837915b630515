"""Each kind of feature against a naive reference, on one column that a test makes up."""

import math
import struct
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmoe_rec.errors import UserError
from mmoe_rec.features import vocabulary
from mmoe_rec.features.kinds.ids import truncate_lists
from mmoe_rec.features.layout import EncodedInputs
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.log.columns import combine_hashes, hash_column
from mmoe_rec.settings.schema import Schema
from tests.log.small_logs import DAY, START, fit, log_rows, random_log, schema_of
from tests.reference import features as reference

ROLES = {"user": [], "candidate": ["x", "y"], "context": [], "placement": []}


def _table(**columns: pa.Array) -> pa.Table:
    table = random_log(0, len(next(iter(columns.values()))))
    for name, values in columns.items():
        table = table.append_column(name, values)
    return table


def _fitted(feature: dict, **columns: pa.Array) -> tuple[FeaturePipeline, Schema, EncodedInputs]:
    schema = schema_of({"f": feature}, roles=ROLES)
    table = _table(**columns)
    pipeline = fit(table, schema, START + 100 * DAY)
    return pipeline, schema, pipeline.encode(log_rows(table, schema))


def _encode(pipeline: FeaturePipeline, schema: Schema, **columns: pa.Array) -> EncodedInputs:
    return pipeline.encode(log_rows(_table(**columns), schema))


# Hashes


def test_hashes_never_change():
    """A change here sends every trained model's unknown ids and crosses to other rows of its tables."""
    assert hash_column(pa.array([0, 1, -1, 2**63 - 1, -(2**63), None])).tolist() == [
        0xE220A8397B1DCDAF,  # the first output of splitmix64 seeded with 0, as published
        0x910A2DEC89025CC1,
        0xE4D971771B652C20,
        0x2A67D7552E039EA7,
        0x481EC0A212A9F3DB,
        0x9AE16A3B2F90404F,
    ]
    assert hash_column(pa.array(["", "a", "ç", "id -7", None, "x" * 100])).tolist() == [
        0x186DA64456263A46,
        0xC1999A454057BFD0,
        0xF8A83EDA75054E69,
        0xE4ED56EC14154297,
        0x9AE16A3B2F90404F,
        0x640835BC0E0ACBFB,
    ]
    first, second = hash_column(pa.array([1, 2])), hash_column(pa.array(["a", None]))
    assert combine_hashes([first, second]).tolist() == [0xBA9E1996D19BF03A, 0x21243F14C3FEC376]
    assert combine_hashes([second, first]).tolist() == [0xE2CE56FFCC215E4C, 0x1DDFF565B386B380]
    assert combine_hashes([first, second, first]).tolist() == [0x63EAC519AA5980EC, 0xF9F28B5D6AB6CBD4]


# id and ids


_INTEGERS = st.sampled_from([-(2**63), -5, 0, 1, 2, 3, 2**63 - 1])
_TEXTS = st.sampled_from(["", "a", "b", "B", "ç", "0", "-1"])


@given(
    values=st.one_of(
        st.tuples(st.just(pa.int64()), st.lists(st.none() | _INTEGERS, min_size=1, max_size=40)),
        st.tuples(st.just(pa.string()), st.lists(st.none() | _TEXTS, min_size=1, max_size=40)),
    ),
    min_count=st.integers(1, 4),
    max_size=st.none() | st.integers(1, 4),
    oov=st.integers(1, 5),
)
def test_ids_get_rows_by_frequency_then_value(values, min_count, max_size, oov):
    kind, ids = values
    feature = {"kind": "id", "column": "x", "min_count": min_count, "max_size": max_size, "oov_buckets": oov}
    pipeline, _, encoded = _fitted(feature, x=pa.array(ids, kind))
    rows = dict(list(reference.vocabulary(ids, min_count, oov).items())[:max_size])
    for value, row in zip(ids, encoded.ids["f"].tolist(), strict=True):
        assert row == rows[value] if value in rows else row in range(value is not None, 1 + oov * (value is not None))
    assert pipeline.layout.table("f").rows == 1 + oov + len(rows)


def test_unknown_ids_keep_their_bucket():
    feature = {"kind": "id", "column": "x", "min_count": 1, "oov_buckets": 1000}
    pipeline, schema, _ = _fitted(feature, x=pa.array([1, 2]))
    assert _encode(pipeline, schema, x=pa.array([3, -3, 2**60])).ids["f"].tolist() == [54, 534, 664]
    pipeline, schema, _ = _fitted(feature, x=pa.array(["a"]))
    assert _encode(pipeline, schema, x=pa.array(["b", "", "ç"])).ids["f"].tolist() == [976, 775, 2]


def test_ids_of_the_other_type_are_refused():
    pipeline, schema, _ = _fitted({"kind": "id", "column": "x"}, x=pa.array([1, 1]))
    with pytest.raises(UserError, match=r"feature 'f' \(column 'x'\): ids have type string, .* trained on int64"):
        _encode(pipeline, schema, x=pa.array(["1"]))


def test_a_column_without_any_value_gives_the_missing_row():
    pipeline, schema, encoded = _fitted({"kind": "id", "column": "x", "oov_buckets": 3}, x=pa.nulls(4))
    assert encoded.ids["f"].tolist() == [0, 0, 0, 0]
    assert pipeline.layout.table("f").rows == 4
    later = _encode(pipeline, schema, x=pa.array(["new", None])).ids["f"].tolist()
    assert 1 <= later[0] <= 3
    assert later[1] == 0


def test_a_shared_table_takes_the_owners_rows():
    schema = schema_of(
        {
            "owner": {"kind": "id", "column": "x", "min_count": 1, "oov_buckets": 2},
            "guest": {"kind": "id", "column": "y", "table": "owner"},
            "guests": {"kind": "ids", "column": "z", "table": "owner"},
        },
        roles={**ROLES, "candidate": ["x", "y", "z"]},
    )
    columns = {"x": pa.array([5, 6]), "y": pa.array([6, 5]), "z": pa.array([[6, 5], None])}
    pipeline = fit(_table(**columns), schema, START + 100 * DAY)
    encoded = _encode(pipeline, schema, **columns)
    assert encoded.ids["owner"].tolist() == [3, 4]
    assert encoded.ids["guest"].tolist() == [4, 3]
    assert encoded.ids["guests"].values.tolist() == [4, 3]
    assert [(table.name, table.rows) for table in pipeline.layout.tables] == [("owner", 5)]


_LISTS = st.lists(st.none() | st.lists(st.none() | _INTEGERS, max_size=6), min_size=1, max_size=12)


@given(lists=_LISTS, max_length=st.integers(1, 4), offset=st.integers(0, 3))
def test_lists_of_ids_equal_a_naive_loop(lists, max_length, offset):
    values, lengths = truncate_lists(pa.array(lists, pa.list_(pa.int64())).slice(offset), max_length)
    expected = [[item for item in first or [] if item is not None][:max_length] for first in lists[offset:]]
    assert lengths.tolist() == [len(first) for first in expected]
    assert values.to_pylist() == [item for first in expected for item in first]


def test_a_column_of_nothing_but_null_lists_is_empty():
    for column in (
        pa.nulls(3),
        pa.array([None, [], [None]], pa.list_(pa.null())),
        pa.array([None, [], [None]], pa.list_(pa.string())),
    ):
        _, _, encoded = _fitted({"kind": "ids", "column": "x"}, x=column)
        assert encoded.ids["f"].lengths.tolist() == [0, 0, 0]


# numeric


_NUMBERS = st.lists(
    st.one_of(
        st.none(),
        st.floats(-1e6, 1e6).map(lambda value: round(value, 6)),
        st.sampled_from([0.0, -0.0, 1.0, math.inf, -math.inf, math.nan]),
    ),
    min_size=1,
    max_size=50,
)


@given(values=_NUMBERS, transform=st.sampled_from(["standard", "log"]), own=st.sampled_from([None, "auto"]))
def test_numbers_are_standardised(values, transform, own):
    pipeline, _, encoded = _fitted(
        {"kind": "numeric", "column": "x", "transform": transform, "values": own}, x=pa.array(values, pa.float64())
    )
    missing = [value is None or not math.isfinite(value) for value in values]
    numbers = np.array([0.0 if out else value for value, out in zip(values, missing, strict=True)])
    if transform == "log":
        numbers = np.array([math.copysign(math.log1p(abs(number)), number) for number in numbers])
    used = numbers[~np.array(missing)]
    mean, std = (used.mean(), used.std()) if len(used) else (0.0, 1.0)
    slack = np.abs(used).max(initial=0.0) * 1e-13
    actual = pipeline.encoders["f"].number.standardizer
    assert actual.mean == pytest.approx(mean, abs=slack + 1e-300)
    if std > 100 * slack:
        assert actual.std == pytest.approx(std, rel=1e-6)
    expected = np.where(missing, 0.0, np.clip((numbers - actual.mean) / actual.std, -10, 10))
    np.testing.assert_allclose(encoded.dense[:, 0], expected, rtol=1e-5, atol=1e-6)
    assert encoded.dense.shape[1] == (2 if any(missing) else 1)
    if any(missing):
        assert [item.name for item in pipeline.layout.dense] == ["f", "f_missing"]
        assert encoded.dense[:, 1].tolist() == [float(out) for out in missing]


def test_a_constant_column_is_zero_and_a_missing_one_is_marked():
    pipeline, schema, encoded = _fitted({"kind": "numeric", "column": "x"}, x=pa.array([7.0, 7.0]))
    assert encoded.dense.tolist() == [[0.0], [0.0]]
    assert _encode(pipeline, schema, x=pa.array([7.5, None])).dense.tolist() == [[0.5], [0.0]]
    _, _, encoded = _fitted({"kind": "numeric", "column": "x"}, x=pa.nulls(2))
    assert encoded.dense.tolist() == [[0.0, 1.0], [0.0, 1.0]]


_SPIKES = [0.0, -0.0, 9.99, -9.99, 0.1, 1e-9, 16_777_216.0, 16_777_217.0, 1e300, 2e300, math.inf, math.nan, None]


def _single(value: float | None) -> float | None:
    """A number as float32 holds it, an infinite one beyond its range; None where missing."""
    if value is None or not math.isfinite(value):
        return None
    return struct.unpack("f", struct.pack("f", value))[0] + 0.0 if abs(value) < 3e38 else math.copysign(math.inf, value)


@given(
    values=st.lists(st.sampled_from(_SPIKES) | st.floats(-3, 3), min_size=1, max_size=50),
    times=st.integers(20, 101),
    transform=st.sampled_from(["standard", "log"]),
)
def test_frequent_values_have_ids_of_their_own(values, times, transform, tmp_path_factory):
    """A value is that of float32, so that one which was rounded on its way is the same."""
    feature = {"kind": "numeric", "column": "x", "transform": transform, "values": "auto"}
    column = pa.array(values * times, pa.float64())
    pipeline, schema, encoded = _fitted(feature, x=column)
    singles, actual = [_single(value) for value in column.to_pylist()], encoded.ids["f_value"].tolist()
    rows = {single: singles.count(single) for single in singles}
    names = {}
    for single, row in zip(singles, actual, strict=True):
        often = single is not None and rows[single] >= 100
        assert (row > 0) == often
        if often:
            assert names.setdefault(row, single) == single
    counts = [rows[names[row]] for row in sorted(names)]
    assert sorted(names) == list(range(1, len(counts) + 1))
    assert counts == sorted(counts, reverse=True)
    assert pipeline.layout.table("f_value").rows == 1 + len(counts)
    kept = [single is None or math.isfinite(single) for single in singles]
    stored = pa.array([single if item else None for single, item in zip(singles, kept, strict=True)], pa.float32())
    again = _encode(pipeline, schema, x=stored).ids["f_value"]
    assert again[kept].tolist() == np.array(actual)[kept].tolist()
    folder = tmp_path_factory.mktemp("state")
    pipeline.save(folder)
    restored = FeaturePipeline.load(folder)
    assert _encode(restored, schema, x=column).ids["f_value"].tolist() == actual
    assert _encode(restored, schema, x=pa.array([3.5, None])).ids["f_value"].tolist() == [0, 0]


@given(values=_NUMBERS, buckets=st.integers(2, 9))
def test_buckets_count_the_edges_below(values, buckets):
    feature = {"kind": "numeric", "column": "x", "transform": "buckets", "buckets": buckets}
    pipeline, schema, encoded = _fitted(feature, x=pa.array(values, pa.float64()))
    edges = pipeline.encoders["f"].edges
    assert (np.diff(edges) > 0).all()
    assert len(edges) <= buckets - 1
    for value, row in zip(values, encoded.ids["f"].tolist(), strict=True):
        out = value is None or not math.isfinite(value)
        assert row == (0 if out else 1 + sum(1 for edge in edges if edge < value))
    rows = pipeline.layout.table("f").rows
    extreme = _encode(pipeline, schema, x=pa.array([-1e300, 1e300])).ids["f"].tolist()
    assert extreme == [1, rows - 1]


@pytest.mark.parametrize(
    ("numbers", "kinds"),
    [
        (1_700_000_000 + np.arange(0, 86_400, 600), (pa.int64(), pa.float64(), pa.decimal128(38, 3))),
        # Not every integer is a float64.
        (1_700_000_000_000_000_001 + np.arange(100) * 10**6, (pa.int64(), pa.uint64())),
    ],
    ids=["seconds", "nanoseconds"],
)
def test_times_of_one_day_stay_distinct(numbers, kinds):
    expected = ((numbers - numbers[0]) - (numbers - numbers[0]).mean()) / (numbers - numbers[0]).std()
    for kind in kinds:
        column = pa.array(numbers.tolist(), kind)
        _, _, encoded = _fitted({"kind": "numeric", "column": "x"}, x=column)
        np.testing.assert_allclose(encoded.dense[:, 0], expected, atol=1e-3)
        lists = pa.array(numbers.reshape(-1, 2).tolist()).cast(pa.list_(kind))
        _, _, encoded = _fitted({"kind": "vector", "column": "x", "size": 2}, x=lists)
        np.testing.assert_allclose(encoded.dense.ravel(), expected, atol=1e-3)


def test_a_vocabulary_that_no_table_can_hold_is_refused(monkeypatch):
    feature = {"kind": "id", "column": "x", "min_count": 1, "oov_buckets": 3}
    for rows, fits in ((7, True), (6, False)):  # one is for missing ids
        monkeypatch.setattr(vocabulary, "MAX_TABLE_ROWS", rows)
        if fits:
            assert _fitted(feature, x=pa.array([5, 6, 7]))[0].layout.table("f").rows == rows
            continue
        with pytest.raises(UserError, match="feature 'f' has 3 ids and 3 `oov_buckets`; a table has at most 6 rows"):
            _fitted(feature, x=pa.array([5, 6, 7]))


# vector


def test_vectors_share_one_mean_and_deviation():
    values = [[1.0, 2.0], None, [3.0, None]]
    for kind in (pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.float32(), 2)):
        pipeline, _, encoded = _fitted({"kind": "vector", "column": "x", "size": 2}, x=pa.array(values, kind))
        std = np.std([1.0, 2.0, 3.0])
        expected = [[-1 / std, 0], [0, 0], [1 / std, 0]]
        np.testing.assert_allclose(encoded.dense, expected, rtol=1e-6)
        assert [item.name for item in pipeline.layout.dense] == ["f_0", "f_1"]
    _, _, encoded = _fitted({"kind": "vector", "column": "x", "size": 2}, x=pa.nulls(2))
    assert encoded.dense.tolist() == [[0, 0], [0, 0]]


def test_a_vector_of_another_size_is_refused():
    with pytest.raises(UserError, match="feature 'f': column 'x' holds a list of 3 numbers, but `size` is 2"):
        _fitted({"kind": "vector", "column": "x", "size": 2}, x=pa.array([[1.0, 2.0], [1.0, 2.0, 3.0]]))


# time


@given(
    # Some around an hour of 2023 that the clock of Berlin shows twice.
    moments=st.lists(
        st.none() | st.integers(-(10**15), 4 * 10**15) | st.integers(169_853_760, 169_854_660).map(lambda s: s * 10**7),
        min_size=1,
        max_size=20,
    ),
    zone=st.sampled_from(["UTC", "Europe/Berlin", "America/St_Johns", "Asia/Kathmandu", "Pacific/Apia"]),
)
def test_hour_and_weekday_are_those_of_the_zone(moments, zone):
    feature = {"kind": "time", "column": "x", "timezone": zone, "parts": ["weekday", "hour"]}
    column = pa.array(moments, pa.timestamp("us", tz="UTC"))
    pipeline, _, encoded = _fitted(feature, x=column)
    for index, moment in enumerate(moments):
        hour, weekday = encoded.ids["f_hour"][index], encoded.ids["f_weekday"][index]
        if moment is None:
            assert (hour, weekday) == (0, 0)
        else:
            local = datetime.fromtimestamp(moment // 10**6, UTC).astimezone(ZoneInfo(zone))
            assert (hour, weekday) == (1 + local.hour, 1 + local.weekday())
    assert {table.name: table.rows for table in pipeline.layout.tables} == {"f_weekday": 8, "f_hour": 25}


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "Africa/Monrovia", "Australia/Lord_Howe"])
def test_many_times_are_read_as_few_are(zone):
    moments = np.random.default_rng(0).integers(-(2**55), 2**59, 1000)
    moments[:3] = np.iinfo(np.int64).min, np.iinfo(np.int64).max, -(2**57)
    encoder = _fitted({"kind": "time", "column": "x", "timezone": zone}, x=pa.array([0], pa.timestamp("us")))[
        0
    ].encoders["f"]
    few = [encoder._table_rows(moments[start : start + 10]) for start in range(0, 1000, 10)]
    np.testing.assert_array_equal(encoder._table_rows(moments), np.concatenate(few, axis=1))


def test_age_is_the_logarithm_of_days_until_the_request():
    schema = schema_of({"f": {"kind": "time", "column": "born", "parts": ["age"]}})
    table = random_log(0, 50)
    pipeline = fit(table, schema, START + 100 * DAY)
    encoded = pipeline.encode(log_rows(table, schema))
    ages = []
    for row in table.to_pylist():
        days = None if row["born"] is None else (row["time"] - row["born"]).total_seconds() / 86_400
        ages.append(np.nan if days is None else math.copysign(math.log(1 + abs(days)), days))
    actual = pipeline.encoders["f"].number.standardizer
    expected = np.nan_to_num((np.array(ages) - actual.mean) / actual.std)
    np.testing.assert_allclose(encoded.dense[:, 0], np.clip(expected, -10, 10), rtol=1e-4, atol=1e-5)
    assert encoded.dense[:, 1].tolist() == np.isnan(ages).tolist()
    assert actual.mean == pytest.approx(np.nanmean(ages), rel=2**-12)


# cross


def test_crosses_are_ordered_and_stable():
    columns = {"x": pa.array([1, -1, None, 2]), "y": pa.array(["a", "b", "a", None])}
    rows = {}
    for order in (("x", "y"), ("y", "x")):
        feature = {"kind": "cross", "columns": list(order), "buckets": 1000}
        pipeline, _, encoded = _fitted(feature, **columns)
        rows[order] = encoded.ids["f"].tolist()
        assert pipeline.layout.table("f").rows == 1000
    assert rows[("x", "y")] == [266, 200, 69, 614]
    assert rows[("y", "x")] == [780, 155, 832, 888]
