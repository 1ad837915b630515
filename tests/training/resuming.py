"""Trainings that crash at a step and are resumed. A module of its own so that spawned processes can import it."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mmoe_rec.preprocessing.prepare import FeatureFolder
from mmoe_rec.settings.model import Model
from mmoe_rec.training.checkpoint import latest_checkpoint
from mmoe_rec.training.distributed import process_group
from mmoe_rec.training.loop import Trainer, TrainingResult
from mmoe_rec.training.steps import StepResult
from tests.training.learnable import CPU, MODEL, ROWS, TRAINING, layout_of, plain_model
from tests.training.ranks import join

# All that is drawn; where experts are chosen, another rounding may choose another one.
DRAWS = Model.model_validate(
    MODEL.model_dump()
    | {
        "bottom": MODEL.bottom.model_dump() | {"dropout": 0.1},
        "gates": {"dropout": 0.2, "noise": 0.3},
        "placement": {"units": [4], "dropout": 0.3},
    }
)
# The gates' bias moves from step to step.
DROPS = Model.model_validate(
    MODEL.model_dump()
    | {
        "experts": MODEL.experts.model_dump() | {"compute": "grouped"},
        "gates": {"dropout": 0.2, "routing": "top_k", "top_k": 1, "balance": "bias"},
        "placement": {"units": [4], "dropout": 0.3},
    }
)
BALANCED = DRAWS.model_copy(
    update={"gates": DRAWS.gates.model_copy(update={"balance": "loss", "balance_weight": 2, "z_loss": 0.1})}
)
CHANGES = {"epochs": 2, "validations_per_epoch": 3, "checkpoint_steps": 40, "batch_size": 100}
ONE_EPOCH = {"epochs": 1, "validations_per_epoch": 1, "checkpoint_steps": 100, "batch_size": 60}  # 200 steps
STEPS = 2 * ROWS["train"] // 100
Watch = Callable[[Trainer], None]


class CrashError(Exception):
    """As sudden as a kill, for what a process leaves on disk."""


def crash(step: int) -> Watch:
    """What crashes after a step."""

    def at(trainer: Trainer) -> None:
        if trainer.result.steps == step:
            raise CrashError

    return at


def train(
    prepared: FeatureFolder, folder: Path, at: Watch | None = None, model: Model = DROPS, **changes: object
) -> TrainingResult:
    """Trains on one rank, or goes on from the folder's last checkpoint; `at` is called after every step."""
    with process_group(CPU):
        return trainer(prepared, folder, at, model, **changes).run()


def trainer(prepared: FeatureFolder, folder: Path, at: Watch | None, model: Model, **changes: object) -> Trainer:
    """The same on each of the ranks that have joined, before its first step."""
    settings = TRAINING.model_copy(update=CHANGES | changes)
    first = Trainer(
        prepared, layout_of(prepared), model, settings, CPU, folder, lambda *_: None, resume=latest_checkpoint(folder)
    )
    assert "city" in first.id_dropout.fractions, "hidden ids are among the random draws"
    step = first._step

    def watched(*arguments: object) -> bool | None:
        stopping = step(*arguments)  # type: ignore[arg-type]
        if at is not None and stopping is not None:
            at(first)
        return stopping

    first._step = watched  # type: ignore[method-assign]
    return first


def train_on_rank(
    rank: int, world: int, port: int, prepared: FeatureFolder, jobs: list[tuple[Path, Model, int | None]]
) -> None:
    """Does the jobs one after the other on one of several ranks: in a folder, a model, until it crashes at a step."""
    with join(rank, world, port):
        for folder, model, last in jobs:
            try:
                trainer(prepared, folder, None if last is None else crash(last), model).run()
            except CrashError:
                assert last is not None
            torch.distributed.barrier()


def record_losses(
    rank: int, world: int, port: int, prepared: FeatureFolder, jobs: list[tuple[Path, int | None, dict[str, object]]]
) -> None:
    """Does the jobs one after the other on each of the ranks: in a folder, until it crashes at a step, with changed
    settings; adds step -> loss of each task over all ranks to the folder's `losses.json`.
    """
    with join(rank, world, port):
        for folder, last, changes in jobs:
            file = folder / "losses.json"
            actual = json.loads(file.read_text()) if file.exists() else {}
            first = trainer(prepared, folder, None if last is None else crash(last), DRAWS, **ONE_EPOCH | changes)
            record(first, actual)
            with suppress(CrashError):
                first.run()
            torch.distributed.barrier()
            if rank == 0:
                file.write_text(json.dumps(actual))


def record(trainer: Trainer, actual: dict[str, list[float]]) -> None:
    """Has a trainer note its losses."""
    step = trainer.steps.run_next

    def noted(*arguments: Any) -> StepResult | None:
        first = step(*arguments)
        if first is not None:
            sums = torch.stack([first.losses.detach(), first.observed])
            torch.distributed.all_reduce(sums)
            actual[str(trainer.result.steps + 1)] = (sums[0] / sums[1].clamp(min=1)).tolist()
        return first

    trainer.steps.run_next = noted  # type: ignore[method-assign]


def weights(prepared: FeatureFolder, folder: Path, model: Model) -> dict[str, torch.Tensor]:
    """Those of the best checkpoint of a training that came to its end."""
    actual = latest_checkpoint(folder)
    assert actual is not None
    assert actual.state.step == STEPS
    best = folder / f"step-{actual.state.best_step:08d}"
    return plain_model(layout_of(prepared), best, model).state_dict()
