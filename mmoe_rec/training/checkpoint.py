"""Checkpoints: everything that a run needs to resume exactly, on any number of ranks.

    latest.json              number of the step to resume from
    finished.json            result of a finished run, see `FinishedRun`
    step-00001200/           weights and optimizer state, written by torch.distributed.checkpoint
        training.json        other state, see `TrainingState`

A killed run leaves no partial file or folder under these names.
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
    """State of a run, without its tensors.

    Attributes:
        step: Number of completed steps.
        position: Position in the training rows after `step`.
        history: Step and result of every validation.
        best_step: Step of the best validation, 0 before the first validation.
        provenance: Settings, features and starting model of the run.
        precision_choice: Precision of the run's matmuls, which a resumed run keeps. None lets the resumed run choose.
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
    """Result of a finished run.

    Attributes:
        artifact: Folder of the model.
        model_uri: URI of the model in the registry, by alias if it has one. Path of `artifact` if it isn't registered.
        best: Validation of the served model on the evaluation rows (one half of the validation users).
        best_step: Step of the best validation.
        rows_per_s: Training rows per second. 0 if the command that finished the run had no step left to train.
        data_wait_fraction: Fraction of the training time spent waiting for data.
        promotion_messages: Sentences that compare the model with the previous champion and name the current champion.
        provenance: Settings, features and starting model of the run.
        start_validation: Validation of the network that the run started from, on the selection rows (the other half).
            None if the run started from random weights.
        network_validation: As `best`, of the uncalibrated network without trees. None if the model has no trees.
        finished_earlier: Whether an earlier command finished the run.
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
        """Return the finished run in the folder `work` (`data.work_dir`), None if there is none.

        Raises:
            UserError: The file `finished.json` is damaged or comes from a different version of this package.
        """
        file = work / "checkpoints" / _FINISHED
        return _read(FinishedRun, file, artifact=work / "model", finished_earlier=True) if file.exists() else None

    def write(self) -> None:
        """Write the result beside the run's checkpoints, where `read` finds it."""
        tree = {name: value for name, value in asdict(self).items() if name not in ("artifact", "finished_earlier")}
        with atomic_file(self.artifact.parent / "checkpoints" / _FINISHED) as file:
            _write(tree, file)


def _write(tree: dict[str, Any], file: Path) -> None:
    file.write_text(json.dumps(tree, indent=1, default=Tensor.tolist), encoding="utf-8")


def _read(kind: type[T], file: Path, **extra_fields: Any) -> T:
    """Read a JSON file that `_write` wrote. Raise UserError if it is damaged or from a different version."""
    try:
        return TypeAdapter(kind).validate_python(json.loads(file.read_text(encoding="utf-8")) | extra_fields)
    except (OSError, ValueError, TypeError):
        raise _damaged(file) from None


def _damaged(file: Path) -> UserError:
    return UserError(
        f"The state of the run, '{file}', is missing, damaged or of another version. Start over without --resume."
    )


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    state: TrainingState


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the checkpoint in `folder` to resume from, None if there is none.

    Raises:
        UserError: The checkpoint is damaged.
    """
    if not (folder / _LATEST).exists():
        return None
    try:
        path = step_folder(folder, json.loads((folder / _LATEST).read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        raise _damaged(folder / _LATEST) from None
    return Checkpoint(path, _read(TrainingState, path / _DESCRIPTION))


def step_folder(folder: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint.

    Args:
        folder: Folder of all checkpoints.
        step: Number of the step.
    """
    return folder / f"step-{step:08d}"


