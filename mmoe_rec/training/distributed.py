"""The process group of a training run, and error messages if one of its processes (a rank) is lost."""

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mmoe_rec.devices import pick_device
from mmoe_rec.errors import UserError, first_line
from mmoe_rec.model.matmul import choose_matmul_backend
from mmoe_rec.progress import quiet_loggers
from mmoe_rec.settings.training import Training
from mmoe_rec.training.sharding import check_sharding
from mmoe_rec.training.table_backends import choose_table_backend

# Loggers to silence, because users can't act on the messages. `describe_plan` describes the sharding plan instead.
NOISY_LOGGERS = ("torchrec.distributed.planner", "torch.fx._symbolic_trace")
_SECONDS_TO_RELEASE = 0.05
_MAX_FIRST_RANK_TIME = timedelta(days=7)
_SIGNS_OF_LOSS = ("gloo", "connection", "timed out", "timeout", "nccl", "socket")


@dataclass(frozen=True)
class RankContext:
    """Rank of this process among the processes that train together.

    Attributes:
        rank: Number of this process, from 0.
        world_size: Number of processes.
        store: Key-value store (torch.distributed) that all processes share.
    """

    rank: int
    world_size: int
    store: Any

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes the files and prints for all ranks."""
        return self.rank == 0

    def run_on_first_rank(self, work: Callable[[], str]) -> str:
        """Call `work` on rank 0 and return its result on all ranks. It can be called only once for each `store`.

        Raises:
            UserError: `work` failed on rank 0. If it raised a UserError, all ranks raise the same UserError.
        """
        if not self.is_first:
            self.store.wait(["first"], _MAX_FIRST_RANK_TIME)
            outcome = json.loads(self.store.get("first"))
            if (failure := outcome["failure"]) is not None:
                raise UserError(failure)
            return str(outcome["result"])
        result, failure = None, "Rank 0 failed. Read its output for the reason."
        try:
            result, failure = work(), None
        except UserError as error:
            failure = str(error)
            raise
        finally:
            self.store.set("first", json.dumps({"result": result, "failure": failure}))
        return result


@contextlib.contextmanager
def training_process_group(settings: Training) -> Iterator[tuple[torch.device, RankContext]]:
    """Check settings, and join the process group within the context. Yield the device and the rank of this process.

    Raises:
        UserError: This machine can't train with the settings, or another rank was lost.
    """
    device, ranks = pick_device(settings.device), int(os.environ.get("WORLD_SIZE", "1"))
    check_sharding(settings.sharding, device.type)
    if choose_table_backend(settings.table_backend, device.type, ranks) == "torch" and settings.sharding != "auto":
        raise UserError(
            f"training.sharding is {settings.sharding}, but training.table_backend torch doesn't shard tables. Set "
            "either to auto."
        )
    choose_matmul_backend(settings.matmul_backend, device.type)
    with process_group(device, settings.timeout_minutes) as group:
        yield device, group


@contextlib.contextmanager
def process_group(device: torch.device, timeout_minutes: float = 10) -> Iterator[RankContext]:
    """Join torchrun's process group, or a group of one process without torchrun, and leave it at the end.

    The group's backend is gloo on CPUs and nccl on GPUs.

    Args:
        device: Device of this rank.
        timeout_minutes: Time that a rank waits for other ranks in a collective operation.

    Raises:
        UserError: Another rank was lost.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store: Any = dist.HashStore()
    rank, world_size = 0, 1
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timedelta(minutes=30)))
        # After a restart, torchrun's store still contains the addresses of the lost ranks, so use another prefix.
        store = dist.PrefixStore(f"start{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    ranks = RankContext(rank, world_size, store)
    timeout = timedelta(minutes=timeout_minutes)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    try:
        quiet = quiet_loggers(dict.fromkeys(NOISY_LOGGERS, logging.CRITICAL))
        with quiet, _explain_loss(ranks):
            yield ranks
    finally:
        # A gloo thread needs the interpreter's lock to release its last tensors, or the process aborts at its end.
        # Sleeping hands the lock to this thread.
        dist.destroy_process_group()
        time.sleep(_SECONDS_TO_RELEASE)


@contextlib.contextmanager
def _explain_loss(ranks: RankContext) -> Iterator[None]:
    """Turn torch's RuntimeError about a lost rank into a UserError."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        if ranks.world_size == 1 or not any(sign in text for sign in _SIGNS_OF_LOSS):
            raise
        reason = first_line(error)
        raise UserError(
            f"Another of {ranks.world_size} ranks ended or doesn't respond, so rank {ranks.rank} stops ({reason}). "
            "Read the output of that rank, then resume with --resume."
        ) from error
