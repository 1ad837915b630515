"""A training that goes on from a checkpoint ends as one that never stopped, on one rank and on several."""

import json
import os
import resource
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmoe_rec.errors import StoppedError, UserError
from mmoe_rec.model.mmoe import RankingModel
from mmoe_rec.preprocessing.prepare import FeatureFolder
from mmoe_rec.settings.sections import Settings
from mmoe_rec.training import loop
from mmoe_rec.training.checkpoint import TrainingState, latest_checkpoint
from mmoe_rec.training.distributed import process_group
from mmoe_rec.training.loop import Trainer, TrainingResult
from mmoe_rec.training.provenance import Provenance, WarmStartSource, fixed_settings
from tests.model.examples import LAYOUT
from tests.pipelines.learnable_log import settings_tree
from tests.training.learnable import CPU, TRAINING, plain_model, write_prepared
from tests.training.ranks import spawn
from tests.training.resuming import (
    BALANCED,
    DRAWS,
    DROPS,
    STEPS,
    CrashError,
    crash,
    record_losses,
    train,
    train_on_rank,
    weights,
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> FeatureFolder:
    return write_prepared(tmp_path_factory.mktemp("prepared"), LAYOUT, unit=0.001)


def best(prepared: FeatureFolder, result: TrainingResult) -> RankingModel:
    return plain_model(LAYOUT, result.best_checkpoint, DROPS)


@pytest.fixture(scope="module")
def whole(prepared: FeatureFolder, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    return train(prepared, tmp_path_factory.mktemp("whole"))


def assert_same(prepared: FeatureFolder, actual: TrainingResult, expected: TrainingResult) -> None:
    assert actual.steps == expected.steps
    assert actual.best_step == expected.best_step
    assert [step for step, _ in actual.history] == [step for step, _ in expected.history]
    for (_, left), (_, second) in zip(actual.history, expected.history, strict=True):
        assert (left.to_metrics(), left.rarer_label_rows) == (second.to_metrics(), second.rarer_label_rows)
        assert torch.equal(left.experts.weights, second.experts.weights)
    weights = best(prepared, expected).state_dict()
    assert weights["mixture.levels.0.gates.selection_bias"].any()
    assert all(torch.equal(weight, weights[name]) for name, weight in best(prepared, actual).state_dict().items())


def state_in(folder: Path) -> TrainingState:
    """Where the training stands that a folder's last checkpoint holds."""
    actual = latest_checkpoint(folder)
    return actual.state


def assert_near(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Sums over ranks are rounded in another order; 240 steps make no more of it than this."""
    for name, weight in expected.items():
        torch.testing.assert_close(
            actual[name], weight, atol=2e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


THOROUGH = {"marks": pytest.mark.thorough}


# 39: before the first checkpoint; 81: just after one; 119: in the first epoch's last step; 160: when one is begun.
@pytest.mark.parametrize(
    "steps",
    [
        pytest.param((39,), **THOROUGH),
        (81,),
        pytest.param((119, 120), **THOROUGH),
        pytest.param((45, 100, 160, 239), **THOROUGH),
    ],
)
def test_a_crash_changes_no_bit(
    prepared: FeatureFolder, tmp_path: Path, whole: TrainingResult, steps: tuple[int, ...]
) -> None:
    for step in steps:
        with pytest.raises(CrashError):
            train(prepared, tmp_path, crash(step))
    assert_same(prepared, train(prepared, tmp_path), whole)


def test_a_crash_without_torchrec_changes_no_bit(prepared: FeatureFolder, tmp_path: Path) -> None:
    with pytest.raises(CrashError):
        train(prepared, tmp_path / "crashed", crash(81), table_backend="torch", epochs=1)
    actual, whole = (train(prepared, tmp_path / name, table_backend="torch", epochs=1) for name in ("crashed", "whole"))
    assert_same(prepared, actual, whole)


AUTO = {"epochs": "auto", "batch_size": 400, "checkpoint_steps": 20}


# 30 steps make an epoch. 30: before the validation that ends an epoch is saved; 50: in the second epoch.
def test_a_crash_changes_no_number_of_epochs(prepared: FeatureFolder, tmp_path: Path) -> None:
    for step in (30, 50):
        with pytest.raises(CrashError):
            train(prepared, tmp_path / "crashed", crash(step), **AUTO)
    actual, whole = (train(prepared, tmp_path / name, **AUTO) for name in ("crashed", "whole"))
    assert whole.stopped_early
    assert 60 <= whole.steps < 600
    assert whole.steps % 30 == 0
    assert_same(prepared, actual, whole)
    assert_same(prepared, train(prepared, tmp_path / "whole", crash(whole.steps + 1), **AUTO), whole)


def test_a_signal_in_an_epochs_last_validation_does_not_end_the_training(
    prepared: FeatureFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state is saved without this validation, which is then the first to come."""
    whole, count = train(prepared, tmp_path / "whole", **AUTO), iter(range(100))
    validate = loop.validate
    with monkeypatch.context() as patch:
        patch.setattr(loop, "validate", lambda *given: None if next(count) == 5 else validate(*given))
        with pytest.raises(StoppedError):
            train(prepared, tmp_path / "stopped", **AUTO)
    assert (state_in(tmp_path / "stopped").step, len(state_in(tmp_path / "stopped").history)) == (60, 5)
    assert_same(prepared, train(prepared, tmp_path / "stopped", **AUTO), whole)


@pytest.mark.parametrize("name", [signal.SIGTERM, pytest.param(signal.SIGINT, **THOROUGH)])
def test_a_signal_saves_the_step_at_hand(
    prepared: FeatureFolder, tmp_path: Path, whole: TrainingResult, name: signal.Signals
) -> None:
    def at(trainer: Trainer) -> None:
        if trainer.result.steps == 53:
            os.kill(os.getpid(), name)

    before = signal.getsignal(name)
    with pytest.raises(StoppedError, match=rf"{name.name} received, and step 5[34] is saved.*--resume"):
        train(prepared, tmp_path, at)
    assert signal.getsignal(name) is before
    assert state_in(tmp_path).step in (53, 54)
    assert_same(prepared, train(prepared, tmp_path), whole)


def test_a_training_at_its_end_is_not_trained_on(prepared: FeatureFolder, whole: TrainingResult) -> None:
    def at(_: Trainer) -> None:
        raise AssertionError("there is no step left")

    assert_same(prepared, train(prepared, whole.best_checkpoint.parent, at), whole)


def test_the_last_checkpoints_and_the_best_are_kept(prepared: FeatureFolder, tmp_path: Path) -> None:
    seen: list[set[int]] = []

    def at(trainer: Trainer) -> None:
        if trainer.result.steps % 40 == 39:
            seen.append({int(path.name.removeprefix("step-")) for path in tmp_path.glob("step-*")})
            assert trainer.result.best_step in seen[-1] | {0}

    (tmp_path / "step-00099999").mkdir()
    (tmp_path / ".step-00000007.tmp").mkdir()
    result = train(prepared, tmp_path, at, keep_checkpoints=2)
    assert seen[0] == {99999}, "what others left stays until there is something better"
    assert all(len(steps) <= 3 for steps in seen)
    last = {int(path.name.removeprefix("step-")) for path in tmp_path.glob("step-*")}
    assert last == {STEPS - 40, STEPS} | {result.best_step}
    assert not list(tmp_path.glob(".*"))


# Faults


def test_a_full_disk_ends_training_and_leaves_the_checkpoint_before(
    prepared: FeatureFolder, tmp_path: Path, whole: TrainingResult
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def at(trainer: Trainer) -> None:
        if trainer.result.steps == 70:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))

    try:
        with pytest.raises(UserError, match=r"a checkpoint can't be written to .*File too large.*--resume"):
            train(prepared, tmp_path, at)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.glob(".step*"))
    assert state_in(tmp_path).step == 40
    assert_same(prepared, train(prepared, tmp_path), whole)


def test_a_loss_that_is_not_finite_stops(prepared: FeatureFolder, tmp_path: Path) -> None:
    def at(trainer: Trainer) -> None:
        if trainer.result.steps == 50:
            with torch.no_grad():
                for parameter in trainer.sharded.dense_parameters().values():
                    parameter.fill_(float("nan"))

    with pytest.raises(UserError, match="the loss of step 51 is not finite"):
        train(prepared, tmp_path, at)
    assert state_in(tmp_path).step == 40


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("latest.json", "{", "latest.json', is missing, damaged or"),
        ("latest.json", '{"step": 7}', "step-00000007/training.json', is missing"),
        ("step-00000008/training.json", '{"format": 99}', "training.json', is missing, damaged or of another version"),
    ],
)
def test_damage_is_named(tmp_path: Path, file: str, text: str, message: str) -> None:
    (tmp_path / "step-00000008").mkdir()
    (tmp_path / "latest.json").write_text('{"step": 8}')
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=message):
        latest_checkpoint(tmp_path)


