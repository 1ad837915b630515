"""The choices of a training: precision, ways of tables and products, threads; and how a model computes by them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn

from mmoe_rec.model.levels import Experts
from mmoe_rec.model.products import Products, choose_products, has_onednn
from mmoe_rec.settings.sections import Training
from mmoe_rec.training.tables import Way, choose_way, list_ways

Precision = Literal["fp32", "bf16"]
Compute = Literal["auto", "dense", "grouped"]


@dataclass(frozen=True)
class Choices:
    """What a training computes with.

    precision: of products; tables: the way in which tables are looked up and updated; experts: `auto` goes by the share
    of experts in use; threads: of each process, for what torch computes, 0 where they do not matter (on a GPU);
    products: the library that multiplies fp32 matrices on a CPU; measured: what was chosen by measurement -> option ->
    milliseconds, of the slowest rank.
    """

    precision: Precision
    tables: Way
    experts: Compute
    threads: int
    products: Products = "blas"
    measured: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"{self.precision}{self._compare_times('precision', self.precision)}"]
        if self.products != "blas" or (self.precision == "fp32" and "products" in self.measured):
            parts.append(f"products by {self.products}{self._compare_times('products', self.products)}")
        parts.append(f"tables by {self.tables}{self._compare_times('tables', self.tables)}")
        if self.experts != "auto":
            parts.append(f"experts {self.experts}{self._compare_times('experts', self.experts)}")
        if self.threads:
            parts.append(f"{self.threads} thread{'s' if self.threads > 1 else ''}")
        return ", ".join(parts)

    def _compare_times(self, what: str, taken: str) -> str:
        """How the taken option compares with the best of the others, where that was measured."""
        times = self.measured.get(what, {})
        others = {option: time for option, time in times.items() if option != taken}
        if taken not in times or not others:
            return ""
        other = min(others, key=others.__getitem__)
        return f" ({times[taken]:.1f} ms, {other} {others[other]:.1f})"


def faster(times: Mapping[str, float], by_default: str, margin: float) -> str:
    """The option that took least, or the default where that takes less than `margin` times as long."""
    best = min(times, key=times.__getitem__)
    return best if by_default not in times or times[by_default] >= margin * times[best] else by_default


def check_offered(settings: Training, device: str, ranks: int = 1) -> None:
    """Raises UserError where a way of tables or a library of products is set that is not on offer here.

    device: "cpu" or "cuda"; ranks: how many train together.
    """
    choose_way(settings.tables, device, ranks)
    choose_products(settings.products, device)


def keep_choices(before: Choices, settings: Training, device: torch.device) -> Choices:
    """The choices of a training that goes on here: what changes more than time stays, or it would not be the same.

    A way of tables or a library of products that this machine does not have gives way to one that it has, threads to
    as many as there are. Raises UserError where what is set is not on offer. A collective call.
    """
    here = device.type == "cpu" and before.tables in list_ways()
    wanted = before.tables if settings.tables == "auto" and here else settings.tables
    count = settings.threads or min(before.threads, torch.get_num_threads()) if device.type == "cpu" else 0
    products = choose_products(settings.products, device.type)
    if settings.products == "auto" and device.type == "cpu" and before.products == "onednn":
        products = "onednn" if _on_all_ranks(has_onednn()) else "blas"
    return replace(before, products=products, tables=choose_way(wanted, device.type, ranks()), threads=count)


def set_compute(mixture: nn.Module, compute: Compute) -> None:
    """Makes all levels compute their experts in this way."""
    for each in mixture.modules():
        if isinstance(each, Experts):
            each.compute = compute


def ranks() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def _on_all_ranks(here: bool) -> bool:
    """Whether it holds on every rank, on CPUs."""
    if ranks() == 1:
        return here
    flag = torch.tensor(int(here))
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)
