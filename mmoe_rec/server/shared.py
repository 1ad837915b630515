"""A loaded model in memory that several processes map.

Most of a model's memory are arrays: the tables of counters and histories, and weights. One process loads the model and
writes the arrays to a file, as they lie in memory. All others map the file and hold only small objects of their own.
"""

import io
import mmap
import os
import pickle
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmoe_rec.server.models import ServedModel

_ALIGNMENT = 64  # bytes, as numpy, torch and Arrow ask for at most
_LOCKS = {type(lock()): lock for lock in (threading.Lock, threading.RLock)}


class _Pickler(pickle.Pickler):
    """Hands the memory of tensors out, as numpy and Arrow do by themselves, and makes new locks."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) in _LOCKS:
            return _LOCKS[type(value)], ()
        if isinstance(value, nn.Parameter):
            return nn.Parameter, (value.data, value.requires_grad)
        if isinstance(value, Tensor):
            content = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            return _make_tensor, (content, value.dtype, value.shape)
        return NotImplemented


def _make_tensor(content: np.ndarray, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    return torch.from_numpy(content).view(dtype).reshape(shape)


def write_shared(served: ServedModel, path: str) -> None:
    """Write a model to a file for `map_shared`."""
    stream, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
    _Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(served)
    parts = [stream.getbuffer(), *(buffer.raw() for buffer in buffers)]
    with open(path, "wb") as file:
        pickle.dump([part.nbytes for part in parts], file)
        for part in parts:
            file.seek(-file.tell() % _ALIGNMENT, os.SEEK_CUR)
            file.write(part)


def map_shared(path: str) -> ServedModel:
    """Return the model in a file, whose pages all processes share until one of them writes to a page."""
    with open(path, "rb") as file:
        sizes, end = pickle.load(file), file.tell()
        memory = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    parts = []
    for size in sizes:
        start = end + -end % _ALIGNMENT
        end = start + size
        parts.append(memory[start:end])
    return pickle.loads(parts[0], buffers=parts[1:])
