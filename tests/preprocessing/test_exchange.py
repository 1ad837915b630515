"""The exchange of rows through files: every row arrives once, in order, at the receiver it was sent to."""

import os

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from mmoe_rec.preprocessing.exchange import Exchange, key_range, partition_of


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    receivers=st.integers(1, 5),
    rising=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rows_arrive_once_and_in_order(tmp_path_factory, sizes, receivers, rising, seed):
    """rising: whether rows lie in the order of their receivers already."""
    exchange = Exchange(tmp_path_factory.mktemp("exchange"), receivers)
    random = np.random.default_rng(seed)
    sent = [random.integers(0, receivers, size) for size in sizes]
    sent = [np.sort(each) for each in sent] if rising else sent
    counts = np.zeros(receivers, np.int64)
    for number, receiver in reversed(list(enumerate(sent))):
        rows = pa.table({"sender": pa.array([number] * len(receiver)), "row": pa.array(range(len(receiver)))})
        counts += exchange.send("rows", (number, 0), rows, receiver)
    for receiver in range(receivers):
        expected = [(n, row) for n, to in enumerate(sent) for row in np.flatnonzero(to == receiver)]
        table = exchange.receive_all("rows", receiver)
        found = [] if table is None else [tuple(row.values()) for row in table.to_pylist()]
        assert found == expected
        assert counts[receiver] == len(expected)


@given(keys=st.lists(st.integers(0, 2**64 - 1), min_size=1), partitions=st.integers(1, 1000))
def test_partitions_are_ranges_of_keys_in_order(keys, partitions):
    array = np.array(sorted(keys), np.uint64)
    partition = partition_of(array, partitions)
    assert (np.diff(partition) >= 0).all()
    for key, number in zip(array.tolist(), partition.tolist(), strict=True):
        least, end = key_range(number, partitions)
        assert least <= key < end


def test_no_file_stays_open_nor_takes_room_on_disk_once_it_is_removed(tmp_path):
    exchange = Exchange(tmp_path / "rows", 1)
    exchange.send("rows", (0, 0), pa.table({"row": [1, 2]}), np.zeros(2, np.int64))
    assert len(list(exchange.receive("rows", 0))) == 1
    exchange.remove()
    assert not exchange.folder.exists()
    opened = (os.path.realpath(f"/proc/self/fd/{each}") for each in os.listdir("/proc/self/fd"))
    assert not [path for path in opened if f"{exchange.folder}/" in path]
