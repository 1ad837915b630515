"""No feature sees what happened at or after its request, nor what had happened but was not known yet."""

import numpy as np
import pyarrow as pa
import pytest

from tests.log.small_logs import (
    ALL_KINDS,
    DAY,
    START,
    assert_same,
    fit,
    log_rows,
    memory_table,
    random_log,
    remember,
    schema_of,
    stream_of,
    times_of,
)

SCHEMA = schema_of(ALL_KINDS)
UNTIL = START + 6 * DAY


def _remembering(table: pa.Table, other: pa.Table):
    """A pipeline whose statistics come from `table` and whose memory comes from `other`."""
    pipeline = fit(table, SCHEMA, UNTIL)
    remember(pipeline, stream_of([other], SCHEMA))
    return pipeline


def _with(table: pa.Table, name: str, where: np.ndarray, values: pa.Array) -> pa.Table:
    chosen = pa.compute.if_else(pa.array(where), values, table[name].combine_chunks())
    return table.set_column(table.column_names.index(name), name, chosen)


def _corrupt(table: pa.Table, moment: int, rng: np.random.Generator) -> pa.Table:
    """The log with every row at or after `moment` changed, some dropped, some added; earlier rows as they were."""
    past, future = (table.filter(pa.array(mask)) for mask in (times_of(table) < moment, times_of(table) >= moment))
    future = future.take(pa.array(rng.integers(0, max(future.num_rows, 1), rng.integers(0, future.num_rows + 5))))
    everyone = np.ones(future.num_rows, bool)
    for name in ("user", "item", "brand", "click", "liked", "spent"):
        replacement = table[name].combine_chunks().take(pa.array(rng.integers(0, table.num_rows, future.num_rows)))
        future = _with(future, name, everyone, replacement)
    return pa.concat_tables([future, past])


@pytest.mark.parametrize("strings", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_corrupting_the_present_and_the_future_changes_nothing(seed, strings):
    table, rng = random_log(seed, strings=strings), np.random.default_rng(seed)
    truth = _remembering(table, table)
    changed_later = False
    for moment in rng.choice(times_of(table), 8):
        corrupted = _remembering(table, _corrupt(table, moment, rng))
        now = log_rows(table.filter(pa.array(times_of(table) == moment)), SCHEMA)
        assert_same(corrupted.encode(now), truth.encode(now))
        later = log_rows(table.filter(pa.array(times_of(table) > moment)), SCHEMA)
        changed_later |= bool((corrupted.encode(later).dense != truth.encode(later).dense).any())
    assert changed_later, "the corruption has no effect at all, so this test cannot fail"


@pytest.mark.parametrize("seed", range(3))
def test_statistics_come_from_training_rows_alone(seed, tmp_path):
    table = random_log(seed)
    times = times_of(table)
    later = times >= UNTIL
    lies = table
    for name in ("item", "brand", "price", "born", "click", "liked", "spent", "slot"):
        shuffled = table[name].combine_chunks().take(pa.array(np.random.default_rng(seed).permutation(table.num_rows)))
        lies = _with(lies, name, later, shuffled)
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
