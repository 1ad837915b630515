"""An object in a file that processes map, so that its arrays lie in memory once for all of them.

The file holds the memory of all arrays and tensors, each from a multiple of 64 bytes on, then a pickle of all else,
which is small, then where each array lies, and at the end a checksum of all of it.

Unpickling runs what the bytes name. So a file is only ever read through a handle that a server passes to its own child
processes, of a file without a name that one of them has written: what a caller sends, or what a model's folder holds,
never gets there.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import struct
import zlib
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

ALIGNED_TO = 64  # bytes, as Arrow and the kernels of BLAS libraries like it
_END = struct.Struct("<8sQQI")  # mark, where the pickle begins and ends, and the checksum of all before
_MARK = b"MMOE-REC"


class DamagedError(Exception):
    """A file that is not as `write` left it."""


def write(thing: Any, file: BinaryIO) -> int:
    """Writes an object into an empty file; gives the bytes of all but its arrays.

    Arrays and tensors that share memory share it once read. Raises OSError where the file can't be written, TypeError
    for a tensor that is not on the CPU, and what pickle does.
    """
    buffers: list[pickle.PickleBuffer] = []
    rest = io.BytesIO()
    _Pickler(rest, protocol=5, buffer_callback=buffers.append).dump(thing)
    growing = _Growing(file)
    places = growing.append_memory([each.raw() for each in buffers])
    start = growing.align()
    growing.append(rest.getbuffer())
    end = growing.size
    growing.append(np.array(places, np.int64).tobytes())
    file.write(_END.pack(_MARK, start, end, growing.checksum))
    file.flush()
    return end - start


def read(handle: int) -> Any:
    """The object that `write` wrote into the file of a handle, which may be closed afterwards.

    Its arrays lie in a private map of the file: processes share a page until one of them writes to it, and others never
    see what was written. All of it is looked at once, against the checksum, which also spares requests that. Raises
    DamagedError, and OSError where the file can't be mapped.
    """
    size = os.fstat(handle).st_size
    if size < _END.size:
        raise DamagedError(f"it has {size} bytes")
    whole = memoryview(mmap.mmap(handle, size, access=mmap.ACCESS_COPY))
    content = whole[: -_END.size]
    mark, start, end, checksum = _END.unpack(whole[-_END.size :])
    if mark != _MARK:
        raise DamagedError("its end is missing")
    if zlib.crc32(content) != checksum:
        raise DamagedError("its checksum is another one")
    places = np.frombuffer(content[end:], np.int64).reshape(-1, 2).tolist()
    return pickle.loads(content[start:end], buffers=[content[first : first + length] for first, length in places])


class _Growing:
    """A file that grows at its end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = self.checksum = 0

    def append(self, data: memoryview | bytes) -> None:
        self._file.write(data)
        self.checksum = zlib.crc32(data, self.checksum)
        self.size += len(data)

    def align(self) -> int:
        """Where the next bytes begin."""
        self.append(bytes(-self.size % ALIGNED_TO))
        return self.size

    def append_memory(self, parts: Sequence[memoryview]) -> list[tuple[int, int]]:
        """Where each part of memory begins in the file, and its bytes; what belongs to several is written once."""
        places = [(0, 0)] * len(parts)
        begins = start = end = 0  # of what was written last: where in memory, where in the file, and its end in memory
        for address, number in sorted((_address(part), number) for number, part in enumerate(parts) if len(part)):
            part = parts[number]
            if address >= end:
                begins, start, end = address, self.align(), address
            self.append(part[end - address :])
            end = max(end, address + len(part))
            places[number] = (start + address - begins, len(part))
        return places


def _address(part: memoryview) -> int:
    return int(np.frombuffer(part, np.uint8).__array_interface__["data"][0])


class _Pickler(pickle.Pickler):
    """Leaves the memory of tensors to the buffers too, and that of arrays with gaps, which numpy would not."""

    def reducer_override(self, thing: Any) -> Any:
        """As `pickle.Pickler` has it."""
        if isinstance(thing, nn.Parameter):
            return nn.Parameter, (thing.data, thing.requires_grad)
        if isinstance(thing, Tensor):
            if type(thing) is not Tensor or thing.device.type != "cpu" or thing.layout != torch.strided:
                raise TypeError(f"a {type(thing).__name__} ({thing.layout}, on {thing.device}) can't be shared")
            # All of the memory that it is a view of, (bytes,) uint8, which other views lead to as well.
            memory = torch.empty(0, dtype=torch.uint8).set_(thing.untyped_storage()).numpy()
            return _tensor, (memory, thing.dtype, tuple(thing.shape), thing.stride(), thing.storage_offset())
        if type(thing) is np.ndarray and not thing.dtype.hasobject and not thing.flags.forc:
            return np.ascontiguousarray(thing).__reduce_ex__(5)
        return NotImplemented


def _tensor(
    memory: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> Tensor:
    storage = torch.from_numpy(memory).untyped_storage()
    return torch.empty(0, dtype=dtype).set_(storage, offset, shape, stride)
