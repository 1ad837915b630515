"""A rank that is lost ends the others with its name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mmoe_rec.errors import UserError
from tests.training.ranks import join, spawn


def _leave_rank_0_alone(rank: int, world: int, port: int, folder: Path) -> None:
    try:
        with join(rank, world, port):
            if rank == 1:
                os._exit(0)
            dist.all_reduce(torch.ones(1))
    except UserError as error:
        (folder / "said").write_text(str(error))


def _fail_at_first(rank: int, world: int, port: int, folder: Path) -> None:
    def work() -> None:
        raise UserError("no log")

    try:
        with join(rank, world, port) as ranks:
            ranks.after_first(work)
    except UserError as error:
        (folder / f"said{rank}").write_text(str(error))


def test_a_lost_rank_is_named(tmp_path: Path) -> None:
    spawn(_leave_rank_0_alone, tmp_path)
    said = (tmp_path / "said").read_text()
    assert said.startswith("rank 1 of 2 ended or gave no answer; rank 0 can't go on alone: go on with --resume (")


def test_the_others_are_told_why_the_first_has_failed(tmp_path: Path) -> None:
    spawn(_fail_at_first, tmp_path)
    assert [(tmp_path / f"said{rank}").read_text() for rank in (0, 1)] == ["no log", "no log"]


def test_other_errors_pass_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    from mmoe_rec.training.ranks import process_group

    with pytest.raises(RuntimeError, match="of its own"), process_group(torch.device("cpu")):
        raise RuntimeError("gloo: an error of its own")
