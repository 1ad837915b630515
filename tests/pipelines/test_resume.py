"""The command `train --resume`, stopped by signals at any moment, by itself and under torchrun."""

import os
import random
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fork_server import Command
from tests.pipelines.killed_trainings import Training, whole_training
from tests.processes import until


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Training:
    return whole_training(tmp_path_factory.mktemp("trainings"))[0]


def start_until(training: Training, moment: Callable[[Training], bool]) -> Command:
    """A training that has come to a moment, seen by the files that it writes."""
    process = training.start()
    until(lambda: moment(training) or process.poll() is not None, pause=0.01)
    assert process.poll() is None, f"it ended before\n{process.stderr}"
    return process


def has_begun(training: Training) -> bool:
    return (training.work / "checkpoints").is_dir()


def has_saved(training: Training) -> bool:
    return training.saved_step > 0


def has_written_the_model(training: Training) -> bool:
    return (training.work / "model").is_dir()


def test_kills_change_nothing(whole: Training) -> None:
    """Killed before the first checkpoint, twice within training, and while the model is written or registered."""
    chance = random.Random(3)
    training = replace(whole, work=whole.work.with_name("killed"))
    training.prepare(whole.work / "features")
    steps = []
    for moment in (has_begun, has_saved, has_saved, has_written_the_model):
        process = start_until(training, moment)
        with suppress(TimeoutError):
            process.wait(chance.uniform(0, 0.3))
        process.kill()
        steps.append(training.saved_step)
    assert steps[0] == 0, "the first kill came before a checkpoint"
    assert 0 < steps[1] <= steps[2] < steps[3], "training was hit"
    training.finish()
    assert training.weights == whole.weights
    assert training.validation() == whole.validation()
    begun = "select status from runs where run_uuid in (select run_uuid from metrics where key like 'validation/%')"
    assert training.query(begun) == [("FINISHED",)], "runs without a checkpoint stay open"


@pytest.mark.thorough
def test_sigterm_saves_and_the_same_command_goes_on(whole: Training) -> None:
    training = replace(whole, work=whole.work.with_name("terminated"))
    training.prepare(whole.work / "features")
    process = start_until(training, has_saved)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75, process.stderr
    assert process.stderr.splitlines()[-1].startswith("stopped: SIGTERM came; step ")
    assert training.query("select status from runs") == [("KILLED",)]
    training.finish()
    assert training.weights == whole.weights
    assert training.validation() == whole.validation()
    assert training.query("select status from runs") == [("FINISHED",)]


def _ranks(process: Command) -> dict[int, int]:
    """Rank -> process id of torchrun's workers."""
    found = {}
    for each in Path("/proc").glob("[0-9]*"):
        try:
            variables = dict(line.split("=", 1) for line in (each / "environ").read_text().split("\0") if "=" in line)
            parent = int((each / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, UnicodeDecodeError):
            continue
        if parent == process.pid and "LOCAL_RANK" in variables:
            found[int(variables["LOCAL_RANK"])] = int(each.name)
    return found


@pytest.mark.thorough
def test_torchrun_starts_lost_ranks_again_and_they_go_on(whole: Training, tmp_path: Path) -> None:
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

    class OnTwoRanks(Training):
        @property
        def command(self) -> list[str]:
            return [*torchrun, "--max-restarts", "1", "-m", *super().command]

    training = OnTwoRanks(whole.log, tmp_path / "work")
    training.prepare(whole.work / "features")
    process = start_until(training, has_saved)
    os.kill(_ranks(process)[1], signal.SIGKILL)
    assert process.wait() == 0, process.stderr
    assert "local_rank: 1" in process.stderr, "torchrun names it"
    assert "model: " in process.stdout
    assert training.query("select status from runs") == [("FINISHED",)]
    steps = training.query("select max(step) from metrics where key = 'train/learning_rate'")
    assert steps == whole.query("select max(step) from metrics where key = 'train/learning_rate'")
    assert len(training.validation()) == len(whole.validation())
