"""Choice of the table backend, tables in plain PyTorch for one process on a CPU, and a fix for fbgemm's CPU kernels.

Shapes: F inputs, B rows of a batch, D columns of a table. A bag is the list of IDs of one input in one row of a batch.

Row-wise Adagrad, as in fbgemm, stores one sum of squares (momentum) for a table row w of D columns, and updates the row
by its gradient g (after Duchi et al. 2011):

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

_PACKAGES = ("torchrec", "fbgemm_gpu")
EPS = 1e-8  # fbgemm's default.

TableBackend = Literal["fbgemm", "torch"]
"""fbgemm: torchrec's tables with fbgemm's kernels. torch: `SingleProcessTables`."""


@functools.cache
def torchrec_installed() -> bool:
    """Return whether torchrec can be imported.

    Raises:
        UserError: torchrec is installed, but importing it fails.
    """
    try:
        for name in _PACKAGES:
            importlib.import_module(name)
    except (ImportError, OSError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in _PACKAGES:
            return False
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise UserError(
            f"torchrec and fbgemm are installed, but do not load ({reason}). Run mmoe-rec doctor for the fix."
        ) from error
    return True


def require_torchrec(what: str, instead: str = "") -> None:
    """Raise an error if torchrec isn't installed.

    Args:
        what: Subject of the message, such as "a plan".
        instead: Alternative to installing torchrec, as an imperative such as "set it to auto".

    Raises:
        UserError: torchrec isn't installed, or importing it fails.
    """
    if not torchrec_installed():
        raise UserError(
            f"{what} needs torchrec and fbgemm, which are not installed. Install the extra cpu or cuda "
            f"(`mmoe-rec doctor` prints the command){instead and f', or {instead}'}."
        )


def choose_table_backend(choice: Literal["auto"] | TableBackend, device: str, ranks: int = 1) -> TableBackend:
    """Return the table backend for a setting. `auto` chooses fbgemm if torchrec is installed.

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
            "training.table_backend is fbgemm, but torchrec and fbgemm are not installed. Set it to auto or torch."
        )
    return "fbgemm" if choice != "torch" and torchrec_installed() else "torch"


