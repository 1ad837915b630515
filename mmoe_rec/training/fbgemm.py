"""torchrec and fbgemm: whether they are installed, and whether fbgemm's kernels may use the processor's vector units.

Without them, one process trains on plain PyTorch tables.
"""

import ctypes
import functools
import importlib
import sys
from pathlib import Path

from mmoe_rec.errors import UserError

_PARTS = ("torchrec", "fbgemm_gpu")


@functools.cache
def torchrec_installed() -> bool:
    """Whether torchrec can be imported. Raises UserError where it is installed, but does not load."""
    try:
        for name in _PARTS:
            importlib.import_module(name)
    except (ImportError, OSError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in _PARTS:
            return False
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise UserError(
            f"torchrec and fbgemm are installed, but do not load ({reason}): mmoe-rec doctor says what to type"
        ) from error
    return True


def require_torchrec(what: str, instead: str = "") -> None:
    """Raises UserError where torchrec is not installed. what: what needs it, such as "a plan"; instead: of it."""
    if not torchrec_installed():
        raise UserError(
            f"{what} needs torchrec and fbgemm, which are not installed; they come with the extra cpu or cuda, and "
            f"`mmoe-rec doctor` says what to type{instead and f'; or {instead}'}"
        )


# fbgemm asks the library cpuinfo what the processor can do: code in torch's libc10 finds out, and fbgemm reads the
# answer from a variable of libc10. In the CUDA build of torch, which is the one on PyPI, libtorch has a second copy of
# this variable, and that code writes into the copy. So fbgemm finds an empty variable and falls back to its reference
# loops: updating tables then takes ten times as long (measured with torch 2.14.1 and fbgemm-gpu-cpu 1.9.0). Torch 2.11,
# 2.12 and 2.13 with fbgemm 1.6, 1.7 and 1.8 have one copy, and nothing to do.
#
# This can go when pyproject.toml asks for a torch whose CUDA build has one copy: then `share_cpuinfo` finds nothing to
# copy.


_ANSWER = "cpuinfo_isa"


def share_cpuinfo() -> bool:
    """Copy torch's knowledge of the processor to the place where fbgemm looks, if that is empty.

    Does nothing where there is one copy, or none, as in torch's CPU build and on other systems than Linux.

    Returns:
        Whether anything was copied.
    """
    if (found := _to_copy()) is None:
        return False
    ctypes.memmove(*found)
    return True


def _to_copy() -> tuple[int, int, int] | None:
    """Addresses of fbgemm's empty variable and of torch's full one, and bytes of either; None if there is no need."""
    import torch

    if sys.platform != "linux":
        return None
    folder = Path(torch.__file__).parent / "lib"
    try:
        c10, torch_library = (ctypes.CDLL(str(folder / name)) for name in ("libc10.so", "libtorch.so"))
        c10.cpuinfo_initialize()
        empty, known = (ctypes.addressof(ctypes.c_char.in_dll(library, _ANSWER)) for library in (c10, torch_library))
        size = _size(empty)
    except (OSError, AttributeError, ValueError):  # no such library, function or variable
        return None
    if empty == known or size != _size(known) or any(ctypes.string_at(empty, size)):
        return None
    return empty, known, size


def _size(address: int) -> int:
    """Bytes of the variable that begins at an address: `st_size` of its Elf64_Sym, which dladdr1 gives."""
    place, symbol, wanted = ctypes.create_string_buffer(32), ctypes.c_void_p(), 1
    found = ctypes.CDLL(None).dladdr1(ctypes.c_void_p(address), place, ctypes.byref(symbol), wanted)
    return int(ctypes.c_uint64.from_address(symbol.value + 16).value) if found and symbol.value else 0
