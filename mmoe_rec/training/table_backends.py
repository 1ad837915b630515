"""Embedding tables of one process on a CPU, in plain PyTorch, and what fbgemm needs there.

`SingleProcessTables` is the plain backend. An update sorts the rows that were looked up, adds up the gradients of equal
ones, in an order that no thread changes, and then touches each row once.

Shapes: F inputs, B rows of a batch, D columns of a table.

Row-wise Adagrad (as in fbgemm; Duchi et al. 2011, with one sum of squares for a row of D columns):
    momentum += mean(g^2);  w -= rate * g / (sqrt(momentum) + eps)
"""

import ctypes
import functools
import importlib
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmoe_rec.batches.batch import KeyedIds, split_by_position
from mmoe_rec.errors import UserError
from mmoe_rec.model.model_layout import EmbeddingTable, ModelLayout
from mmoe_rec.model.tables import PooledEmbeddings, padded_dim, used_tables

_PARTS = ("torchrec", "fbgemm_gpu")
EPS = 1e-8  # as fbgemm has it where nothing else is said

TableBackend = Literal["fbgemm", "torch"]
"""fbgemm: torchrec's tables, by fbgemm's kernels; torch: `SingleProcessTables`."""


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


def choose_table_backend(choice: Literal["auto"] | TableBackend, device: str, ranks: int = 1) -> TableBackend:
    """Return the backend of tables that a setting asks for, and fbgemm for `auto` where it is installed.

    Args:
        choice: The setting `training.table_backend`.
        device: "cpu" or "cuda".
        ranks: Number of processes that train together.

    Raises:
        UserError: The backend isn't available here.
    """
    if ranks > 1:
        require_torchrec("training on several processes", "start it without torchrun")
    if device == "cuda":
        require_torchrec("training on a GPU", "set training.device to cpu")
    if choice == "torch" and (ranks > 1 or device == "cuda"):
        raise UserError("training.table_backend is torch, which trains in one process on a CPU. Set it to auto.")
    if choice == "fbgemm" and not torchrec_installed():
        raise UserError(
            "training.table_backend is fbgemm, but torchrec and fbgemm are not installed: set it to auto or torch"
        )
    return "fbgemm" if choice != "torch" and torchrec_installed() else "torch"


