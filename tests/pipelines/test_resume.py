"""The command `train --resume`, stopped by signals at any moment, by itself and under torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.pipelines.killed_trainings import Training, kill_and_compare, whole_training


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Training:
    return whole_training(tmp_path_factory.mktemp("trainings"))[0]


def started(training: Training, whole: Training) -> subprocess.Popen[str]:
    """A training that has written a checkpoint."""
    training.prepare(whole.work / "features")
    process = training.start()
    end = time.monotonic() + 600
    while time.monotonic() < end:
        if (training.work / "checkpoints" / "latest.json").is_file():
            return process
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError("no checkpoint in ten minutes")


def test_kills_change_nothing(whole: Training) -> None:
    found = kill_and_compare(whole, kills=3, seconds=12, seed=3)
    ends = found["ends"]
    assert found == {"kills": 3, "ends": ends, "same_weights": ends, "same_metrics": ends, "one_run": ends}


def test_sigterm_saves_and_the_same_command_goes_on(whole: Training) -> None:
    training = replace(whole, work=whole.work.with_name("terminated"))
    process = started(training, whole)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate()
    assert process.returncode == 75, said
    assert said.splitlines()[-1].startswith("stopped: SIGTERM came; step ")
    assert training.query("select status from runs") == [("KILLED",)]
    training.finish()
    assert training.weights == whole.weights
    assert training.validation() == whole.validation()
    assert training.query("select status from runs") == [("FINISHED",)]


def _ranks(process: subprocess.Popen[str]) -> dict[int, int]:
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


def test_torchrun_starts_lost_ranks_again_and_they_go_on(whole: Training, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

    class OnTwoRanks(Training):
        @property
        def command(self) -> list[str]:
            return [*torchrun, "--max-restarts", "1", *super().command[1:]]

    training = OnTwoRanks(whole.log, tmp_path / "work")
    process = started(training, whole)
    os.kill(_ranks(process)[1], signal.SIGKILL)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert "local_rank: 1" in said, "torchrun names it"
    assert "model: " in said
    assert training.query("select status from runs") == [("FINISHED",)]
    steps = training.query("select max(step) from metrics where key = 'train/learning_rate'")
    assert steps == whole.query("select max(step) from metrics where key = 'train/learning_rate'")
    assert len(training.validation()) == len(whole.validation())
