"""What a training computes with: precision, ways of tables and products, threads; chosen by timing steps of the model's
own shapes on drawn inputs. So that noise makes no choices, options run in turns, the fastest run of each counts, the
default gives way only to what is clearly faster, and ranks decide together, by the time of the slowest of them.
"""

import copy
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
import torch.distributed as dist
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.nn import functional

from mmoe_rec.atomic import write_text
from mmoe_rec.batches.batch import KeyedIds, by_place
from mmoe_rec.devices import freed_memory_kept
from mmoe_rec.errors import UserError
from mmoe_rec.features.layout import DenseInput, IdInput
from mmoe_rec.model.layout import EmbeddingTable, ModelLayout, ModelTask
from mmoe_rec.model.levels import Compute, Experts, set_compute
from mmoe_rec.model.mmoe import Mixture, build_mixture
from mmoe_rec.model.products import Products, choose_products, has_onednn, set_products
from mmoe_rec.model.tables import stored_width, used_tables
from mmoe_rec.settings.model import Model
from mmoe_rec.settings.training import Training
from mmoe_rec.training.fbgemm import torchrec_installed
from mmoe_rec.training.tables import EPS, OneProcessTables, Way, choose_way, list_ways, set_way

SECONDS = 0.025  # how long each choice is timed, besides runs that are not counted
CLEARLY = 1.2  # how many times as long as the best the default has to take to be left
BY_ROUNDING = 1.05  # the same where results are equal but for rounding and what is timed is a whole step
_OPERATIONS = 1.6e9  # operations of a step that is timed: some milliseconds in fp32 on two cores
SOME_ROWS = 1024  # rows of a batch by which ways of tables are timed
_TABLE_ROWS = 20_000
_TABLE_WEIGHTS = 16_000_000  # the tables of each way have at most so many weights together: 64 MB
_FIRST_ROWS = 64
_HOPELESS = 4.0  # bf16 that takes so many times as long as fp32 for a few rows is not tried on more

Precision = Literal["fp32", "bf16"]


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


def read_choices(file: Path) -> Choices | None:
    """Read the choices that the runs of a comparison share. Returns None if no run has made them.

    Raises:
        UserError: The file is damaged.
    """
    try:
        return TypeAdapter(Choices).validate_json(file.read_bytes()) if file.exists() else None
    except ValidationError:
        raise UserError(f"'{file}' is damaged: remove it, and the choices are measured again") from None


def write_choices(file: Path, choices: Choices) -> None:
    """Keep choices for further runs of a comparison."""
    write_text(file, json.dumps(asdict(choices), indent=1))


def keep_choices(before: Choices, settings: Training, device: torch.device) -> Choices:
    """The choices of a training that goes on here, or is compared with another one: what changes more than time stays.

    What is set is taken as it is set. A way of tables or a library of products that this machine does not have gives
    way to one that it has, threads to as many as there are. Raises UserError where what is set is not on offer. A
    collective call.
    """
    if settings.precision != "auto":
        before = replace(before, precision=settings.precision)
    here = device.type == "cpu" and before.tables in list_ways()
    wanted = before.tables if settings.tables == "auto" and here else settings.tables
    count = settings.threads or min(before.threads, torch.get_num_threads()) if device.type == "cpu" else 0
    products = choose_products(settings.products, device.type)
    if settings.products == "auto" and device.type == "cpu" and before.products == "onednn":
        on_all_ranks = torch.tensor(int(has_onednn()))
        if ranks() > 1:
            dist.all_reduce(on_all_ranks, op=dist.ReduceOp.MIN)
        products = "onednn" if on_all_ranks else "blas"
    return replace(before, products=products, tables=choose_way(wanted, device.type, ranks()), threads=count)


def ranks() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


