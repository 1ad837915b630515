"""The order and the ranks' shares of it, without files."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mmoe_rec.batches.reader import EpochOrder, Share, take_share
from tests.batches.encoded_files import Row, global_batches, slots, window_order


def epoch_order(sizes: list[int], shuffle_window: int, seed: int = 3, epoch: int = 0) -> EpochOrder:
    return EpochOrder(np.array(sizes, np.int64), shuffle_window=shuffle_window, seed=seed, epoch=epoch)


def shares(order: EpochOrder, batch_size: int, position: int, rank: int, world_size: int) -> list[Share]:
    slots = {"rank": rank, "world_size": world_size, "rank_rows": -(-batch_size // world_size)}
    return [take_share(parts, **slots) for parts in order.batches(batch_size, position)]


def read(order: EpochOrder, share: Share) -> list[tuple[Row, bool]]:
    """What a share stands for."""
    joined = [
        (group, row) for group, start, stop in share.pieces for row in order.permutation(group)[start:stop].tolist()
    ]
    index = range(len(joined)) if share.index is None else share.index.tolist()
    copies = [False] * len(index) if share.copies is None else share.copies.tolist()
    return [(joined[i], copy) for i, copy in zip(index, copies, strict=True)]


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=9),
    shuffle_window=st.integers(1, 120),
    batch_size=st.integers(1, 60),
    world_size=st.sampled_from([1, 2, 3, 5, 8]),
    begin=st.floats(0, 1),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 50),
)
def test_shares_are_those_of_a_naive_loop(
    *, sizes: list[int], shuffle_window: int, batch_size: int, world_size: int, begin: float, seed: int, epoch: int
) -> None:
    order = epoch_order(sizes, shuffle_window, seed, epoch)
    position = round(begin * sum(sizes))
    expected = global_batches(order, batch_size, position)
    rank_rows = math.ceil(batch_size / world_size)
    together: list[list[Row]] = [[] for _ in expected]
    for rank in range(world_size):
        found = [read(order, share) for share in shares(order, batch_size, position, rank, world_size)]
        assert found == [slots(batch, rank, world_size, rank_rows) for batch in expected]
        for batch, rows in zip(together, found, strict=True):
            batch += [row for row, copy in rows if not copy]
    assert together == expected
    whole = [row for window in order.windows for row in window_order(order, window)]
    assert sorted(whole) == [(group, row) for group, size in enumerate(sizes) for row in range(size)]
    after = position
    for batch in expected:
        assert sorted(batch) == sorted(whole[after : after + batch_size])
        after += len(batch)
    assert after == len(whole)


@given(
    sizes=st.lists(st.integers(1, 200), min_size=1, max_size=40),
    shuffle_window=st.integers(1, 3000),
    seed=st.integers(0, 1000),
)
def test_every_stretch_holds_rows_of_each_group_in_proportion(
    *, sizes: list[int], shuffle_window: int, seed: int
) -> None:
    order = epoch_order(sizes, shuffle_window, seed)
    for window in order.windows:
        total = int(window.sizes.sum())
        assert total <= shuffle_window or len(window.sizes) == 1
        groups = np.arange(len(window.sizes))
        counts = np.cumsum(window.mixed()[:, None] == groups, axis=0)
        assert counts[-1].tolist() == window.sizes.tolist()
        even = np.arange(1, total + 1)[:, None] * window.sizes / total
        assert (np.abs(counts - even) <= 1 + len(groups) * window.sizes / total).all()


def test_rows_of_a_group_are_permuted_anew_for_each_epoch_seed_and_group() -> None:
    found = [
        epoch_order([3000, 3000], 10**6, seed, epoch).permutation(group)
        for seed in (0, 1)
        for epoch in (0, 1)
        for group in (0, 1)
    ]
    for index, one in enumerate(found):
        assert sorted(one) == list(range(3000))
        assert abs(np.corrcoef(one, np.arange(3000))[0, 1]) < 0.1
        for other in found[:index]:
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.1
