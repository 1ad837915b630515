"""No feature sees what happened at or after its request, nor what had happened but was not known yet."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.log.small_logs import (
    ALL_KINDS,
    DAY,
    LATE_DAYS,
    START,
    assert_same,
    fit,
    log_rows,
    memory_table,
    random_log,
    raw_results,
    remember,
    schema_of,
    stream_of,
    times_of,
)

SCHEMA = schema_of(ALL_KINDS)
_SHORT = {
    "counter": {"window_days": [None, 0.25], "forget_after_days": 0.25},
    "history": {"forget_after_days": 0.25},
}
FORGETFUL = schema_of({name: {**each, **_SHORT.get(each["kind"], {})} for name, each in ALL_KINDS.items()})
UNTIL = START + 6 * DAY
LATE = round(LATE_DAYS * DAY)


def _remembering(table: pa.Table, other: pa.Table, schema=SCHEMA):
    """A pipeline whose statistics come from `table` and whose memory comes from `other`."""
    pipeline = fit(table, schema, UNTIL)
    remember(pipeline, stream_of([other], schema))
    return pipeline


def _with(table: pa.Table, name: str, where: np.ndarray, values: pa.Array) -> pa.Table:
    chosen = pa.compute.if_else(pa.array(where), values, table[name].combine_chunks())
    return table.set_column(table.column_names.index(name), name, chosen)


def _corrupt(table: pa.Table, moment: int, rng: np.random.Generator) -> pa.Table:
    """The log with every row at or after `moment` changed, some dropped, some added; earlier rows as they were."""
    past, future = (table.filter(pa.array(mask)) for mask in (times_of(table) < moment, times_of(table) >= moment))
    future = future.take(
        pa.array(rng.integers(0, max(future.num_rows, 1), rng.integers(0, future.num_rows + 5))[: 10**6])
    )
    everyone = np.ones(future.num_rows, bool)
    for name in ("user", "item", "brand", "click", "liked", "spent"):
        replacement = table[name].combine_chunks().take(pa.array(rng.integers(0, table.num_rows, future.num_rows)))
        future = _with(future, name, everyone, replacement)
    return pa.concat_tables([future, past])


@pytest.mark.parametrize(("strings", "schema"), [(False, SCHEMA), (True, SCHEMA), (False, FORGETFUL)])
@pytest.mark.parametrize("seed", range(4))
def test_corrupting_the_present_and_the_future_changes_nothing(seed, strings, schema):
    table, rng = random_log(seed, strings=strings), np.random.default_rng(seed)
    truth = _remembering(table, table, schema)
    changed_later = False
    for moment in rng.choice(times_of(table), 8):
        corrupted = _remembering(table, _corrupt(table, moment, rng), schema)
        now = log_rows(table.filter(pa.array(times_of(table) == moment)), schema)
        assert_same(corrupted.encode(now), truth.encode(now))
        later = log_rows(table.filter(pa.array(times_of(table) > moment)), schema)
        changed_later |= bool((corrupted.encode(later).dense != truth.encode(later).dense).any())
    assert changed_later, "the corruption has no effect at all, so this test cannot fail"


@pytest.mark.parametrize("schema", [SCHEMA, FORGETFUL])
@pytest.mark.parametrize("seed", range(3))
def test_late_labels_have_no_influence_before_they_mature(seed, schema):
    table, rng = random_log(seed, rows=200), np.random.default_rng(seed)
    truth = _remembering(table, table, schema)
    times = times_of(table)
    for moment in rng.choice(times, 8):
        unknown = times + LATE > moment
        lies = _with(
            table, "liked", unknown, pa.array(rng.integers(0, 2, table.num_rows), mask=rng.random(table.num_rows) < 0.3)
        )
        now = log_rows(table.filter(pa.array(times == moment)), schema)
        assert_same(_remembering(table, lies, schema).encode(now), truth.encode(now))


def test_a_label_counts_from_the_microsecond_of_its_maturity():
    schema = schema_of({"item": {"kind": "id", "column": "item", "min_count": 1}, "n": _counter("liked", [None])})
    one = random_log(0, rows=1)
    one = _with(one, "click", np.ones(1, bool), pa.array([1.0]))
    one = _with(one, "liked", np.ones(1, bool), pa.array([1]))
    first = int(times_of(one)[0])
    pipeline = fit(one, schema, first + 100 * DAY)

    def positives(moment: int) -> float:
        return float(_raw(pipeline, _at(one, moment), schema)["n_positives"][0])

    assert positives(first + LATE - 1) == 0
    assert positives(first + LATE) == np.log(2)


def test_an_immediate_label_counts_one_microsecond_later_and_leaves_its_window_as_exactly():
    schema = schema_of({"item": {"kind": "id", "column": "item", "min_count": 1}, "n": _counter("click", [1])})
    one = _with(random_log(0, rows=1), "click", np.ones(1, bool), pa.array([1.0]))
    first = int(times_of(one)[0])
    pipeline = fit(one, schema, first + 100 * DAY)

    def positives(moment: int) -> float:
        return float(_raw(pipeline, _at(one, moment), schema)["n_positives_1d"][0])

    assert positives(first) == 0
    assert positives(first + 1) == np.log(2)
    assert positives(first + DAY) == np.log(2)
    assert positives(first + 1 + DAY) == 0


def _counter(task: str, windows: list[float | None]) -> dict:
    outputs = ["positives", "rows", "rate", "recency"]
    return {"kind": "counter", "task": task, "by": ["item"], "outputs": outputs, "window_days": windows}


def _at(table: pa.Table, moment: int) -> pa.Table:
    return _with(
        table, "time", np.ones(table.num_rows, bool), pa.array([moment] * table.num_rows).cast(table["time"].type)
    )


def _raw(pipeline, table: pa.Table, schema) -> dict[str, np.ndarray]:
    return raw_results(pipeline.encoders["n"], log_rows(table, schema))


def _naive(table: pa.Table, feature: dict, prior: float) -> dict[str, np.ndarray]:
    """Positives, rows, rate and recency of every row, from the definition: a loop over all pairs of rows."""
    task, by, (window,), smoothing = (feature[key] for key in ("task", "by", "window_days", "smoothing"))
    late = LATE if task == "liked" else 0
    rows = table.to_pylist()
    times = [int(time) for time in times_of(table)]
    result: dict[str, list[float]] = {"positives": [], "rows": [], "rate": [], "recency": []}
    for row, now in zip(rows, times, strict=True):
        labels, last = [], None
        for other, then in zip(rows, times, strict=True):
            label = other[task]
            if task == "liked" and other["click"] != 1:
                label = None
            known = then + max(1, late)
            if label is None or known > now or any(other[column] != row[column] for column in by):
                continue
            if label > 0:
                last = known if last is None else max(last, known)
            if window is None or known > now - window * DAY:
                labels.append(label)
        result["positives"].append(np.log1p(max(sum(labels), 0)))
        result["rows"].append(np.log1p(len(labels)))
        result["rate"].append((sum(labels) + smoothing * prior) / (len(labels) + smoothing))
        result["recency"].append(np.nan if last is None else np.log1p((now - last) / DAY))
    return {name: np.array(values) for name, values in result.items()}


@settings(max_examples=25, deadline=None)
@given(
    log=st.builds(random_log, st.integers(0, 10**6), st.integers(1, 60), st.booleans()),
    task=st.sampled_from(["click", "liked", "spent"]),
    by=st.sampled_from([["item"], ["user", "brand"], ["brand", "age"]]),
    window=st.sampled_from([None, 1.0, LATE_DAYS, 0.3]),
)
def test_counters_equal_a_naive_loop(log, task, by, window):
    outputs = ["positives", "rows", "rate", "recency"]
    feature = {"kind": "counter", "task": task, "by": by, "window_days": [window], "outputs": outputs, "smoothing": 3.0}
    schema = schema_of({"n": feature})
    pipeline = fit(log, schema, START + 100 * DAY)
    found = _raw(pipeline, log, schema)
    expected = _naive(log, feature, pipeline.encoders["n"].prior)
    suffix = "" if window is None else f"_{window:g}d".replace(".", "p")
    for output, values in expected.items():
        name = f"n_{output}" if output == "recency" else f"n_{output}{suffix}"
        np.testing.assert_allclose(found[name], values, rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("large", [0.0, 1e17])
def test_other_keys_leave_no_trace_in_sums_of_fractions(large):
    feature = {"kind": "counter", "task": "spent", "by": ["item"], "outputs": ["positives", "rate"]}
    schema = schema_of({"n": feature})
    table = random_log(0, rows=60)
    items = np.arange(60) % 20
    spent = np.where(items < 10, 0.1 * np.arange(60), large)
    everyone = np.ones(60, bool)
    table = _with(_with(table, "item", everyone, pa.array(items)), "spent", everyone, pa.array(spent))
    table = _with(table, "time", everyone, pa.array(START + np.arange(60)).cast(table["time"].type))
    found = _raw(fit(table, schema, START + 100 * DAY), table, schema)["n_positives"]
    for index in np.flatnonzero(items < 10):
        earlier = spent[:index][items[:index] == items[index]]
        assert found[index] == np.log1p(earlier.sum())


def test_the_overall_mean_of_fractions_is_that_of_the_training_rows_in_any_order():
    schema = schema_of({"n": {"kind": "counter", "task": "spent", "by": ["item"]}})
    table = random_log(5)
    spent = [row["spent"] for row, time in zip(table.to_pylist(), times_of(table), strict=True) if time < UNTIL]
    known = np.array([value for value in spent if value is not None])
    mean = fit(table, schema, UNTIL).encoders["n"].prior
    assert mean == pytest.approx(known.mean(), abs=np.abs(known).max() * 2**-12)
    for seed in range(20):
        shuffled = table.take(pa.array(np.random.default_rng(seed).permutation(300)))
        assert fit(shuffled, schema, UNTIL, cuts=(100, 200)).encoders["n"].prior == mean


@settings(max_examples=25, deadline=None)
@given(
    table=st.builds(random_log, st.integers(0, 10**6), st.integers(1, 80), st.booleans()),
    task=st.sampled_from(["click", "liked"]),
    length=st.integers(1, 6),
)
def test_histories_equal_a_naive_loop(table, task, length):
    schema = schema_of(
        {"item": ALL_KINDS["item"], "h": {"kind": "history", "task": task, "of": "item", "length": length}}
    )
    encoded = fit(table, schema, START + 100 * DAY).encode(log_rows(table, schema))
    items, history = encoded.ids["item"], encoded.ids["h"]
    late = LATE if task == "liked" else 1
    everything = list(zip(table.to_pylist(), times_of(table), items, strict=True))
    for index, (row, now, _) in enumerate(everything):
        engaged = [
            (then + late, item)
            for other, then, item in everything
            if other["user"] == row["user"] and then + late <= now and other[task] == 1 and other["click"] == 1
        ]
        expected = [item for _, item in sorted(engaged)[-length:]]
        assert history.values[history.offsets[index] : history.offsets[index + 1]].tolist() == expected


def test_a_history_is_oldest_first_and_counts_labels_from_at_least():
    schema = schema_of(
        {
            "item": {"kind": "id", "column": "item", "min_count": 1, "oov_buckets": 1},
            "h": {"kind": "history", "task": "spent", "of": "item", "length": 2, "at_least": 0.5},
        }
    )
    table = random_log(0, rows=5)
    for name, values in (
        ("user", [1, 1, 1, 1, 1]),
        ("item", [40, 30, 20, 10, 99]),
        ("spent", [0.5, 0.49, None, 7.0, 0.0]),
        ("time", [START + i for i in range(5)]),
    ):
        table = _with(table, name, np.ones(5, bool), pa.array(values).cast(table[name].type))
    history = fit(table, schema, START + DAY).encode(log_rows(table, schema)).ids["h"]
    # Ids occur once each, so their rows ascend: 10, 20, 30, 40, 99 are rows 2 to 6.
    assert [history.values[a:b].tolist() for a, b in zip(history.offsets, history.offsets[1:], strict=False)] == [
        [],
        [5],
        [5],
        [5],
        [5, 2],
    ]


@pytest.mark.parametrize("seed", range(3))
def test_statistics_come_from_training_rows_alone(seed, tmp_path):
    table = random_log(seed)
    times = times_of(table)
    later = times >= UNTIL
    lies = table
    for name in ("item", "brand", "price", "tags", "born", "click", "liked", "spent", "slot"):
        shuffled = table[name].combine_chunks().take(pa.array(np.random.default_rng(seed).permutation(table.num_rows)))
        lies = _with(lies, name, later, shuffled) if name != "tags" else lies
    lies = pa.concat_tables([lies, lies.filter(pa.array(later))])
    one, other = fit(table, SCHEMA, UNTIL), fit(lies, SCHEMA, UNTIL)
    assert one.layout == other.layout
    for name, encoder in one.encoders.items():
        mine, theirs = encoder.state(), other.encoders[name].state()
        assert mine.values == theirs.values, name
        for key in mine.tables:
            assert mine.tables[key].equals(theirs.tables[key]), name
    assert any(not memory_table(one.encoders[n]).equals(memory_table(other.encoders[n])) for n in _LOGGED)


_LOGGED = [name for name, feature in ALL_KINDS.items() if feature["kind"] in ("history", "counter")]


def test_labels_that_mature_after_training_do_not_enter_the_overall_mean():
    schema = schema_of({"n": _counter("liked", [None])})
    table = random_log(3)
    times = times_of(table)
    lies = _with(table, "liked", times + LATE > UNTIL, pa.array([1] * table.num_rows))
    mean = fit(table, schema, UNTIL).encoders["n"].prior
    assert 0 < mean < 1
    assert fit(lies, schema, UNTIL).encoders["n"].prior == mean
    rows = [
        row for row, time in zip(table.to_pylist(), times, strict=True) if time + LATE <= UNTIL and row["click"] == 1
    ]
    assert mean == pytest.approx(np.mean([row["liked"] for row in rows if row["liked"] is not None]))
