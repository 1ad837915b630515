"""Checkpoints: all that a training needs to go on as if it had never stopped, on any number of ranks.

    latest.json              number of the step to go on from
    finished.json            the result of a training that has ended, which is not resumed
    step-00001200/           written by torch.distributed.checkpoint: tables, dense part and both optimizers
        training.json        the rest, see `TrainingState`

They appear once they are whole.
"""

import json
import shutil
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic import ConfigDict, TypeAdapter
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from mmoe_rec.atomic import atomic_file, replace_folder, write_text
from mmoe_rec.batches.row_reader import Position
from mmoe_rec.errors import UserError
from mmoe_rec.model.tables import from_padded, padded_dim
from mmoe_rec.training.provenance import Provenance
from mmoe_rec.training.steps import PrecisionChoice
from mmoe_rec.training.validation import Validation

_DESCRIPTION = "training.json"
_LATEST, _FINISHED = "latest.json", "finished.json"
T = TypeVar("T")


@dataclass(frozen=True)
class TrainingState:
    """Where a training stands, apart from the tensors.

    step: steps done; position: the rows they took; history: (step, result) of every validation; best_step: of the best
    one, 0 before the first; choices: what it computes in.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    step: int
    position: Position
    history: tuple[tuple[int, Validation], ...]
    best_step: int
    provenance: Provenance
    precision_choice: PrecisionChoice | None = None


@dataclass(frozen=True)
class FinishedRun:
    """A training that has ended.

    Attributes:
        artifact: The model's folder.
        address: Address of the model in the registry.
        best: Validation of the served model on the judging rows.
        compared: Sentences that compare it with the alias's earlier model and name the one that holds the alias now.
        provenance: Settings and data that it began with.
        start_validation: Validation of the network that it started from.
        network: Validation without trees and calibration, if the model has trees.
        before: Whether it had ended before this command.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    artifact: Path
    model_uri: str
    best: Validation
    best_step: int
    rows_per_s: float
    data_wait_fraction: float
    promotion_messages: tuple[str, ...]
    provenance: Provenance
    start_validation: Validation | None = None
    network_validation: Validation | None = None
    finished_earlier: bool = False

    @staticmethod
    def read(work: Path) -> "FinishedRun | None":
        """The ended training in `data.work_dir`; None where none has ended. Raises UserError where it can't be read."""
        file = work / "checkpoints" / _FINISHED
        return _read(FinishedRun, file, artifact=work / "model", finished_earlier=True) if file.exists() else None

    def write(self) -> None:
        tree = {name: each for name, each in asdict(self).items() if name not in ("artifact", "finished_earlier")}
        with atomic_file(self.artifact.parent / "checkpoints" / _FINISHED) as file:
            _write(tree, file)


def _write(tree: dict[str, Any], file: Path) -> None:
    file.write_text(json.dumps(tree, indent=1, default=Tensor.tolist), encoding="utf-8")


def _read(kind: type[T], file: Path, **more: Any) -> T:
    """What `_write` wrote. Raises UserError for another file, or one of another version."""
    try:
        return TypeAdapter(kind).validate_python(json.loads(file.read_text(encoding="utf-8")) | more)
    except (OSError, ValueError, TypeError):
        raise _damaged(file) from None


def _damaged(file: Path) -> UserError:
    return UserError(
        f"'{file}' is missing, damaged or of another version, so it is unknown what the training there was; train from "
        "the start, without --resume"
    )


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    folder: Path
    state: TrainingState


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint to go on from, None where there is none. Raises UserError where it is damaged."""
    if not (folder / _LATEST).exists():
        return None
    try:
        place = step_folder(folder, json.loads((folder / _LATEST).read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        raise _damaged(folder / _LATEST) from None
    return Checkpoint(place, _read(TrainingState, place / _DESCRIPTION))


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}"


class CheckpointWriter:
    """Writes checkpoints into a folder that all ranks see. Every rank has one.

    kept: this many of the latest stay, and the best; before: the checkpoint that training goes on from; None forgets
    which step another training in the folder had reached, whose checkpoints go once the first new one is whole.
    """

    def __init__(self, folder: Path, keep_last: int, before: Checkpoint | None = None) -> None:
        self.folder, self._kept = folder, keep_last
        self._steps = [before.state.step] if before is not None else []
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            if before is None:  # until a training has its first checkpoint, there is nothing to go on from
                for name in (_LATEST, _FINISHED):
                    (folder / name).unlink(missing_ok=True)
            self._remove_partial()

    def save(self, tensors: dict[str, Any], state: TrainingState) -> None:
        """Write a checkpoint. A collective call.

        tensors: such as {"model": ..., "optimizer": ...}, state dicts. Raises UserError where it can't be written.
        """
        temporary = self.folder / f".step-{state.step:08d}.tmp"
        try:
            with warnings.catch_warnings(action="ignore", category=FutureWarning):
                dcp.save(tensors, checkpoint_id=temporary)
            if dist.get_rank() == 0:
                self._finish(temporary, state)
        except RuntimeError:  # another rank is lost
            raise
        except (Exception, CheckpointException) as error:  # which is no subclass of Exception
            self._remove_partial()
            raise UserError(
                f"a checkpoint can't be written to '{self.folder}': {_reason(error)}; training stops. The checkpoints "
                "before it are whole: once there is room, go on with --resume"
            ) from error

    def _finish(self, temporary: Path, state: TrainingState) -> None:
        _write(asdict(state), temporary / _DESCRIPTION)
        replace_folder(temporary, step_folder(self.folder, state.step))
        write_text(self.folder / _LATEST, json.dumps({"step": state.step}))
        self._steps = [*(step for step in self._steps if step < state.step), state.step]
        stay = {step_folder(self.folder, step) for step in [*self._steps[-self._kept :], state.best_step]}
        for old in self.folder.glob("step-*"):
            if old not in stay:
                shutil.rmtree(old, ignore_errors=True)

    def _remove_partial(self) -> None:
        for left in self.folder.glob(".step-*.tmp"):
            shutil.rmtree(left, ignore_errors=True)


def _reason(error: BaseException) -> str:
    """The system's own word on what went wrong, out of the errors of all ranks."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__


def restore(folder: Path, model: Any, optimizer: Any) -> None:
    """Fills a sharded model and its optimizers, in place, from a checkpoint of any number of ranks. A collective call.

    optimizer: its state has to be there, as `Optimizers.init_state` makes it.
    """
    tensors = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        dcp.load(tensors, checkpoint_id=folder)
    model.load_state_dict(tensors["model"])


def load_unsharded(model: nn.Module, folder: Path) -> None:
    """Fills an unsharded model, on one process and without a process group, from a checkpoint's "model" state.

    model: a `RankingModel` over `PlainTables`. Raises UserError when the folder holds no checkpoint.
    """
    if not (folder / ".metadata").is_file():
        raise UserError(f"'{folder}' holds no complete checkpoint")
    expected = model.state_dict()
    # Tables are read as wide as they are stored.
    tables = {name: each.shape for name, each in expected.items() if name.startswith("tables.")}
    weights = expected | {name: torch.empty(rows, padded_dim(dim)) for name, (rows, dim) in tables.items()}
    with warnings.catch_warnings():
        # That is intended here.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        dcp.load({"model": weights}, checkpoint_id=folder, no_dist=True)
    model.load_state_dict(weights | {name: from_padded(weights[name], dim) for name, (_, dim) in tables.items()})
