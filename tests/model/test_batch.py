"""Batches: their tensors against the rows they were made of, and against torchrec's container."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from mmoe_rec.batches.batch import Batch, make_batch
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


class Spied:
    """In place of a tensor: writes down what is asked of it."""

    def __init__(self, name: str, asked: list[tuple[str, str]]) -> None:
        self.name, self.asked = name, asked

    def __getattr__(self, method: str) -> Callable[..., Spied]:
        def call(*arguments: object, **named: object) -> Spied:
            self.asked.append((self.name, f"{method} {arguments[1:]} {named}"))
            return self

        return call

    def __len__(self) -> int:
        return 5


@pytest.mark.parametrize("optional", [True, False])
def test_every_tensor_goes_the_whole_way_to_a_gpu(optional: bool) -> None:
    """One that is forgotten in `record_stream` has its memory reused while a GPU still reads it."""
    encoded, labels = random_rows(5)
    more = (np.ones(5, np.float32), np.arange(5)) if optional else (None, None)
    batch = make_batch(encoded, LAYOUT, labels, None, *more, torchrec=True)
    held = [each.name for each in fields(Batch) if hasattr(getattr(batch, each.name), "to")]
    assert {"ids", "dense", "labels", "observed"} <= set(held)
    assert {"weights", "users"} <= set(held) or not optional
    asked: list[tuple[str, str]] = []
    spied = replace(batch, **{name: Spied(name, asked) for name in held})
    for step, expected in (
        (spied.pin_memory, "pin_memory () {}"),
        (lambda: spied.to("cpu", non_blocking=True), "to () {'non_blocking': True}"),
        (lambda: spied.record_stream("stream"), "record_stream () {}"),
    ):
        asked.clear()
        step()
        assert sorted(asked) == sorted((name, expected) for name in held)


def test_plain_ids_go_the_whole_way_too(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = make_batch(random_rows(5)[0], LAYOUT, torchrec=False).ids
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: seen.append(tensor))
    ids.record_stream("stream")
    held = [each for each in vars(ids).values() if isinstance(each, torch.Tensor)]
    assert {each.data_ptr() for each in seen} == {each.data_ptr() for each in held}
    moved = ids.to("cpu", non_blocking=True)
    assert moved.starts == ids.starts
    for name in ids.keys:
        assert all(torch.equal(*pair) for pair in zip(ids.column(name), moved.column(name), strict=True))
