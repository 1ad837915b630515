"""What this machine's processor is, and how fast it multiplies matrices."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

from mmoe_rec.devices import usable_cores

# Of those that /proc/cpuinfo names, the ones that kernels of products and tables ask for.
_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_tile", "bf16", "sve")


@dataclass(frozen=True)
class Processor:
    """vendor, name: as the system calls them; flags: what products and tables may use; cores: that are free for us;
    settings: environment variables that hold libraries back from using what the processor has."""

    vendor: str
    name: str
    flags: tuple[str, ...]
    cores: int
    settings: tuple[str, ...]


def processor() -> Processor:
    """This machine's."""
    file, first = Path("/proc/cpuinfo"), ""
    if file.is_file():
        first = file.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    fields = dict(line.split(":", 1) for line in first.splitlines() if ":" in line)
    found = {name.strip(): value.strip() for name, value in fields.items()}
    known = set(found.get("flags", found.get("Features", "")).split())
    held = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "OPENBLAS_CORETYPE", "MKL_ENABLE_INSTRUCTIONS")
    return Processor(
        found.get("vendor_id", "unknown"),
        found.get("model name", platform.processor() or platform.machine()),
        tuple(flag for flag in _FLAGS if flag in known),
        usable_cores(),
        tuple(f"{name}={os.environ[name]}" for name in held if name in os.environ),
    )


def product_rates(seconds: float = 1.0, size: int = 2048) -> dict[str, float]:
    """Operations a second in products of two square matrices, the fastest of many: in fp32 by torch's BLAS library and
    by oneDNN, where torch has it, and in bf16.

    seconds: for each; one product is done in any case, which takes long where bf16 is emulated.
    """
    import torch

    from mmoe_rec.model.products import by_onednn, has_onednn

    ways = {"fp32": (torch.float32, torch.mm), "bf16": (torch.bfloat16, torch.mm)}
    if has_onednn():
        ways["fp32_onednn"] = torch.float32, by_onednn
    rates = {}
    for name, (kind, multiply) in ways.items():
        left, right = (torch.randn(size, size).to(kind) for _ in range(2))
        shortest, end = float("inf"), time.perf_counter() + seconds
        while (started := time.perf_counter()) < end:
            multiply(left, right)
            shortest = min(shortest, time.perf_counter() - started)
        rates[name] = 2 * size**3 / shortest
    return rates