def test_a_new_training_forgets_where_another_one_stood(prepared: FeatureFolder, tmp_path: Path) -> None:
    """A command that goes on after it was killed before its first checkpoint would else go on with the other one."""
    train(prepared, tmp_path)
    with process_group(CPU):
        Trainer(prepared, LAYOUT, DROPS, TRAINING, CPU, tmp_path, lambda *_: None)
    assert latest_checkpoint(tmp_path) is None


@pytest.mark.thorough
def test_two_ranks_stop_at_the_same_step(prepared: FeatureFolder, tmp_path: Path) -> None:
    """A rank that took another step would wait for the other one in vain."""
    for last in (50, None):
        spawn(record_losses, prepared, [(tmp_path, last, AUTO)])
    steps = state_in(tmp_path).step
    assert 60 <= steps < 600
    assert steps % 30 == 0
    assert len(json.loads((tmp_path / "losses.json").read_text())) == steps


@pytest.fixture(scope="module")
def folder(prepared: FeatureFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each subfolder holds a training that came to its end; the names say on how many ranks, one after the other."""
    folder = tmp_path_factory.mktemp("trainings")
    train(prepared, folder / "1", None, DRAWS)
    train(prepared, folder / "balanced 1", None, BALANCED)
    with pytest.raises(CrashError):
        train(prepared, folder / "1-2", crash(100), DRAWS)
    first = [
        (folder / "2", DROPS, None),
        (folder / "2-2", DROPS, 100),
        (folder / "balanced 2", BALANCED, None),
    ]
    spawn(train_on_rank, prepared, first)
    spawn(train_on_rank, prepared, [(folder / "2-2", DROPS, None), (folder / "1-2", DRAWS, None)])
    return folder


@pytest.mark.thorough
def test_as_many_ranks_change_no_bit(prepared: FeatureFolder, folder: Path) -> None:
    whole, resumed = (weights(prepared, folder / name, DROPS) for name in ("2", "2-2"))
    assert all(torch.equal(weight, whole[name]) for name, weight in resumed.items())


@pytest.mark.thorough
def test_balance_is_over_all_ranks(prepared: FeatureFolder, folder: Path) -> None:
    """The loss multiplies loads by probabilities: ranks that did so on their own rows would train another model."""
    left, two = (weights(prepared, folder / f"balanced {ranks}", BALANCED) for ranks in (1, 2))
    assert_near(two, left)
    plain = weights(prepared, folder / "1", DRAWS)
    name = "mixture.levels.0.gates.linear.weight"
    assert (left[name] - plain[name]).abs().max() > 0.01, "balance changed next to nothing"


@pytest.mark.thorough
def test_another_number_of_ranks_gives_the_same_model(prepared: FeatureFolder, folder: Path) -> None:
    """After `test_sharding.py`, which compares losses, of further numbers."""
    assert_near(*(weights(prepared, folder / name, DRAWS) for name in ("1-2", "1")))


@pytest.mark.thorough
def test_two_ranks_judge_the_rows_of_all(prepared: FeatureFolder, folder: Path) -> None:
    """Calibration of the last validation, at which weights differ by as little as above."""
    left, two = (state_in(folder / name).history[-1][1] for name in ("1", "1-2"))
    assert two.rarer_label_rows == left.rarer_label_rows
    assert min(left.rarer_label_rows.values()) > 100
    assert two.calibration == pytest.approx(left.calibration, rel=1e-3)
    assert set(left.calibration) == {"click", "like"}


# By what a training is known again.


ALIAS = WarmStartSource("models:/shop@champion", "models:/shop/3", "weights", "run")


def settings(path: str = "", value: Any = None) -> Settings:
    """Those of the learnable log, with one changed, such as `training.seed`."""
    tree = settings_tree(Path("somewhere"))
    *sections, name = path.split(".")
    section = tree
    for item in sections:
        section = section.setdefault(item, {})
    if path:
        section[name] = value
    return Settings.model_validate(tree)


ORIGIN = Provenance(fixed_settings(settings()), "features", 7, "run", ALIAS)


@pytest.mark.parametrize(("name", "value"), [("training.device", "cuda"), ("evaluation.resamples", 60)])
def test_what_does_not_matter_to_the_steps_may_change(name: str, value: Any) -> None:
    now = fixed_settings(settings(name, value))
    for uri in (ALIAS.uri, ALIAS.pinned_uri):
        assert ORIGIN.describe_mismatch(now, "features", uri) is None


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("training.learning_rate", 0.5, "training.learning_rate 0.01, and now it is 0.5. Restore the setting"),
        ("training.calibration", "isotonic", 'training.calibration "none", and now it is "isotonic"'),
        ("tasks.liked.objective", "engagement", 'objective "satisfaction", and now it is "engagement"'),
        ("features.user.dim", 16, "started with features.user.dim 8, and now it is 16"),
        ("split.train_end", "2024-03-07", 'split.train_end "2024-03-08T00:00:00Z", and now it is "2024-03-07T'),
        ("columns.sampling_rate", "rate", 'columns.sampling_rate missing, and now it is "rate"'),
    ],
)
def test_a_changed_setting_is_named(name: str, value: Any, sentence: str) -> None:
    actual = ORIGIN.describe_mismatch(fixed_settings(settings(name, value)), "features", ALIAS.uri)
    assert sentence in actual


def test_other_features_and_starts_are_named() -> None:
    now = fixed_settings(settings())
    assert "the log, the feature settings or the split have changed" in ORIGIN.describe_mismatch(
        now, "others", ALIAS.uri
    )
    actual = ORIGIN.describe_mismatch(now, "features", "models:/shop/4")
    assert actual.startswith("it was started with --from models:/shop@champion, and now it is --from models:/shop/4.")
    assert ORIGIN.describe_mismatch(now, "features", None).endswith(
        "champion, and now it is no --from. Restore the option"
    )
    begun = replace(ORIGIN, start=None)
    assert begun.describe_mismatch(now, "features", None) is None
    assert begun.describe_mismatch(now, "features", "x").startswith(
        "it was started with no --from, and now it is --from x"
    )