class Chooser:
    """Makes the choices for a model that is about to be trained.

    mixture: its dense part, as it will be trained; it is left as it is, and so are random states. rows: of a rank's
    batch; ids: of such a batch, or of the first `SOME_ROWS` of it.
    """

    def __init__(self, mixture: Mixture, layout: ModelLayout, device: torch.device, rows: int, ids: KeyedIds) -> None:
        self._layout, self._device, self._ids = layout, device, ids
        self._mixture = copy.deepcopy(mixture).to(device)
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
        way = choose_way(settings.tables, self._device.type, ranks())
        products = choose_products(settings.products, self._device.type)
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices), freed_memory_kept():  # as in training
            precision, products = self._choose_products(settings, products)
            experts = self._choose_experts(precision, products)
            if settings.tables == "auto" and self._device.type == "cpu" and self._layout.ids:
                way = self._choose_way(way)
        threads = (settings.threads or torch.get_num_threads()) if self._device.type == "cpu" else 0
        return Choices(precision, way, experts, threads, products, self._times)

    def _choose_products(self, settings: Training, by_default: Products) -> tuple[Precision, Products]:
        """Precision of products and the library of those in fp32, from the same times: bf16 competes with the fp32
        that would be taken instead of it.
        """
        precisions = self._precisions(by_default) if settings.precision == "auto" else [settings.precision]
        libraries: list[Products] = [by_default]
        if settings.products == "auto" and self._device.type == "cpu" and "fp32" in precisions:
            libraries = list(get_args(Products))
        if len(precisions) == len(libraries) == 1:
            return precisions[0], by_default
        options: dict[str, Callable[[], object]] = {
            each: partial(self._step, "fp32", each) for each in libraries if each == "blas" or has_onednn()
        }
        if "bf16" in precisions:
            options["bf16"] = partial(self._step, "bf16", by_default)
        times = self._time(options, SECONDS, [*libraries, *precisions[1:]])
        fp32 = {name: time for name, time in times.items() if name != "bf16"}
        products = cast("Products", faster(fp32, by_default, BY_ROUNDING))
        if len(fp32) > 1:
            self._times["products"] = fp32
        if "bf16" not in times:
            return "fp32", products
        self._times["precision"] = {"fp32": fp32[products], "bf16": times["bf16"]}
        if faster(self._times["precision"], "fp32", CLEARLY) == "fp32":
            return "fp32", products
        return "bf16", by_default  # as it was timed: the products of gates stay in fp32

    def _precisions(self, products: Products) -> list[Precision]:
        """Those that are worth a step to be timed: where bf16 is emulated it takes seconds, so few rows tell first."""
        few = self._time({each: partial(self._step, each, products, _FIRST_ROWS) for each in get_args(Precision)}, 0)
        if few["bf16"] <= _HOPELESS * few["fp32"]:
            return ["fp32", "bf16"]
        self._times["precision"] = few
        return ["fp32"]

    def _choose_experts(self, precision: Precision, products: Products) -> Compute:
        """`auto`, which goes by the share of experts in use, unless one way is clearly faster for this model."""
        groups = [each for each in self._mixture.modules() if isinstance(each, Experts)]
        selects = not all(gates.rule.mixes_all for gates in self._mixture.gates)
        if self._device.type != "cpu" or any(each.compute != "auto" for each in groups) or not selects:
            return "auto"
        options = {name: partial(self._step, precision, products, None, name) for name in get_args(Compute)}
        self._times["experts"] = self._time(options, SECONDS)
        return cast("Compute", faster(self._times["experts"], "auto", CLEARLY))

    def _choose_way(self, by_default: Way) -> Way:
        widths = sum(stored_width(table.dim) for table in used_tables(self._layout))
        most = max(1, min(_TABLE_ROWS, _TABLE_WEIGHTS // max(1, widths)))
        trials = {str(way): make_trial(way, self._layout, self._ids, most) for way in list_ways()}
        times = self._time(trials, SECONDS, get_args(Way))
        if len(times) < 2:
            return by_default
        self._times["tables"] = times
        return cast("Way", faster(times, by_default, CLEARLY))

    def _step(
        self, precision: Precision, products: Products, rows: int | None = None, compute: Compute | None = None
    ) -> None:
        """Forward and backward pass of the dense part."""
        set_products(self._mixture, products)
        if compute is not None:
            set_compute(self._mixture, compute)
        inputs, placement = (each[:rows].requires_grad_() for each in self._inputs)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits: Tensor = self._mixture(inputs, placement).logits
        weights = [each for each in self._mixture.parameters() if each.requires_grad]
        torch.autograd.grad(logits.float().square().mean(), [inputs, *weights], allow_unused=True)

    def _time(
        self, options: Mapping[str, Callable[[], object]], seconds: float, names: Sequence[str] = ()
    ) -> dict[str, float]:
        """Milliseconds of each option on the slowest rank, of those that every rank has.

        names: of all that a rank may have, where machines differ; by default those of the options.
        """
        wait = torch.cuda.synchronize if self._device.type == "cuda" else lambda: None
        times = time_options(options, seconds, wait)
        if ranks() == 1:
            return times
        every = list(names or options)
        values = torch.tensor([times.get(name, math.inf) for name in every], dtype=torch.float64, device=self._device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return {name: time for name, time in zip(every, values.tolist(), strict=True) if math.isfinite(time)}


RUNS_AT_LEAST = 3
GIVE_UP = 3.0  # an option that takes so many times as long as the fastest is not run again


def time_options(
    options: Mapping[str, Callable[[], object]], seconds: float, synchronise: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """What each option takes: the fastest of its runs, which come in turns, so that all meet the same machine.

    Each runs once before that, which is not counted: libraries prepare themselves at their first call. Turns begin
    until `seconds` have passed, but at least `RUNS_AT_LEAST` times.
    """

    def run(name: str) -> float:
        started = time.perf_counter()
        options[name]()
        synchronise()
        return time.perf_counter() - started

    found = dict.fromkeys(options, math.inf)
    for name in options:
        run(name)
    begun, turns = time.perf_counter(), 0
    while turns < RUNS_AT_LEAST or time.perf_counter() - begun < seconds:
        best = min(found.values(), default=0.0)
        for name in options:
            if turns == 0 or found[name] <= GIVE_UP * best:
                found[name] = min(found[name], run(name))
        turns += 1
    return {name: 1000 * shortest for name, shortest in found.items()}


# A look-up and an update of small tables like those of a training, which are timed before it begins.


_RATE = 0.05
_WEIGHT = 0.01


def make_trial(way: Way, layout: ModelLayout, ids: KeyedIds, rows_at_most: int) -> Callable[[], None]:
    """What does one look-up and one update in this way, in some milliseconds for a batch of thousands of rows.

    layout: of the training, with inputs; tables have its widths, and no more than `rows_at_most` rows. ids: of a batch
    as it is trained on; those beyond a table's last row begin again at its first.
    """
    # fbgemm wants inputs that share a table next to each other.
    tables = tuple(replace(each, rows=min(each.rows, rows_at_most)) for each in used_tables(layout))
    names = [table.name for table in tables]
    inputs = tuple(sorted(layout.look_ups(), key=lambda each: names.index(each.table)))
    if layout.attention:
        ids = by_place(ids, {name: each.length for each in layout.attention for name, _ in layout.parts(each)})
    columns = [ids.column(each.name) for each in inputs]
    own = [tables[names.index(each.table)] for each in inputs]
    values = torch.cat([column % table.rows for (column, _), table in zip(columns, own, strict=True)])
    offsets = functional.pad(torch.cat([starts.diff() for _, starts in columns]).cumsum(0), (1, 0))
    gradient = torch.randn(ids.rows, sum(stored_width(table.dim) for table in own))
    look_up = _look_up_by(way, replace(layout, tables=tables, ids=inputs, attention=()))

    def once() -> None:
        look_up(values, offsets).backward(gradient)

    return once


def _look_up_by(way: Way, layout: ModelLayout) -> Callable[[Tensor, Tensor], Tensor]:
    if not torchrec_installed():
        plain = OneProcessTables(layout)
        plain.storage.weights.fill_(_WEIGHT)
        plain.storage.rate.fill_(_RATE)
        return plain.look_up
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    names = [table.name for table in layout.tables]
    module: Any = SplitTableBatchedEmbeddingBagsCodegen(
        [(table.rows, stored_width(table.dim), EmbeddingLocation.HOST, ComputeDevice.CPU) for table in layout.tables],
        feature_table_map=[names.index(each.table) for each in layout.ids],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=_RATE,
        eps=EPS,
        pooling_mode=PoolingMode.SUM,
        table_names=names,
    )
    module.weights_host.detach().fill_(_WEIGHT)
    set_way(module, way)
    return lambda values, offsets: module(indices=values, offsets=offsets)


_IDS, _ROWS, _DIM, _NUMBERS, _TASKS = 20, 20_000, 16, 5, 2


def sample_choices(device: torch.device) -> Choices:
    """The choices for a model with default settings on 20 ids and 5 numbers, in the batches of a million rows."""
    names = [f"id{index}" for index in range(_IDS)]
    layout = ModelLayout(
        tuple(EmbeddingTable(name, _ROWS, _DIM) for name in names),
        tuple(IdInput(name, name) for name in names),
        tuple(DenseInput(f"number{index}") for index in range(_NUMBERS)),
        tuple(ModelTask(f"task{index}", "binary", "engagement") for index in range(_TASKS)),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixture = build_mixture(layout.width(placement=False), [()] * _NUMBERS, 0, _TASKS, Model())
        values = torch.randint(_ROWS, (_IDS * SOME_ROWS,))
    ids = KeyedIds(tuple(names), values, torch.ones(_IDS * SOME_ROWS, dtype=torch.int32))
    settings = Training()
    return Chooser(mixture, layout, device, settings.rows_of_step(10**6), ids).choose(settings)