class SingleProcessTables(nn.Module):
    """The tables of a layout, as wide as they are stored; zeros until they are filled.

    A checkpoint holds the same state under the same names as with torchrec's collection and its fused optimizer, so a
    training with `training.table_backend` auto may go on with or without torchrec.

    Attributes:
        embedding_bags: The state, `embedding_bags.<table>.weight`. There are no parameters, as the backward pass itself
            updates the tables.
        momentum: Table -> Adagrad's number of each row.
        rate: Learning rate of the next update. Shape ().
    """

    def __init__(self, layout: ModelLayout) -> None:
        super().__init__()
        self._names = [each.name for each in layout.ids]
        self._looked_at = {name: each.length for each in layout.attention for name, _ in layout.history_inputs(each)}
        self._keys = [each.name for each in layout.lookup_inputs()]
        tables = {table.name: table for table in used_tables(layout)}
        self._tables = [tables[each.table] for each in layout.lookup_inputs()]
        self._widths = [padded_dim(table.dim) for table in self._tables]
        self.rate = torch.zeros(())
        self.embedding_bags = nn.ModuleDict()
        self.momentum: dict[str, Tensor] = {}
        self._inputs = {  # of each table, by number
            name: [number for number, table in enumerate(self._tables) if table.name == name] for name in tables
        }
        for table in tables.values():
            bag = nn.Module()
            bag.weight = nn.Buffer(torch.zeros(table.rows, padded_dim(table.dim)))
            self.embedding_bags[table.name] = bag
            self.momentum[table.name] = torch.zeros(table.rows)
        self._graph = torch.zeros(0, requires_grad=True)

    def forward(self, ids: KeyedIds) -> PooledEmbeddings | dict[str, Tensor]:
        """Sums of each input's embeddings, to be read by `mean_embeddings`; tables are updated in the backward pass."""
        assert list(ids.keys) == self._names, "a batch has the inputs of its layout, in the same order"
        if not self._names:
            return {}
        if self._looked_at:
            ids = split_by_position(ids, self._looked_at)
        return self._keys, self._widths, self.look_up(ids.values, ids.offsets)

    def look_up(self, values: Tensor, offsets: Tensor) -> Tensor:
        """Return the sums of each input's rows. Shape (B, sum of widths).

        Args:
            values: IDs, input by input. Shape (n,).
            offsets: Where each row's ids of each input begin. Shape (F * B + 1,).

        Raises:
            UserError: A table has no such row.
        """
        return _LookUp.apply(self._graph, self, values, offsets)

    def read(self, ids: Tensor, offsets: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Return what `look_up` does; and, for `update`, the rows of each table, (n,), and the bag of each."""
        batch = (len(offsets) - 1) // len(self._tables)
        ends = offsets[::batch].tolist() if batch else [0] * (len(self._tables) + 1)
        _check_rows(self._tables, ids, ends)
        all_lengths = offsets.diff().view(len(self._tables), batch)
        sums: dict[int, Tensor] = {}
        found = []
        for name, inputs in self._inputs.items():
            rows = torch.cat([ids[ends[number] : ends[number + 1]] for number in inputs])
            lengths = all_lengths[inputs].view(-1)
            starts = functional.pad(lengths.cumsum(0), (1, 0))
            weights: Any = self.embedding_bags[name].weight
            pooled = functional.embedding_bag(rows, weights, starts, mode="sum", include_last_offset=True)
            sums |= dict(zip(inputs, pooled.view(len(inputs), batch, pooled.shape[1]), strict=True))
            found.append((rows, torch.arange(len(lengths)).repeat_interleave(lengths)))
        return torch.cat([sums[number] for number in range(len(self._tables))], dim=1), found

    def update(self, found: Sequence[tuple[Tensor, Tensor]], gradient: Tensor) -> None:
        """Update the tables by the gradient of what was looked up, (B, sum of widths)."""
        parts = gradient.split(self._widths, dim=1)
        for (name, inputs), (rows, bags) in zip(self._inputs.items(), found, strict=True):
            if not len(rows):
                continue
            ordered, order = rows.sort(stable=True)
            new = torch.ones(len(ordered), dtype=torch.bool)
            torch.ne(ordered[1:], ordered[:-1], out=new[1:])
            runs = new.nonzero().view(-1)
            distinct, of_bags = ordered.index_select(0, runs), torch.cat([parts[number] for number in inputs])
            sums = functional.embedding_bag(bags.index_select(0, order), of_bags, runs, mode="sum")
            momentum, weights = self.momentum[name], cast("Tensor", self.embedding_bags[name].weight)
            momentum.index_add_(0, distinct, sums.square().mean(1))
            scale = -self.rate / momentum.index_select(0, distinct).sqrt_().add_(EPS)
            weights.index_copy_(0, distinct, weights.index_select(0, distinct).add_(sums.mul_(scale[:, None])))


def _check_rows(tables: Sequence[EmbeddingTable], ids: Tensor, ends: list[int]) -> None:
    for table, (first, last) in zip(tables, pairwise(ends), strict=True):
        if first == last:
            continue
        low, high = ids[first:last].aminmax()
        if low < 0 or high >= table.rows:
            raise UserError(
                f"table '{table.name}' has {table.rows:,} rows, and row {int(low if low < 0 else high)} was looked up: "
                "the encoded rows are not of the features that the model was made for; build them again"
            )


class _LookUp(torch.autograd.Function):
    """Has the backward pass update the tables, which take no gradient."""

    @staticmethod
    def forward(ctx: Any, graph: Tensor, tables: SingleProcessTables, ids: Tensor, offsets: Tensor) -> Tensor:
        pooled, ctx.found = tables.read(ids, offsets)
        ctx.tables = tables
        return pooled

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        ctx.tables.update(ctx.found, gradient)
        return None, None, None, None


class RowWiseAdagrad:
    """The rest of an optimizer: the learning rate, which counts from the next `zero_grad()` or `step()` on, as in
    torchrec, and the state by name.
    """

    def __init__(self, tables: SingleProcessTables, rate: float) -> None:
        self._tables = tables
        tables.rate.fill_(rate)
        self.param_groups: list[dict[str, Any]] = [{"params": [], "lr": tables.rate.item()}]

    def zero_grad(self) -> None:
        """Takes the learning rate over; tables have no gradient."""
        self.step()

    def step(self) -> None:
        """Takes the learning rate over; tables have been updated in the backward pass."""
        self._tables.rate.fill_(self.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        """The state under the names of torchrec's fused optimizer; the tensors are the storage itself."""
        momentum = self._tables.momentum.items()
        return {
            "state": {f"tables.embedding_bags.{name}.weight": {f"{name}.momentum1": each} for name, each in momentum}
        }


class SingleProcessModel:
    """A model as it is, where several processes would have torchrec's DistributedModelParallel around it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.state_dict, self.load_state_dict, self.modules = module.state_dict, module.load_state_dict, module.modules

    def __call__(self, batch: Any) -> Any:
        return self.module(batch)


# fbgemm asks the library cpuinfo what the processor can do: code in torch's libc10 finds out, and fbgemm reads the
# answer from a variable of libc10. In the CUDA build of torch, which is the one on PyPI, libtorch has a second copy of
# this variable, and that code writes into the copy. So fbgemm finds an empty variable and falls back to its reference
# loops: updating tables then takes ten times as long (measured with torch 2.14.1 and fbgemm-gpu-cpu 1.9.0). Torch 2.11,
# 2.12 and 2.13 with fbgemm 1.6, 1.7 and 1.8 have one copy, and nothing to do.
#
# This can go when pyproject.toml asks for a torch whose CUDA build has one copy: `copy_cpuinfo_to_fbgemm`
# finds nothing then.


_ANSWER = "cpuinfo_isa"


def copy_cpuinfo_to_fbgemm() -> bool:
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