class CheckpointWriter:
    """Writer of checkpoints into a folder that all ranks see. Every rank has a writer.

    Args:
        folder: Folder of all checkpoints.
        keep_last: Number of latest checkpoints to keep. The best checkpoint is always kept.
        before: Checkpoint that the run resumes from. None starts a new run, whose first checkpoint replaces all
            checkpoints of an earlier run.
    """

    def __init__(self, folder: Path, keep_last: int, before: Checkpoint | None = None) -> None:
        self.folder, self._keep_last = folder, keep_last
        self._steps = [before.state.step] if before is not None else []
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            if before is None:  # Until a new run has written a checkpoint, --resume must not find the earlier run.
                for name in (_LATEST, _FINISHED):
                    (folder / name).unlink(missing_ok=True)
            self._remove_partial()

    def save(self, tensors: dict[str, Any], state: TrainingState) -> None:
        """Write a checkpoint. All ranks must call this together.

        Args:
            tensors: State dicts by name, such as {"model": ..., "optimizer": ...}.
            state: State of the run without its tensors.

        Raises:
            UserError: The checkpoint can't be written, for instance to a full disk.
        """
        temporary = self.folder / f".step-{state.step:08d}.tmp"
        try:
            with warnings.catch_warnings(action="ignore", category=FutureWarning):
                dcp.save(tensors, checkpoint_id=temporary)
            if dist.get_rank() == 0:
                self._finish(temporary, state)
        except RuntimeError:  # Another rank was lost. `distributed.process_group` turns this into a UserError.
            raise
        except (Exception, CheckpointException) as error:  # CheckpointException is no subclass of Exception.
            self._remove_partial()
            raise UserError(
                f"Training stops, because a checkpoint can't be written to '{self.folder}': {_reason(error)}. Earlier "
                "checkpoints are intact. Free some space, then resume with --resume."
            ) from error

    def _finish(self, temporary: Path, state: TrainingState) -> None:
        _write(asdict(state), temporary / _DESCRIPTION)
        replace_folder(temporary, step_folder(self.folder, state.step))
        write_text(self.folder / _LATEST, json.dumps({"step": state.step}))
        self._steps = [*(step for step in self._steps if step < state.step), state.step]
        kept = {step_folder(self.folder, step) for step in [*self._steps[-self._keep_last :], state.best_step]}
        for old in self.folder.glob("step-*"):
            if old not in kept:
                shutil.rmtree(old, ignore_errors=True)

    def _remove_partial(self) -> None:
        for partial in self.folder.glob(".step-*.tmp"):
            shutil.rmtree(partial, ignore_errors=True)


def _reason(error: BaseException) -> str:
    """Return a short reason for an error. An error that collects errors of ranks has the reason of the first one."""
    if failures := getattr(error, "failures", None):
        error = next(iter(failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__


def restore(folder: Path, model: Any, optimizer: Any) -> None:
    """Load a checkpoint into a sharded model and its optimizers. All ranks must call this together.

    Args:
        folder: Folder of the checkpoint. Another number of ranks may have written it.
        model: The sharded model (`ShardedModel.model`).
        optimizer: `Optimizers` of the model, after `Optimizers.init_state`.
    """
    tensors = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        dcp.load(tensors, checkpoint_id=folder)
    model.load_state_dict(tensors["model"])


def load_unsharded(model: nn.Module, folder: Path) -> None:
    """Load the weights of a checkpoint into an unsharded model, without a process group.

    Args:
        model: A `RankingModel` whose tables are `PlainTables`.
        folder: Folder of the checkpoint.

    Raises:
        UserError: The folder contains no complete checkpoint.
    """
    if not (folder / ".metadata").is_file():
        raise UserError(f"'{folder}' contains no complete checkpoint. Train again, or restore the folder.")
    expected = model.state_dict()
    # Stored tables have padding columns. Read them with the padding, and remove the padding afterward.
    tables = {name: tensor.shape for name, tensor in expected.items() if name.startswith("tables.")}
    weights = expected | {name: torch.empty(rows, padded_dim(dim)) for name, (rows, dim) in tables.items()}
    with warnings.catch_warnings():
        # torch warns that there is no process group, which is intended here.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        dcp.load({"model": weights}, checkpoint_id=folder, no_dist=True)
    model.load_state_dict(weights | {name: from_padded(weights[name], dim) for name, (_, dim) in tables.items()})
