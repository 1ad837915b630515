"""Embedding tables on a CPU: look-up, and update by row-wise Adagrad, in plain PyTorch or by fbgemm.

`RowWise` is the plain way. All tables lie in one flat storage, rows one after the other, and so does Adagrad's one
number a row. Inputs whose tables are equally wide are rows of one matrix: an update sorts the rows that were looked up,
adds up the gradients of equal ones, in an order that no thread changes, and then touches each row once. For F inputs, B
rows of a batch, D columns of a table.

Row-wise Adagrad (as in fbgemm; Duchi et al. 2011, with one sum of squares for a row of D columns):
    momentum += mean(g^2);  w -= rate * g / (sqrt(momentum) + eps)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmoe_rec.batches.batch import KeyedIds, by_place
from mmoe_rec.errors import UserError
from mmoe_rec.model.model_layout import ModelLayout
from mmoe_rec.model.tables import Pooled, stored_width, used_tables
from mmoe_rec.training.fbgemm import require_torchrec, share_cpuinfo, torchrec_installed

_MOST_INT32 = 2**31 - 1  # sorting numbers of 32 bits takes two thirds of the time


@dataclass(frozen=True)
class Place:
    """Where the table of an input lies: number of its first weight, and of its first row's momentum."""

    table: str
    rows: int
    width: int
    weight: int
    momentum: int


@dataclass(frozen=True)
class Storage:
    """Weights and momentum of all tables, flat float32; rate: () float32, the learning rate of the next update."""

    weights: Tensor
    momentum: Tensor
    rate: Tensor
    eps: float


