"""No feature sees what happened at or after its request, nor what had happened but was not known yet."""

import numpy as np
import pyarrow as pa
import pytest

from tests.log.small_logs import (
    ALL_KINDS,
    DAY,
    START,
    fit,
    memory_table,
    random_log,
    schema_of,
    times_of,
)

SCHEMA = schema_of(ALL_KINDS)
UNTIL = START + 6 * DAY


def _with(table: pa.Table, name: str, where: np.ndarray, values: pa.Array) -> pa.Table:
    chosen = pa.compute.if_else(pa.array(where), values, table[name].combine_chunks())
    return table.set_column(table.column_names.index(name), name, chosen)


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
