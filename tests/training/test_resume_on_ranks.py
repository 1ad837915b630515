"""Checkpoints of two ranks and of one are resumed by any number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmoe_rec.preprocessing.prepare import Prepared
from mmoe_rec.training.checkpoint import latest_checkpoint
from tests.model.examples import LAYOUT
from tests.training.learnable import MODEL, write_prepared
from tests.training.ranks import spawn
from tests.training.resuming import BALANCED, DROPS, CrashError, crash, train, train_on_rank, weights


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return write_prepared(tmp_path_factory.mktemp("prepared"), LAYOUT)


@pytest.fixture(scope="module")
def folder(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each subfolder holds a training that came to its end; the names say on how many ranks, one after the other."""
    folder = tmp_path_factory.mktemp("trainings")
    train(prepared, folder / "1", None, MODEL)
    train(prepared, folder / "balanced 1", None, BALANCED)
    with pytest.raises(CrashError):
        train(prepared, folder / "1-2", crash(100), MODEL)
    first = [
        (folder / "2", DROPS, None),
        (folder / "2-2", DROPS, 100),
        (folder / "2-1-2", MODEL, 100),
        (folder / "balanced 2", BALANCED, None),
    ]
    spawn(train_on_rank, prepared, first)
    with pytest.raises(CrashError):
        train(prepared, folder / "2-1-2", crash(170), MODEL)
    spawn(
        train_on_rank,
        prepared,
        [(folder / name, DROPS if name == "2-2" else MODEL, None) for name in ("2-2", "2-1-2", "1-2")],
    )
    return folder


def test_as_many_ranks_change_no_bit(prepared: Prepared, folder: Path) -> None:
    whole, resumed = (weights(prepared, folder / name, DROPS) for name in ("2", "2-2"))
    assert all(torch.equal(weight, whole[name]) for name, weight in resumed.items())


def test_balance_is_over_all_ranks(prepared: Prepared, folder: Path) -> None:
    """The loss multiplies loads by probabilities: ranks that did so on their own rows would train another model."""
    one, two = (weights(prepared, folder / f"balanced {ranks}", BALANCED) for ranks in (1, 2))
    for key, weight in one.items():
        torch.testing.assert_close(two[key], weight, atol=2e-4, rtol=1e-3, msg=lambda text, key=key: f"{key}: {text}")
    plain = weights(prepared, folder / "1", MODEL)
    name = "mixture.levels.0.gates.linear.weight"
    assert (one[name] - plain[name]).abs().max() > 0.01, "balance changed next to nothing"


@pytest.mark.parametrize("name", ["1-2", "2-1-2"])
def test_other_numbers_of_ranks_give_the_same_model(prepared: Prepared, folder: Path, name: str) -> None:
    """Sums over ranks are rounded in another order; 240 steps make no more of it than this."""
    whole, resumed = (weights(prepared, folder / each, MODEL) for each in ("1", name))
    for key, weight in whole.items():
        torch.testing.assert_close(
            resumed[key], weight, atol=2e-4, rtol=1e-3, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_two_ranks_judge_the_rows_of_all(prepared: Prepared, folder: Path) -> None:
    """GAUC and calibration of the last validation, at which weights differ by as little as above."""
    one, two = (latest_checkpoint(folder / name).state.history[-1][1] for name in ("1", "1-2"))  # type: ignore[union-attr]
    assert two.rarer == one.rarer
    assert min(one.rarer.values()) > 100
    for name in ("gauc", "calibration"):
        assert getattr(two, name) == pytest.approx(getattr(one, name), rel=1e-3)
        assert set(getattr(one, name)) == {"click", "like"}
