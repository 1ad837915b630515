"""A model in memory that processes share is the model, and its arrays are not copied."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from mmoe_rec.inference.artifact import ResolvedModel
from mmoe_rec.live.journal import Journal
from mmoe_rec.server.models import ModelManager, map_shared, write_shared
from mmoe_rec.server.options import ServerOptions
from tests.inference.small_model import SmallModel


@pytest.mark.parametrize("journal", [False, True])
def test_a_shared_model_answers_as_the_model_does(small: SmallModel, tmp_path: Path, journal: bool) -> None:
    address = f"sqlite:///{tmp_path / 'journal.db'}" if journal else None
    if address is not None:
        Journal(address)
    served = ModelManager(
        ServerOptions(journal=address), ResolvedModel(small.folder, "models:/small/7", "a_run")
    ).current
    write_shared(served, str(tmp_path / "shared"))
    mapped = map_shared(str(tmp_path / "shared"))
    assert mapped.describe() == served.describe()
    assert mapped.example == served.example
    first, second = (item.ranker.rank(**served.example, explain=True) for item in (served, mapped))
    assert first.to_dict() | {"request_time": None} == second.to_dict() | {"request_time": None}
    if journal:
        assert mapped.ingester is not None
        assert mapped.ingester.ranker is mapped.ranker
        assert mapped.ingester.read() is None


def test_arrays_lie_in_the_file(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(300, 7, generator=generator),
        torch.randn(300, 7, generator=generator).t(),
        torch.randn(301, generator=generator).bfloat16(),
        torch.arange(-127, 128).to(torch.int8),
        torch.nn.Parameter(torch.ones(5, 3), requires_grad=False),
        torch.zeros(0, 4),
        torch.tensor(2.5),
    ]
    whole: Any = {"tensors": tensors, "array": np.arange(4_001), "column": pa.array(["a", None, "bc"] * 99)}
    file = tmp_path / "shared"
    write_shared(whole, str(file))
    mapped: Any = map_shared(str(file))
    for first, second in zip(tensors, mapped["tensors"], strict=True):
        assert (first.dtype, first.shape, type(first)) == (second.dtype, second.shape, type(second))
        assert torch.equal(first, second)
    assert np.array_equal(mapped["array"], whole["array"])
    assert mapped["column"].equals(whole["column"])
    places = [tensor.data_ptr() for tensor in mapped["tensors"] if len(tensor.shape) and len(tensor)]
    places += [mapped["array"].ctypes.data, *(buffer.address for buffer in mapped["column"].buffers())]
    assert all(place % 64 == 0 and is_mapped(place, file) for place in places)
    mapped["array"][:] = 0
    assert np.array_equal(map_shared(str(file))["array"], whole["array"]), "which no process changes for others"  # type: ignore[index]


def is_mapped(place: int, file: Path) -> bool:
    """Whether a place in this process's memory is that of a file's content."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [re.split("[- ]", line)[:2] for line in lines if line.endswith(str(file))]
    return any(int(start, 16) <= place < int(end, 16) for start, end in ranges)
