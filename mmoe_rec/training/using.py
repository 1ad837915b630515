"""Has a process, or a model, compute in what was chosen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

from mmoe_rec.model.levels import Experts
from mmoe_rec.model.mmoe import Mixture
from mmoe_rec.model.multiply import Multiplying, Products, onednn_offered, products_of
from mmoe_rec.settings.sections import Training
from mmoe_rec.training.choices import Choices, Compute
from mmoe_rec.training.ways import way_of, ways_on_offer


def check_offered(settings: Training, device: str, ranks: int = 1) -> None:
    """Raises UserError where a way of tables or a library of products is set that is not on offer here.

    device: "cpu" or "cuda"; ranks: that train together.
    """
    way_of(settings.tables, device, ranks)
    products_of(settings.products, device)


def kept(before: Choices, settings: Training, device: torch.device) -> Choices:
    """The choices of a training that goes on here: what changes more than time stays, or it would not be the same.

    A way of tables or a library of products that this machine does not have gives way to one that it has, threads to
    as many as there are. Raises UserError where what is set is not on offer. A collective call.
    """
    here = device.type == "cpu" and before.tables in ways_on_offer()
    wanted = before.tables if settings.tables == "auto" and here else settings.tables
    count = settings.threads or min(before.threads, torch.get_num_threads()) if device.type == "cpu" else 0
    products = products_of(settings.products, device.type)
    if settings.products == "auto" and device.type == "cpu" and before.products == "onednn":
        products = "onednn" if _on_all_ranks(onednn_offered()) else "blas"
    return replace(before, products=products, tables=way_of(wanted, device.type, ranks()), threads=count)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Within it torch computes with so many threads; 0 leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def computed(mixture: Mixture, compute: Compute) -> AbstractContextManager[None]:
    """Within it, experts are computed in this way."""
    return _with(mixture, Experts, "compute", compute)


def set_compute(mixture: Mixture, compute: Compute) -> None:
    """From now on experts are computed in this way."""
    for each in mixture.modules():
        if isinstance(each, Experts):
            each.compute = compute


def multiplied(mixture: Mixture, products: Products) -> AbstractContextManager[None]:
    """Within it, products in fp32 are by this library."""
    return _with(mixture, Multiplying, "products", products)


@contextlib.contextmanager
def _with(mixture: Mixture, kind: type[nn.Module], name: str, value: str) -> Iterator[None]:
    """Within it, all modules of a kind have this value of an attribute."""
    modules = [each for each in mixture.modules() if isinstance(each, kind)]
    before = [getattr(each, name) for each in modules]
    for each in modules:
        setattr(each, name, value)
    try:
        yield
    finally:
        for each, own in zip(modules, before, strict=True):
            setattr(each, name, own)


def ranks() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def _on_all_ranks(here: bool) -> bool:
    """Whether it holds on every rank, on CPUs."""
    if ranks() == 1:
        return here
    told = torch.tensor(int(here))
    dist.all_reduce(told, op=dist.ReduceOp.MIN)
    return bool(told)
