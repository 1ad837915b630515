"""The reader: every row once in an order that no number of ranks changes, from any position, also after a kill."""

import math
import time
import weakref
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmoe_rec.batches import row_reader as reader_module
from mmoe_rec.batches.batch import Batch, draw_uniform, seeded_draws
from mmoe_rec.batches.encoded_dataset import EncodedDataset, LabeledRows
from mmoe_rec.batches.row_reader import EpochOrder, Position, Prefetch, TrainingReader
from mmoe_rec.errors import UserError
from tests.batches.encoded_files import LAYOUT, assert_values, background_threads, real, row_numbers, slots, write
from tests.batches.encoded_files import global_batches as naive_batches
from tests.processes import until

FILES = [[13, 0, 8], [1], [], [20, 5, 9, 2], [0], [17]]
TOTAL = 75


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> EncodedDataset:
    folder = tmp_path_factory.mktemp("encoded") / "rows"
    assert write(folder, FILES) == TOTAL
    return EncodedDataset(folder, LAYOUT)


def readers(rows: EncodedDataset, world_size: int, **changes: int) -> list[TrainingReader]:
    options = {"batch_size": 12, "shuffle_buffer_rows": 30, "seed": 5, **changes}
    return [TrainingReader(rows, rank=rank, world_size=world_size, **options) for rank in range(world_size)]


def epoch_of(reader: TrainingReader, number: int, row: int = 0) -> Iterator[tuple[LabeledRows, Position]]:
    """A rank's rows of each global batch of one epoch after its first `row` rows."""
    return reader.resume(reader.position(number, row), number + 1)


def global_batches(
    ranks: list[TrainingReader], epoch: int = 0, position: int = 0
) -> Iterator[tuple[list[LabeledRows], int]]:
    for parts in zip(*(epoch_of(rank, epoch, position) for rank in ranks), strict=True):
        after = parts[0][1].row
        assert {item for _, item in parts} == {ranks[0].position(epoch, after)}
        yield [part for part, _ in parts], after


def order(ranks: list[TrainingReader], epoch: int = 0, position: int = 0) -> list[int]:
    return [row for parts, _ in global_batches(ranks, epoch, position) for part in parts for row in real(part)]


@given(
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 50),
    position=st.integers(0, TOTAL),
    world_size=st.sampled_from([1, 2, 3, 5, 8]),
    batch_size=st.integers(2, 90),
    shuffle_buffer_rows=st.integers(1, 90),
)
def test_resume_gives_exactly_the_rest(
    rows: EncodedDataset,
    *,
    seed: int,
    epoch: int,
    position: int,
    world_size: int,
    batch_size: int,
    shuffle_buffer_rows: int,
) -> None:
    options = {"seed": seed, "shuffle_buffer_rows": shuffle_buffer_rows}
    whole = order(readers(rows, 1, batch_size=1, **options), epoch)
    assert sorted(whole) == list(range(TOTAL))
    resumed = readers(rows, world_size, batch_size=batch_size, **options)
    starts = np.cumsum(rows.row_group_sizes) - rows.row_group_sizes
    assert resumed[0].batches_per_epoch == math.ceil(TOTAL / batch_size)
    expected = naive_batches(resumed[0].order(epoch), batch_size, position)
    rows_per_rank = math.ceil(batch_size / world_size)
    for (parts, after), batch in zip(global_batches(resumed, epoch, position), expected, strict=True):
        for rank, part in enumerate(parts):
            assert_values(part)
            np.testing.assert_array_equal(part.row_numbers, row_numbers(part))
            actual = zip(row_numbers(part).tolist(), np.isnan(part.labels[:, 0]).tolist(), strict=True)
            taken = slots(batch, rank, world_size, rows_per_rank)
            assert list(actual) == [(int(starts[group]) + row, copy) for (group, row), copy in taken]
        assert sorted(row for part in parts for row in real(part)) == sorted(whole[position:after])
        position = after
    assert position == TOTAL


def test_each_rank_decodes_only_its_row_groups_each_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "rows", [[64] * 16, [64] * 16])
    rows = EncodedDataset(tmp_path / "rows", LAYOUT)
    decoded: list[tuple[int, int]] = []

    def counting(group: tuple[int, int], take: np.ndarray) -> LabeledRows:
        decoded.append(group)
        return EncodedDataset.read_row_group(rows, group, take)

    monkeypatch.setattr(rows, "read_row_group", counting)
    orders = []
    for world_size in (1, 2, 4):
        decoded.clear()
        orders.append(order(readers(rows, world_size, batch_size=64, shuffle_buffer_rows=512, seed=2)))
        assert sorted(decoded) == rows.row_groups
    assert sorted(orders[0]) == list(range(2048))
    assert orders[1] == orders[2] == orders[0]


def test_no_more_than_two_windows_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "rows", [[16] * 32])
    rows = EncodedDataset(tmp_path / "rows", LAYOUT)
    references: list[weakref.ref[LabeledRows]] = []

    def tracked(group: tuple[int, int], take: np.ndarray) -> LabeledRows:
        read = EncodedDataset.read_row_group(rows, group, take)
        references.append(weakref.ref(read))
        return read

    monkeypatch.setattr(rows, "read_row_group", tracked)
    reader = readers(rows, 1, batch_size=16, shuffle_buffer_rows=64)[0]
    for _ in reader.resume(reader.position(0), epochs=2):
        assert 4 <= sum(reference() is not None for reference in references) <= 2 * 4
    assert len(references) == 64


