"""Chooses what a training computes with, by timing steps of the model's own shapes on drawn inputs.

Three rules keep noise from making choices. Options run in turns, and the fastest run of each counts. The default, which
is fp32, fbgemm's kernels and a thread a core, gives way only to what is a fifth faster. And ranks decide together, each
option by the time of the slowest of them.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import get_args

import torch
import torch.distributed as dist
from torch import Tensor

from mmoe_rec.allocation import freed_memory_kept
from mmoe_rec.batches.batch import KeyedIds
from mmoe_rec.choices.choices import Choices, Compute, Precision, faster
from mmoe_rec.choices.timing import milliseconds
from mmoe_rec.model.layout import ModelLayout
from mmoe_rec.model.levels import Experts
from mmoe_rec.model.mmoe import Mixture
from mmoe_rec.model.tables import stored_width, used_tables
from mmoe_rec.settings import Training
from mmoe_rec.tables.trial import trial
from mmoe_rec.tables.ways import Way, way_of, ways_on_offer

SECONDS = 0.025
"""For each choice, besides the runs that are not counted."""
CLEARLY = 1.2
"""How many times as long as the best the default has to take to be left."""
_OPERATIONS = 0.8e9
"""Of a step that is timed: some milliseconds in fp32 on two cores."""
SOME_ROWS = 1024
"""Of a batch, by which ways of tables are timed."""
_TABLE_ROWS = 20_000
_TABLE_WEIGHTS = 16_000_000
"""At most, of each way's tables together: 64 MB."""
_FIRST_ROWS = 64
_HOPELESS = 4.0
"""bf16 that takes so many times as long as fp32 for a few rows is not tried on more."""


