"""A checkpoint does not depend on the way of its tables, nor on whether torchrec was there."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmoe_rec.preprocessing.prepare import FeatureFolder
from mmoe_rec.training import loop
from mmoe_rec.training import sharded_tables as tables_module
from mmoe_rec.training.loop import Trainer
from mmoe_rec.training.ranks import process_group
from tests.model.examples import LAYOUT
from tests.training.learnable import CPU, MODEL, layout_of, plain_model, write_prepared
from tests.training.resuming import CrashError, Watch, crash, trainer

STEPS = 40
SOME: dict[str, Any] = {"epochs": 1, "checkpoint_steps": 15, "validations_per_epoch": 1, "batch_size": 300}
Place = Callable[[], Any]


@contextmanager
def without_torchrec() -> Iterator[None]:
    """As on a machine that has neither torchrec nor fbgemm."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (loop, tables_module):
            patch.setattr(module, "torchrec_installed", lambda: False)
        yield


PLACES: dict[str, Place] = {"without": without_torchrec} | dict.fromkeys(("fbgemm", "torch"), contextlib.nullcontext)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> FeatureFolder:
    return write_prepared(tmp_path_factory.mktemp("prepared"), LAYOUT)


@contextmanager
def begun(prepared: FeatureFolder, folder: Path, place: str, at: Watch | None = None) -> Iterator[Trainer]:
    """The trainer of a training that begins, or goes on from the folder's last checkpoint."""
    with PLACES[place](), process_group(CPU):
        yield trainer(prepared, folder, at, MODEL, **SOME, tables="auto" if place == "without" else place)


def begin(prepared: FeatureFolder, folder: Path, place: str) -> None:
    """Trains until after the first checkpoint."""
    with begun(prepared, folder, place, crash(20)) as one:
        with pytest.raises(CrashError):
            one.run()
        one.checkpoints.wait()


def state(one: Trainer) -> dict[str, Tensor]:
    """All tensors of model and optimizer by name, tables as they are stored."""
    flat = dict(one.sharded.model.state_dict())
    for parameter, parts in one.optimizer.state_dict()["state"].items():
        flat |= {f"{parameter} {name}": each for name, each in parts.items()}
    return {
        name: (each.local_shards()[0].tensor if hasattr(each, "local_shards") else each).clone()
        for name, each in flat.items()
    }


def trained(prepared: FeatureFolder, folder: Path, place: str) -> dict[str, Tensor]:
    """The weights of a training that comes to its end there."""
    with begun(prepared, folder, place) as one:
        found = one.run()
        assert found.steps == STEPS
        return plain_model(layout_of(prepared), found.best_checkpoint, MODEL).state_dict()


@pytest.fixture(scope="module")
def whole(prepared: FeatureFolder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The weights of a training that was never stopped, by fbgemm's kernels."""
    return trained(prepared, tmp_path_factory.mktemp("whole"), "fbgemm")


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("fbgemm", "without"),
        *(
            pytest.param(*ways, marks=pytest.mark.thorough)
            for ways in (("without", "fbgemm"), ("fbgemm", "torch"), ("torch", "fbgemm"))
        ),
    ],
)
def test_a_training_goes_on_in_another_way(
    prepared: FeatureFolder, tmp_path: Path, whole: dict[str, Tensor], first: str, then: str
) -> None:
    begin(prepared, tmp_path, first)
    with begun(prepared, tmp_path, first) as one:
        before = state(one)
    with begun(prepared, tmp_path, then) as one:
        assert one.result.steps == 15
        after = state(one)
    assert before.keys() == after.keys()
    assert any(name.endswith("item.momentum1") and each.any() for name, each in before.items())
    for name, each in before.items():
        assert torch.equal(each, after[name]), name
    for name, weight in trained(prepared, tmp_path, then).items():
        torch.testing.assert_close(weight, whole[name], atol=1e-4, rtol=1e-3, msg=name)


def test_without_torchrec_a_resumed_training_has_every_bit(prepared: FeatureFolder, tmp_path: Path) -> None:
    begin(prepared, tmp_path / "stopped", "without")
    resumed = trained(prepared, tmp_path / "stopped", "without")
    for name, weight in trained(prepared, tmp_path / "whole", "without").items():
        assert torch.equal(weight, resumed[name]), name
