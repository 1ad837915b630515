"""Ranks killed at any moment and resumed in other numbers read every row exactly once an epoch."""

import json
import random
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.batches.encoded_files import consume, write
from tests.fork_server import Command, call
from tests.processes import until

EPOCHS = 2
FILES = [[90, 41, 7], [66, 0, 120], [35], [80, 80, 80, 1]]


def start(folder: Path, stage: int, world_size: int, options: dict[str, Any]) -> list[Command]:
    ranks = []
    for rank in range(world_size):
        work = partial(consume, **options, rank=rank, world_size=world_size)
        ranks.append(call(work, folder / "rows", folder / f"{stage}.{rank}"))
    return ranks


def batches(folder: Path, stage: int, rank: int) -> list[dict[str, Any]]:
    """What a rank has written; the kill may have left half a line."""
    file = folder / f"{stage}.{rank}"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def kill(folder: Path, stage: int, ranks: list[Command], chance: random.Random) -> None:
    """Kills all ranks, in any order, some time after each has written some batches."""
    least = chance.randint(1, 25)
    until(lambda: min(len(batches(folder, stage, rank)) for rank in range(len(ranks))) >= least, pause=0.002)
    for process in chance.sample(ranks, len(ranks)):
        time.sleep(chance.uniform(0, 0.02))
        process.kill()
    for process in ranks:
        process.wait(60)
    assert -signal.SIGKILL in [process.returncode for process in ranks]


@pytest.mark.parametrize("seed", range(5))
def test_killed_and_resumed_with_other_world_sizes(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    total = write(tmp_path / "rows", FILES)
    options = {"seed": seed, "shuffle_window": 200, "epochs": EPOCHS, "position": None}
    seen: list[tuple[int, int]] = []  # epoch, row
    for stage, world_size in enumerate((2, 1, 3)):
        last = stage == 2
        pace = {"batch_size": chance.choice([12, 13, 16]), "pause": 0 if last else 0.005}
        running = start(tmp_path, stage, world_size, options | pace)
        if last:
            assert [process.wait(60) for process in running] == [0] * world_size
        else:
            kill(tmp_path, stage, running, chance)
        # A checkpoint holds what all ranks have done: what one has read beyond that is read again.
        ranks = [batches(tmp_path, stage, rank) for rank in range(world_size)]
        done = min(len(each) for each in ranks)
        assert done
        for together in zip(*(each[:done] for each in ranks), strict=True):
            after = together[0]["position"]
            assert all(one["position"] == after for one in together)
            seen += [(after["epoch"], row) for one in together for row in one["rows"]]
        options["position"] = ranks[0][done - 1]["position"]
        assert last == (options["position"]["epoch"] == EPOCHS - 1 and options["position"]["row"] == total)
    assert sorted(seen) == [(epoch, row) for epoch in range(EPOCHS) for row in range(total)]