class Chooser:
    """Makes the choices for a model that is about to be trained.

    mixture: its dense part, on the CPU, as it will be trained; it is left as it is, and so are random states.
    rows: of a rank's batch; ids: of such a batch, or of the first `SOME_ROWS` of it.
    """

    def __init__(self, mixture: Mixture, layout: ModelLayout, device: torch.device, rows: int, ids: KeyedIds) -> None:
        self._layout, self._device, self._ids = layout, device, ids
        # A copy where the device is another: products are to run there, and the model moves later.
        self._mixture = mixture if device.type == "cpu" else copy.deepcopy(mixture).to(device)
        weights = sum(parameter.numel() for parameter in mixture.parameters())
        self._rows = int(min(rows, max(_FIRST_ROWS, _OPERATIONS // (6 * max(1, weights)))))
        widths = layout.width(placement=False), layout.width(placement=True)
        generator = torch.Generator().manual_seed(0)
        self._inputs = [torch.randn(self._rows, width, generator=generator).to(device) for width in widths]
        self._times: dict[str, dict[str, float]] = {}

    def choose(self, settings: Training) -> Choices:
        """What is `auto` in the settings is measured, the rest is taken as it is set. A collective call.

        Raises UserError where the way of tables that is set is not on offer.
        """
        way = way_of(settings.tables, self._device.type, _ranks())
        with _random_states_kept(self._device), freed_memory_kept():  # as in training
            precision = settings.precision if settings.precision != "auto" else self._precision()
            experts = self._experts(precision)
            if settings.tables == "auto" and self._device.type == "cpu" and self._layout.ids:
                way = self._way(way)
            threads = self._threads(settings.threads, precision, way)
        return Choices(precision, way, experts, threads, self._times)

    def _precision(self) -> Precision:
        options: dict[str, Callable[[int], object]] = {
            "fp32": lambda rows: self._step("fp32", rows),
            "bf16": lambda rows: self._step("bf16", rows),
        }
        # Where bf16 is emulated a step takes seconds, so a few rows tell first.
        few = self._timed({name: _with(option, _FIRST_ROWS) for name, option in options.items()}, 0)
        left = {name: option for name, option in options.items() if few[name] <= _HOPELESS * few["fp32"]}
        times = few
        if len(left) > 1:
            times = self._timed({name: _with(option, self._rows) for name, option in left.items()}, SECONDS)
        self._times["precision"] = times
        return "bf16" if faster(times, "fp32", CLEARLY) == "bf16" else "fp32"

    def _experts(self, precision: Precision) -> Compute:
        """`auto`, which goes by the share of experts in use, unless one way is clearly faster for this model."""
        groups = [each for each in self._mixture.modules() if isinstance(each, Experts)]
        if self._device.type != "cpu" or any(each.compute != "auto" for each in groups) or not self._selects:
            return "auto"

        def option(compute: Compute) -> Callable[[], object]:
            def run() -> None:
                with computed(self._mixture, compute):
                    self._step(precision, self._rows)

            return run

        names: tuple[Compute, ...] = ("auto", "dense", "grouped")
        times = self._timed({name: option(name) for name in names}, SECONDS)
        self._times["experts"] = times
        taken = faster(times, "auto", CLEARLY)
        return "dense" if taken == "dense" else "grouped" if taken == "grouped" else "auto"

    @property
    def _selects(self) -> bool:
        return not all(gates.rule.mixes_all for gates in self._mixture.gates)

    def _way(self, by_default: Way) -> Way:
        offered = ways_on_offer()
        options = {str(way): self._trial(way) for way in offered}
        times = self._timed(options, SECONDS, get_args(Way))
        if len(times) < 2:
            return by_default
        self._times["tables"] = times
        taken = faster(times, by_default, CLEARLY)
        return next(way for way in offered if way == taken)

    def _trial(self, way: Way) -> Callable[[], object]:
        widths = sum(stored_width(table.dim) for table in used_tables(self._layout))
        return trial(way, self._layout, self._ids, max(1, min(_TABLE_ROWS, _TABLE_WEIGHTS // max(1, widths))))

    def _threads(self, wanted: int | None, precision: Precision, way: Way) -> int:
        if self._device.type != "cpu":
            return 0
        if wanted is not None:
            return wanted
        now = torch.get_num_threads()
        # Set by hand, or by torchrun for each of its processes.
        if "OMP_NUM_THREADS" in os.environ or now == 1 or _ranks() > 1:
            return now
        tables = self._trial(way)

        def option(count: int) -> Callable[[], object]:
            def run() -> None:
                torch.set_num_threads(count)
                self._step(precision, self._rows)
                tables()

            return run

        # Cores may be two halves of one, and memory may be what a step waits for.
        counts = [count for count in (now, now // 2, now // 4) if count]
        try:
            times = self._timed({str(count): option(count) for count in counts}, SECONDS)
        finally:
            torch.set_num_threads(now)
        self._times["threads"] = times
        return int(faster(times, str(now), CLEARLY))

    def _step(self, precision: Precision, rows: int) -> None:
        """Forward and backward pass of the dense part."""
        inputs, placement = (each[:rows].requires_grad_() for each in self._inputs)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits: Tensor = self._mixture(inputs, placement).logits
        weights = [each for each in self._mixture.parameters() if each.requires_grad]
        torch.autograd.grad(logits.float().square().mean(), [inputs, *weights], allow_unused=True)

    def _timed(
        self, options: Mapping[str, Callable[[], object]], seconds: float, names: Sequence[str] = ()
    ) -> dict[str, float]:
        """Milliseconds of each option on the slowest rank, of those that every rank has.

        names: of all that a rank may have, where machines differ; by default those of the options.
        """
        wait = torch.cuda.synchronize if self._device.type == "cuda" else lambda: None
        times = milliseconds(options, seconds, wait)
        if _ranks() == 1:
            return times
        asked = list(names or options)
        values = torch.tensor([times.get(name, math.inf) for name in asked], dtype=torch.float64, device=self._device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return {name: time for name, time in zip(asked, values.tolist(), strict=True) if math.isfinite(time)}


def kept(before: Choices, settings: Training, device: torch.device) -> Choices:
    """The choices of a training that goes on here: what changes more than time stays, or it would not be the same.

    A way of tables that this machine does not have gives way to one that it has, threads to as many as there are.
    Raises UserError where the way of tables that is set is not on offer.
    """
    here = device.type == "cpu" and before.tables in ways_on_offer()
    wanted = before.tables if settings.tables == "auto" and here else settings.tables
    count = settings.threads or min(before.threads, torch.get_num_threads()) if device.type == "cpu" else 0
    return replace(before, tables=way_of(wanted, device.type, _ranks()), threads=count)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Within it torch computes with so many threads; 0 leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def computed(mixture: Mixture, compute: Compute) -> Iterator[None]:
    """Within it, experts are computed in this way."""
    groups = [each for each in mixture.modules() if isinstance(each, Experts)]
    before = [each.compute for each in groups]
    set_compute(mixture, compute)
    try:
        yield
    finally:
        for each, own in zip(groups, before, strict=True):
            each.compute = own


def set_compute(mixture: Mixture, compute: Compute) -> None:
    """From now on experts are computed in this way."""
    for each in mixture.modules():
        if isinstance(each, Experts):
            each.compute = compute


@contextlib.contextmanager
def _random_states_kept(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _with(option: Callable[[int], object], rows: int) -> Callable[[], object]:
    return lambda: option(rows)
