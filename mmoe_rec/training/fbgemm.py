"""Lets fbgemm's CPU kernels use the processor's vector instructions.

fbgemm asks the library cpuinfo what the processor can do: code in torch's libc10 finds out, and fbgemm reads the
answer from a variable of libc10. In the CUDA build of torch, which is the one on PyPI, libtorch has a second copy of
this variable, into which that code writes instead. So fbgemm finds an empty one and falls back to its reference loops:
updating tables then takes ten times as long (measured with torch 2.14.1 and fbgemm-gpu-cpu 1.9.0).
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

_ANSWER = "cpuinfo_isa"
_SYMBOL_ENTRY = 1  # dladdr1: ask for the ELF symbol


class _Place(ctypes.Structure):
    """Dl_info."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


class _Symbol(ctypes.Structure):
    """Elf64_Sym."""

    _fields_ = (
        ("name", ctypes.c_uint32),
        ("info", ctypes.c_ubyte),
        ("other", ctypes.c_ubyte),
        ("section", ctypes.c_uint16),
        ("value", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
    )


def share_cpuinfo() -> bool:
    """Copies what torch knows of the processor to where fbgemm looks, if that is empty; whether anything was copied.

    Does nothing where there is one copy, or none, as in torch's CPU build and on other systems than Linux.
    """
    import torch

    if sys.platform != "linux":
        return False
    folder = Path(torch.__file__).parent / "lib"
    try:
        asked, told = (ctypes.CDLL(str(folder / name)) for name in ("libc10.so", "libtorch.so"))
        asked.cpuinfo_initialize()
        empty, known = (ctypes.addressof(ctypes.c_char.in_dll(library, _ANSWER)) for library in (asked, told))
        size = _size(empty)
    except (OSError, AttributeError, ValueError):  # no such library, function or variable
        return False
    if empty == known or size != _size(known) or any(ctypes.string_at(empty, size)):
        return False
    ctypes.memmove(empty, known, size)
    return True


def _size(address: int) -> int:
    """Bytes of the variable that begins at an address."""
    symbol = ctypes.POINTER(_Symbol)()
    found = ctypes.CDLL(None).dladdr1(
        ctypes.c_void_p(address), ctypes.byref(_Place()), ctypes.byref(symbol), _SYMBOL_ENTRY
    )
    return int(symbol.contents.size) if found and symbol else 0