class RowWise:
    """Looks up inputs in tables, and updates these in the backward pass. places: of each input's table."""

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = places
        alike: dict[tuple[int, int], list[int]] = {}
        for number, place in enumerate(places):
            alike.setdefault((place.width, place.weight % place.width), []).append(number)
        self._groups = [_Group(places, numbers) for numbers in alike.values()]

    def look_up(self, storage: Storage, ids: Tensor, offsets: Tensor, graph: Tensor) -> Tensor:
        """(B, sum of widths) float32: the sums of each input's rows. Raises UserError where a table has no such row.

        storage: is updated in the backward pass of what is returned; ids: (n,) integers, key-major; offsets:
        (F * B + 1,) where each row's ids of each input begin; graph: a tensor that takes a gradient, but gets none.
        """
        return _LookUp.apply(graph, self, storage, ids, offsets)

    def forward(self, storage: Storage, ids: Tensor, offsets: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """What `look_up` returns; and, for `update`, each group's rows that were looked up and the bag of each."""
        batch = (len(offsets) - 1) // len(self.places)
        ends = offsets[::batch].tolist() if batch else [0] * (len(self.places) + 1)
        self._check(ids, ends)
        sums: dict[int, Tensor] = {}
        found = []
        for group in self._groups:
            rows, lengths = group.read_rows(ids, offsets, ends, batch)
            starts = functional.pad(lengths.cumsum(0, dtype=rows.dtype), (1, 0))
            matrix = group.matrix(storage.weights)
            pooled = functional.embedding_bag(rows, matrix, starts, mode="sum", include_last_offset=True)
            sums |= dict(zip(group.inputs, pooled.view(len(group.inputs), batch, group.width), strict=True))
            found.append((rows, torch.arange(len(lengths)).repeat_interleave(lengths)))
        return torch.cat([sums[number] for number in range(len(self.places))], dim=1), found

    def update(self, storage: Storage, found: Sequence[tuple[Tensor, Tensor]], gradient: Tensor) -> None:
        """One step of the tables. gradient: (B, sum of widths), of what was looked up."""
        parts = gradient.split([place.width for place in self.places], dim=1)
        for group, (rows, bags) in zip(self._groups, found, strict=True):
            if len(rows):
                group.update(storage, rows, bags, torch.cat([parts[number] for number in group.inputs]))

    def _check(self, ids: Tensor, ends: list[int]) -> None:
        for place, (first, last) in zip(self.places, pairwise(ends), strict=True):
            if first == last:
                continue
            low, high = ids[first:last].aminmax()
            if low < 0 or high >= place.rows:
                raise UserError(
                    f"table '{place.table}' has {place.rows:,} rows, and row {int(low if low < 0 else high)} was "
                    "looked up: the encoded rows are not of the features that the model was made for; build them again"
                )


class _Group:
    """Inputs whose tables are rows of one matrix, which begins with weight number `_first`."""

    def __init__(self, places: Sequence[Place], inputs: list[int]) -> None:
        own = [places[number] for number in inputs]
        self.inputs, self.width = inputs, own[0].width
        self._first = own[0].weight % self.width
        starts = [(place.weight - self._first) // self.width for place in own]
        last = max(start + place.rows for start, place in zip(starts, own, strict=True))
        self._starts = torch.tensor(starts, dtype=torch.int32 if last <= _MOST_INT32 else torch.int64)
        # First row of each table, ascending, and what leads from its rows to the numbers of their momentum.
        tables = sorted({start: place.momentum - start for start, place in zip(starts, own, strict=True)}.items())
        bounds, self._shifts = (torch.tensor(each) for each in zip(*tables, strict=True))
        self._bounds = bounds.to(self._starts)

    def matrix(self, weights: Tensor) -> Tensor:
        """(rows, width) of the weights themselves."""
        rows = (len(weights) - self._first) // self.width
        return weights.detach().as_strided((rows, self.width), (self.width, 1), weights.storage_offset() + self._first)

    def read_rows(self, ids: Tensor, offsets: Tensor, ends: list[int], batch: int) -> tuple[Tensor, Tensor]:
        """(n,) rows of the group's inputs, key-major, and (F * B,) how many of them each bag has."""
        parts = [ids[ends[number] : ends[number + 1]] for number in self.inputs]
        starts = self._starts.repeat_interleave(torch.tensor([len(part) for part in parts]))
        return torch.cat(parts).to(starts.dtype) + starts, offsets.diff().view(len(ends) - 1, batch)[self.inputs].view(
            -1
        )

    def update(self, storage: Storage, rows: Tensor, bags: Tensor, gradient: Tensor) -> None:
        """rows, bags: (n,) that were looked up, and for which row of the gradient (F * B, D)."""
        ordered, order = rows.sort(stable=True)
        new = torch.ones(len(ordered), dtype=torch.bool)
        torch.ne(ordered[1:], ordered[:-1], out=new[1:])
        runs = new.nonzero().view(-1)
        rows = ordered.index_select(0, runs)
        sums = functional.embedding_bag(bags.index_select(0, order), gradient, runs, mode="sum")
        places = rows + self._shifts[torch.bucketize(rows, self._bounds, right=True) - 1]
        storage.momentum.index_add_(0, places, sums.square().mean(1))
        scale = -storage.rate / storage.momentum.index_select(0, places).sqrt_().add_(storage.eps)
        matrix = self.matrix(storage.weights)
        matrix.index_copy_(0, rows.long(), matrix.index_select(0, rows).add_(sums.mul_(scale[:, None])))


class _LookUp(torch.autograd.Function):
    """Has the backward pass update the tables, which take no gradient."""

    @staticmethod
    def forward(ctx: Any, graph: Tensor, tables: RowWise, storage: Storage, ids: Tensor, offsets: Tensor) -> Tensor:
        pooled, ctx.found = tables.forward(storage, ids, offsets)
        ctx.tables, ctx.storage = tables, storage
        return pooled

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        ctx.tables.update(ctx.storage, ctx.found, gradient)
        return None, None, None, None, None


# One process on a CPU in plain PyTorch, for machines without torchrec.
#
# A checkpoint holds the same state under the same names as with torchrec's collection and its fused optimizer, so a
# training may go on with or without torchrec.


EPS = 1e-8  # as fbgemm has it where nothing else is said


class OneProcessTables(nn.Module):
    """The tables of a layout, as wide as they are stored; zeros until they are filled.

    State: `embedding_bags.<table>.weight`, no parameters, as the backward pass itself updates the tables.
    """

    def __init__(self, layout: ModelLayout) -> None:
        super().__init__()
        # Equally wide tables stand side by side, so that they are rows of one matrix.
        tables = sorted(used_tables(layout), key=lambda table: stored_width(table.dim))
        weights = torch.zeros(sum(table.rows * stored_width(table.dim) for table in tables))
        momentum = torch.zeros(sum(table.rows for table in tables))
        self.storage = Storage(weights, momentum, torch.zeros(()), EPS)
        self.embedding_bags = nn.ModuleDict()
        self.momentum: dict[str, Tensor] = {}
        places = {}
        first = row = 0
        for table in tables:
            width = stored_width(table.dim)
            places[table.name] = Place(table.name, table.rows, width, first, row)
            weight = weights[first : first + table.rows * width].view(table.rows, width)
            bag = nn.Module()
            bag.weight = nn.Buffer(weight)
            self.embedding_bags[table.name] = bag
            self.momentum[table.name] = momentum[row : row + table.rows]
            first, row = first + weight.numel(), row + table.rows
        self._names = [each.name for each in layout.ids]
        self._looked_at = {name: each.length for each in layout.attention for name, _ in layout.parts(each)}
        self._keys = [each.name for each in layout.look_ups()]
        self._tables = RowWise([places[each.table] for each in layout.look_ups()])
        self._graph = torch.zeros(0, requires_grad=True)

    def forward(self, ids: KeyedIds) -> Pooled | dict[str, Tensor]:
        """Sums of each input's embeddings, to be read by `by_name`; tables are updated in the backward pass."""
        assert list(ids.keys) == self._names, "a batch has the inputs of its layout, in the same order"
        if not self._names:
            return {}
        if self._looked_at:
            ids = by_place(ids, self._looked_at)
        return self._keys, [place.width for place in self._tables.places], self.look_up(ids.values, ids.offsets)

    def look_up(self, values: Tensor, offsets: Tensor) -> Tensor:
        """(B, sum of widths) float32, by the parts of a `KeyedIds`."""
        return self._tables.look_up(self.storage, values, offsets, self._graph)


class RowWiseAdagrad:
    """The rest of an optimizer: the learning rate, which counts from the next `zero_grad()` or `step()` on, as in
    torchrec, and the state by name.
    """

    def __init__(self, tables: OneProcessTables, rate: float) -> None:
        self._tables = tables
        tables.storage.rate.fill_(rate)
        self.param_groups: list[dict[str, Any]] = [{"params": [], "lr": tables.storage.rate.item()}]

    def zero_grad(self) -> None:
        """Takes the learning rate over; tables have no gradient."""
        self.step()

    def step(self) -> None:
        """Takes the learning rate over; tables have been updated in the backward pass."""
        self._tables.storage.rate.fill_(self.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        """The state under the names of torchrec's fused optimizer; the tensors are the storage itself."""
        momentum = self._tables.momentum.items()
        return {
            "state": {f"tables.embedding_bags.{name}.weight": {f"{name}.momentum1": each} for name, each in momentum}
        }


class OneProcess:
    """A model as it is, where several processes would have torchrec's DistributedModelParallel around it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.state_dict, self.load_state_dict, self.modules = module.state_dict, module.load_state_dict, module.modules

    def __call__(self, batch: Any) -> Any:
        return self.module(batch)


# One process on a CPU with fbgemm: its module is called directly, as torchrec's code that sends ids and embeddings
# between ranks takes longer than looking up the ids of a thousand rows.


def look_up_directly(model: Any) -> None:
    """Changes the forward pass of a sharded model's tables, which gives the same sums; weights stay where they are.

    model: torchrec's DistributedModelParallel on one process. Left as it is where fbgemm holds its tables apart.
    """
    modules, lookups = list(table_batches(model)), getattr(model.module.tables, "_lookups", ())
    # Names of the inputs of each of fbgemm's modules, in their order there, unless torchrec hides them.
    inputs = [config.feature_names() for each in lookups for config in getattr(each, "grouped_configs", ())]
    if len(modules) == len(inputs) == 1:
        widths = [modules[0].embedding_specs[table][1] for table in modules[0].feature_table_map]
        model.module.tables.forward = partial(_look_up_directly, modules[0], inputs[0], widths)


def _look_up_directly(module: Any, names: list[str], widths: list[int], ids: Any) -> Pooled:
    """Sums of the embeddings of each input of a KeyedJaggedTensor, to be read by `by_name`."""
    keys = ids.keys()
    if keys != names:
        ids = ids.permute([keys.index(name) for name in names])
    return names, widths, module(ids.values(), ids.offsets().long())


# The ways in which tables on a CPU are looked up and updated: fbgemm's kernels, and plain PyTorch.
#
# Both work on the same storage, that of fbgemm's module where there is one, so a checkpoint does not depend on the way,
# and a model may change it between two steps. The faster one depends on the processor, by factors of ten; results are
# equal but for rounding.


Way = Literal["fbgemm", "torch"]
"""fbgemm: its kernels; torch: `RowWise`."""


def list_ways() -> tuple[Way, ...]:
    """What this machine's packages allow, on a CPU; the first is the default."""
    return get_args(Way) if torchrec_installed() else ("torch",)


def choose_way(choice: Literal["auto"] | Way, device: str, ranks: int = 1) -> Way:
    """The way that a setting asks for, for `auto` the default. device: "cpu" or "cuda"; ranks: that train together.

    Raises UserError where it is not on offer here.
    """
    if ranks > 1:
        require_torchrec("training on several processes", "start it without torchrun")
    if device == "cuda":
        require_torchrec("training on a GPU", "set training.device to cpu")
        if choice == "torch":
            raise UserError("training.tables is torch, a way of CPUs; on GPUs there is fbgemm alone: set it to auto")
        return "fbgemm"
    if choice == "auto":
        return list_ways()[0]
    if choice not in list_ways():
        raise UserError("training.tables is fbgemm, but torchrec and fbgemm are not installed: set it to auto or torch")
    return choice


def set_way(module: Any, way: Way) -> None:
    """Has the tables of one of fbgemm's modules on CPUs, which must have row-wise Adagrad and add ids up, looked up and
    updated in this way from the next forward pass on."""
    if way == "torch":
        module.forward = partial(_look_up_row_wise, module, RowWise(_places(module)))
    else:
        share_cpuinfo()
        module.__dict__.pop("forward", None)


def table_batches(model: nn.Module) -> Iterator[Any]:
    """fbgemm's modules in a sharded model, each of which holds the tables that it looks up together."""
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen

    for part in model.modules():
        for lookup in getattr(part, "_lookups", ()):  # torchrec keeps them in a plain list
            yield from (each for each in lookup.modules() if isinstance(each, SplitTableBatchedEmbeddingBagsCodegen))


def _places(module: Any) -> list[Place]:
    """The place of each input of one of fbgemm's modules."""
    weights, momentum = module.weights_offsets.tolist(), module.momentum1_offsets.tolist()
    places = []
    for number, table in enumerate(module.feature_table_map):
        rows, width = module.embedding_specs[table][:2]
        name = module.table_names[table] if module.table_names else str(table)
        places.append(Place(name, rows, width, weights[number], momentum[number]))
    return places


def _look_up_row_wise(
    module: Any, tables: RowWise, indices: Tensor, offsets: Tensor, per_sample_weights: Tensor | None = None
) -> Tensor:
    """Instead of the module's own."""
    assert per_sample_weights is None, "ids have no weights of their own here"
    storage = Storage(
        module.weights_host, module.momentum1_host, module.learning_rate_tensor, module.optimizer_args.eps
    )
    return tables.look_up(storage, indices, offsets, module.placeholder_autograd_tensor)
