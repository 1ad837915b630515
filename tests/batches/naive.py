"""The reader's order and its split over ranks, written down a row at a time."""

from mmoe_rec.batches.order import GOLDEN, EpochOrder, Window

Row = tuple[int, int]  # row group, row in it


def window_order(order: EpochOrder, window: Window) -> list[Row]:
    """The rows of a window by rising key."""
    keyed = []
    for number, group in enumerate(window.groups.tolist()):
        permutation = order.permutation(group).tolist()
        offset = (window.shift + number * GOLDEN) % 1.0
        keyed += [((j + offset) / len(permutation), number, j, (group, row)) for j, row in enumerate(permutation)]
    return [row for *_, row in sorted(keyed)]


def global_batches(order: EpochOrder, batch_size: int, position: int) -> list[list[Row]]:
    """The next rows of the order, `batch_size` at a time, each batch arranged by where its rows' groups lie."""
    placed = [(window, row) for window in order.windows for row in window_order(order, window)]
    return [_arranged(placed[first : first + batch_size]) for first in range(position, len(placed), batch_size)]


def _arranged(batch: list[tuple[Window, Row]]) -> list[Row]:
    keyed = []
    seen: dict[int, int] = {}
    counts: dict[int, int] = {}
    for _, (group, _) in batch:
        counts[group] = counts.get(group, 0) + 1
    for window, (group, row) in batch:
        number = window.groups.tolist().index(group)
        sizes = window.sizes.tolist()
        within = (seen.get(group, 0) + 0.5) * (sizes[number] / counts[group])
        seen[group] = seen.get(group, 0) + 1
        keyed.append(((sum(sizes[:number]) + within) / sum(sizes), window.start, number, seen[group], (group, row)))
    return [row for *_, row in sorted(keyed)]


def slots(batch: list[Row], rank: int, world_size: int, rank_rows: int) -> list[tuple[Row, bool]]:
    """The rank's rows of a batch that is stretched over all slots, and whether each is a copy of the slot before."""
    total = rank_rows * world_size
    taken = [slot * len(batch) // total for slot in range(total)]
    every = [(batch[place], slot > 0 and taken[slot - 1] == place) for slot, place in enumerate(taken)]
    return every[rank * rank_rows : (rank + 1) * rank_rows]