class SingleProcessTables(nn.Module):
    """Embedding tables in plain PyTorch, initially zero. The backward pass updates them by row-wise Adagrad.

    Weights and optimizer state have the same names as in torchrec, so a checkpoint can be resumed with either backend.

    Attributes:
        embedding_bags: The weights, `embedding_bags.<table>.weight`, with padding columns. The weights are buffers
            instead of parameters, so that no other optimizer updates them.
        momentum: Table name -> Adagrad's sum of squares of each row.
        rate: Learning rate of the next update. Shape ().
    """

    def __init__(self, layout: ModelLayout) -> None:
        super().__init__()
        self._names = [id_input.name for id_input in layout.ids]
        self._history_lengths = {
            name: history.length for history in layout.attention for name, _ in layout.history_inputs(history)
        }
        self._keys = [lookup.name for lookup in layout.lookup_inputs()]
        tables = {table.name: table for table in used_tables(layout)}
        self._tables = [tables[lookup.table] for lookup in layout.lookup_inputs()]
        self._widths = [padded_dim(table.dim) for table in self._tables]
        self.rate = torch.zeros(())
        self.embedding_bags = nn.ModuleDict()
        self.momentum: dict[str, Tensor] = {}
        self._inputs = {  # Table name -> numbers of the inputs that look up this table.
            name: [number for number, table in enumerate(self._tables) if table.name == name] for name in tables
        }
        for table in tables.values():
            bag = nn.Module()
            bag.weight = nn.Buffer(torch.zeros(table.rows, padded_dim(table.dim)))
            self.embedding_bags[table.name] = bag
            self.momentum[table.name] = torch.zeros(table.rows)
        self._graph = torch.zeros(0, requires_grad=True)

    def forward(self, ids: KeyedIds) -> PooledEmbeddings | dict[str, Tensor]:
        """Return the sum of the embeddings of each row's IDs, by input. `mean_embeddings` computes means from it."""
        assert list(ids.keys) == self._names, "a batch has the inputs of its layout, in the same order"
        if not self._names:
            return {}
        if self._history_lengths:
            ids = split_by_position(ids, self._history_lengths)
        return self._keys, self._widths, self.look_up(ids.values, ids.offsets)

    def look_up(self, values: Tensor, offsets: Tensor) -> Tensor:
        """Return the sum of the table rows of each bag, shape (B, sum of the inputs' table columns).

        Args:
            values: The n IDs of all bags, input by input. Shape (n,).
            offsets: Index in `values` at which each bag begins, and n at the end. Shape (F * B + 1,).

        Raises:
            UserError: An ID is no row of its table.
        """
        return _LookUp.apply(self._graph, self, values, offsets)

    def _read(self, ids: Tensor, offsets: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Return the sums of `look_up`, and for each table the looked-up rows and the bag index of each lookup."""
        batch = (len(offsets) - 1) // len(self._tables)
        ends = offsets[::batch].tolist() if batch else [0] * (len(self._tables) + 1)
        _check_rows(self._tables, ids, ends)
        all_lengths = offsets.diff().view(len(self._tables), batch)
        sums: dict[int, Tensor] = {}
        lookups = []
        for name, inputs in self._inputs.items():
            rows = torch.cat([ids[ends[number] : ends[number + 1]] for number in inputs])
            lengths = all_lengths[inputs].view(-1)
            starts = functional.pad(lengths.cumsum(0), (1, 0))
            weights: Any = self.embedding_bags[name].weight
            pooled = functional.embedding_bag(rows, weights, starts, mode="sum", include_last_offset=True)
            sums |= dict(zip(inputs, pooled.view(len(inputs), batch, pooled.shape[1]), strict=True))
            lookups.append((rows, torch.arange(len(lengths)).repeat_interleave(lengths)))
        return torch.cat([sums[number] for number in range(len(self._tables))], dim=1), lookups

    def _update(self, lookups: Sequence[tuple[Tensor, Tensor]], gradient: Tensor) -> None:
        """Update each distinct looked-up row once, given the lookups from `_read` and the gradient of its sums."""
        parts = gradient.split(self._widths, dim=1)
        for (name, inputs), (rows, bags) in zip(self._inputs.items(), lookups, strict=True):
            if not len(rows):
                continue
            # Sorting makes the order in which the gradients of equal rows are added deterministic.
            ordered, order = rows.sort(stable=True)
            is_new = torch.ones(len(ordered), dtype=torch.bool)
            torch.ne(ordered[1:], ordered[:-1], out=is_new[1:])
            starts = is_new.nonzero().view(-1)
            distinct, bag_gradients = ordered.index_select(0, starts), torch.cat([parts[number] for number in inputs])
            sums = functional.embedding_bag(bags.index_select(0, order), bag_gradients, starts, mode="sum")
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
                f"table '{table.name}' has {table.rows:,} rows, but row {int(low if low < 0 else high)} was looked up. "
                "The encoded rows don't match the model's features. Build the features again."
            )


class _LookUp(torch.autograd.Function):
    """Lookup in the tables. Its backward pass updates the tables at once, so it returns no gradient for them."""

    @staticmethod
    def forward(ctx: Any, graph: Tensor, tables: SingleProcessTables, ids: Tensor, offsets: Tensor) -> Tensor:
        pooled, ctx.lookups = tables._read(ids, offsets)
        ctx.tables = tables
        return pooled

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        ctx.tables._update(ctx.lookups, gradient)
        return None, None, None, None


class RowWiseAdagrad:
    """Stand-in for an optimizer of `SingleProcessTables`, whose backward pass does the updates.

    As in torchrec, a new learning rate in `param_groups` takes effect at the next `zero_grad()` or `step()`.

    Args:
        tables: Tables to update.
        rate: Initial learning rate.
    """

    def __init__(self, tables: SingleProcessTables, rate: float) -> None:
        self._tables = tables
        tables.rate.fill_(rate)
        self.param_groups: list[dict[str, Any]] = [{"params": [], "lr": tables.rate.item()}]

    def zero_grad(self) -> None:
        """Pass a changed `lr` of `param_groups` on to the tables, which have no gradients to reset."""
        self.step()

    def step(self) -> None:
        """Pass a changed `lr` of `param_groups` on to the tables. The backward pass has already updated them."""
        self._tables.rate.fill_(self.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        """Return the state under the names of torchrec's fused optimizer. The tensors are not copied."""
        momentum = self._tables.momentum.items()
        return {
            "state": {f"tables.embedding_bags.{name}.weight": {f"{name}.momentum1": sums} for name, sums in momentum}
        }


class SingleProcessModel:
    """Stand-in for torchrec's DistributedModelParallel that calls the model directly, in one process."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.state_dict, self.load_state_dict, self.modules = module.state_dict, module.load_state_dict, module.modules

    def __call__(self, batch: Any) -> Any:
        return self.module(batch)


# fbgemm chooses its kernels by the CPU's instruction sets, which it reads from a variable of torch's libc10. In the
# CUDA build of torch (the build on PyPI), libtorch has a second copy of this variable, and torch fills only this copy.
# fbgemm then finds no instruction sets and falls back to its reference loops. Table updates take ten times as long
# (measured with torch 2.14.1 and fbgemm-gpu-cpu 1.9.0). Torch 2.11, 2.12 and 2.13 have only one copy.
#
# Remove this code when pyproject.toml requires a torch whose CUDA build has only one copy.

_CPUINFO_VARIABLE = "cpuinfo_isa"


def copy_cpuinfo_to_fbgemm() -> bool:
    """Copy the list of the CPU's instruction sets to the variable that fbgemm reads. Return whether it was empty."""
    if (copy := _find_copy()) is None:
        return False
    ctypes.memmove(*copy)
    return True


def _find_copy() -> tuple[int, int, int] | None:
    """Return addresses of the empty variable and of its filled copy, and their size in bytes. None if none is empty."""
    if sys.platform != "linux":
        return None
    folder = Path(torch.__file__).parent / "lib"
    try:
        c10, torch_library = (ctypes.CDLL(str(folder / name)) for name in ("libc10.so", "libtorch.so"))
        c10.cpuinfo_initialize()
        target, source = (
            ctypes.addressof(ctypes.c_char.in_dll(library, _CPUINFO_VARIABLE)) for library in (c10, torch_library)
        )
        size = _size(target)
    except (OSError, AttributeError, ValueError):  # This build of torch has no such library, function or variable.
        return None
    if target == source or size != _size(source) or any(ctypes.string_at(target, size)):
        return None
    return target, source, size


def _size(address: int) -> int:
    """Return the size in bytes of the variable at an address, from `st_size` of its Elf64_Sym (dladdr1)."""
    info, symbol, with_symbol = ctypes.create_string_buffer(32), ctypes.c_void_p(), 1
    has_info = ctypes.CDLL(None).dladdr1(ctypes.c_void_p(address), info, ctypes.byref(symbol), with_symbol)
    return int(ctypes.c_uint64.from_address(symbol.value + 16).value) if has_info and symbol.value else 0