def test_an_unreadable_file_is_an_error_of_the_epoch(tmp_path: Path) -> None:
    write(tmp_path / "rows", [[50], [50]])
    reader = readers(EncodedDataset(tmp_path / "rows", LAYOUT), 1)[0]
    (tmp_path / "rows" / "001.parquet").unlink()
    with pytest.raises(UserError, match=r"001\.parquet' cannot be read"):
        list(epoch_of(reader, 0))
    assert not background_threads()


# The order, without files.


def epoch_order(sizes: list[int], shuffle_buffer_rows: int, seed: int = 3, epoch: int = 0) -> EpochOrder:
    return EpochOrder(np.array(sizes, np.int64), shuffle_buffer_rows=shuffle_buffer_rows, seed=seed, epoch=epoch)


@given(
    sizes=st.lists(st.integers(1, 200), min_size=1, max_size=40),
    shuffle_buffer_rows=st.integers(1, 3000),
    seed=st.integers(0, 1000),
)
def test_every_stretch_holds_rows_of_each_group_in_proportion(
    *, sizes: list[int], shuffle_buffer_rows: int, seed: int
) -> None:
    order = epoch_order(sizes, shuffle_buffer_rows, seed)
    for window in order.windows:
        total = int(window.sizes.sum())
        assert total <= shuffle_buffer_rows or len(window.sizes) == 1
        groups = np.arange(len(window.sizes))
        counts = np.cumsum(window.group_per_row()[:, None] == groups, axis=0)
        assert counts[-1].tolist() == window.sizes.tolist()
        even = np.arange(1, total + 1)[:, None] * window.sizes / total
        assert (np.abs(counts - even) <= 1 + len(groups) * window.sizes / total).all()


def test_rows_of_a_group_are_permuted_again_for_each_epoch_seed_and_group() -> None:
    actual = [
        epoch_order([3000, 3000], 10**6, seed, epoch).permutation(group)
        for seed in (0, 1)
        for epoch in (0, 1)
        for group in (0, 1)
    ]
    for index, first in enumerate(actual):
        assert sorted(first) == list(range(3000))
        assert abs(np.corrcoef(first, np.arange(3000))[0, 1]) < 0.1
        for second in actual[:index]:
            assert abs(np.corrcoef(first, second)[0, 1]) < 0.1


# Batches are made ahead of their consumer.


class Counter:
    """Counts up without end; knows how many items it made and whether it was closed."""

    def __init__(self) -> None:
        self.made = 0
        self.closed = False

    def items(self) -> Generator[int, None, None]:
        try:
            while True:
                self.made += 1
                yield self.made
        finally:
            self.closed = True


def test_items_in_order_then_no_thread() -> None:
    assert list(Prefetch((index for index in range(1000)), depth=3)) == list(range(1000))
    assert list(Prefetch(item for item in ())) == []
    assert not background_threads()


@pytest.mark.parametrize("depth", [1, 4])
def test_makes_no_more_than_depth_items_ahead(depth: int) -> None:
    counter = Counter()
    for item in Prefetch(counter.items(), depth):
        until(lambda item=item: counter.made == item + depth, pause=0.001)
        time.sleep(0.005)
        assert counter.made == item + depth
        if item == 5:
            break


def test_close_ends_the_thread_and_the_source() -> None:
    counter = Counter()
    items = iter(Prefetch(counter.items()))
    next(items)
    assert background_threads()
    items.close()
    assert counter.closed
    assert not background_threads()


def test_error_of_the_source_comes_after_its_items() -> None:
    def source() -> Generator[int, None, None]:
        yield from (1, 2)
        raise KeyError("source")

    items = iter(Prefetch(source()))
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(KeyError, match="source"):
        next(items)
    assert not background_threads()


class Clock:
    """Stands in for the module `time` of the code under test: its time goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0
        self.reads = 0

    def perf_counter(self) -> float:
        self.reads += 1
        return self.now


def test_waited_is_the_time_without_items(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(reader_module, "time", clock)

    def slow() -> Generator[int, None, None]:
        for item in range(3):
            until(lambda item=item: clock.reads == 2 * item + 1, pause=0.001)  # the consumer has begun to wait
            clock.now += 3
            yield item

    waiting = Prefetch(slow())
    for _ in waiting:
        clock.now += 100  # the consumer is busy
    assert waiting.wait_seconds == 3 * 3


def test_what_is_drawn_for_a_row_does_not_depend_on_its_batch() -> None:
    """Nor on the rows beside it; another epoch, seed, or draw of the step gives other numbers, even ones."""

    def draw(rows: np.ndarray, seed: int = 5, epoch: int = 0) -> np.ndarray:
        position = Position(epoch, int(rows[0]), seed)
        with seeded_draws(Batch(None, *torch.zeros(3, len(rows), 1), position, row_numbers=torch.from_numpy(rows))):
            shapes = ((len(rows), 2, 3), (len(rows), 1), (len(rows), 1))
            return np.hstack([draw_uniform(shape, torch.device("cpu")).flatten(1).numpy() for shape in shapes])

    whole, some = draw(np.arange(900)), np.random.default_rng(0).permutation(900)[:77]
    np.testing.assert_array_equal(draw(some), whole[some])
    every = np.hstack([whole, draw(np.arange(900), seed=6), draw(np.arange(900), epoch=1)])
    assert np.abs(np.corrcoef(every.T) - np.eye(24)).max() < 0.15
    assert np.abs(np.histogram(every, 50, (0, 1))[0] / every.size - 0.02).max() < 0.003
