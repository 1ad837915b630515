"""Batches: their tensors against the rows they were made of, and against torchrec's container."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from mmoe_rec.batches.batch import KeyedIds, make_batch
from mmoe_rec.features.encoded import Encoded
from mmoe_rec.point_in_time.lists import Ragged
from tests.model.examples import LAYOUT, random_rows


def rows_of(values: torch.Tensor, offsets: torch.Tensor) -> list[list[int]]:
    bounds = offsets.tolist()
    return [values[a:b].tolist() for a, b in pairwise(bounds)]


def expected_rows(column: np.ndarray | Ragged) -> list[list[int]]:
    if not isinstance(column, Ragged):
        return [[int(value)] for value in column]
    values = iter(column.values.tolist())
    return [[next(values) for _ in range(length)] for length in column.lengths]


@pytest.mark.parametrize("seed", range(5))
def test_ids_are_those_of_the_rows_and_of_torchrec(seed: int) -> None:
    encoded, labels = random_rows(17, seed)
    ids = make_batch(encoded, LAYOUT, labels, torchrec=False).ids
    keyed = make_batch(encoded, LAYOUT, labels, torchrec=True).ids
    assert list(ids.keys) == keyed.keys()
    assert torch.equal(ids.values, keyed.values())
    assert torch.equal(ids.lengths, keyed.lengths())
    for name in ids.keys:
        rows = rows_of(*ids.column(name))
        assert rows == expected_rows(encoded.ids[name])
        assert rows == [row.tolist() for row in keyed[name].to_dense()]


def test_labels_are_zero_where_unobserved() -> None:
    encoded, labels = random_rows(11)
    batch = make_batch(encoded, LAYOUT, labels, position=40, torchrec=False)
    assert np.array_equal(batch.observed.numpy(), ~np.isnan(labels))
    assert np.array_equal(batch.labels.numpy(), np.nan_to_num(labels))
    assert batch.labels.dtype == batch.dense.dtype == torch.float32
    assert batch.position == 40
    assert len(batch) == 11


def test_without_labels_nothing_is_observed() -> None:
    batch = make_batch(random_rows(4)[0], LAYOUT, torchrec=False)
    assert batch.labels.shape == batch.observed.shape == (4, 3)
    assert not batch.observed.any()


@pytest.mark.parametrize("torchrec", [False, True])
def test_to_keeps_every_part(torchrec: bool) -> None:
    encoded, labels = random_rows(6)
    batch = make_batch(encoded, LAYOUT, labels, position=6, torchrec=torchrec)
    moved = batch.to("cpu", non_blocking=True)
    assert moved.position == 6
    assert torch.equal(moved.dense, batch.dense)
    assert torch.equal(moved.labels, batch.labels)
    assert torch.equal(moved.observed, batch.observed)
    assert torch.equal(moved.ids.lengths() if torchrec else moved.ids.lengths, lengths_of(encoded))


def lengths_of(encoded: Encoded) -> torch.Tensor:
    parts = [
        each.lengths if isinstance(each, Ragged) else np.ones(len(each), np.int32) for each in encoded.ids.values()
    ]
    return torch.from_numpy(np.concatenate(parts))


def test_no_rows_and_no_inputs() -> None:
    empty = make_batch(random_rows(0)[0], LAYOUT, torchrec=False)
    values, offsets = empty.ids.column("tags")
    assert len(values) == 0
    assert offsets.tolist() == [0]
    assert KeyedIds((), torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int32)).rows == 0


def test_read_only_arrays_are_accepted_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    encoded, labels = random_rows(5)
    for array in (encoded.dense, labels, encoded.ids["user"]):
        array.flags.writeable = False  # type: ignore[union-attr]
    make_batch(encoded, LAYOUT, labels, torchrec=False)
    assert not recwarn.list


def test_what_does_not_fit_the_layout_is_named() -> None:
    encoded, labels = random_rows(5)
    with pytest.raises(ValueError, match=r"labels: expected shape \(5, 3\).*found \(5, 2\)"):
        make_batch(encoded, LAYOUT, labels[:, :2], torchrec=False)
    without = Encoded({name: ids for name, ids in encoded.ids.items() if name != "city"}, encoded.dense)
    with pytest.raises(ValueError, match="'city'"):
        make_batch(without, LAYOUT, labels, torchrec=False)


def test_weights_of_rows() -> None:
    encoded, labels = random_rows(5)
    plain = make_batch(encoded, LAYOUT, labels, torchrec=False)
    assert plain.weights is None
    assert plain.to("cpu").weights is None
    assert plain.observed_weights.tolist() == (~np.isnan(labels)).sum(0).tolist()
    weights = np.array([1.0, 2.5, 1.0, 8.0, 4.0], np.float32)
    batch = make_batch(encoded, LAYOUT, labels, None, weights, torchrec=False)
    assert torch.equal(batch.to("cpu").weights, torch.from_numpy(weights))
    assert batch.observed_weights.tolist() == (~np.isnan(labels) * weights[:, None]).sum(0).tolist()
    with pytest.raises(ValueError, match=r"weights: expected shape \(5,\)"):
        make_batch(encoded, LAYOUT, labels, None, weights[:4], torchrec=False)
