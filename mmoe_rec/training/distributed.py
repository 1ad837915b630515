"""The process group that all ranks of a training form, and what becomes of it when one of them is lost."""

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

# Loggers that write of the planner's estimates and of tracing, on which a user cannot act. The plan is given as text.
NOISY_LOGGERS = ("torchrec.distributed.planner", "torch.fx._symbolic_trace")
_SECONDS_TO_LET_GO = 0.05
_DAYS_FOR_FEATURES = timedelta(days=7)
_SIGNS_OF_LOSS = ("gloo", "connection", "timed out", "timeout", "nccl", "socket")


@dataclass(frozen=True)
class RankContext:
    """This process among those that train together."""

    rank: int
    world_size: int
    store: Any

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes down what is common to all."""
        return self.rank == 0

    def run_on_first_rank(self, work: Callable[[], str]) -> str:
        """Rank 0 does the work, however long it takes; the others wait for it. Returns its result on all.

        Raises UserError on all of them if it failed: where it had a sentence for the user, they raise the same.
        """
        if not self.is_first:
            self.store.wait(["first"], _DAYS_FOR_FEATURES)
            outcome = json.loads(self.store.get("first"))
            if (failure := outcome["failure"]) is not None:
                raise UserError(failure)
            return str(outcome["result"])
        result, failure = None, "rank 0 has failed; its own message says why"
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
    """The device and the process group of a training. Raises UserError for what this machine does not offer."""
    device, ranks = pick_device(settings.device), int(os.environ.get("WORLD_SIZE", "1"))
    check_sharding(settings.sharding, device.type)
    if choose_table_backend(settings.table_backend, device.type, ranks) == "torch" and settings.sharding != "auto":
        raise UserError(
            f"training.sharding is {settings.sharding}, and training.table_backend is torch, which spreads no "
            "tables. Set one "
            "of them to auto."
        )
    choose_matmul_backend(settings.matmul_backend, device.type)
    with process_group(device, settings.timeout_minutes) as group:
        yield device, group


@contextlib.contextmanager
def process_group(device: torch.device, timeout_minutes: float = 10) -> Iterator[RankContext]:
    """Joins torchrun's ranks, or forms a group of one without torchrun. gloo on CPU, nccl on CUDA; left at the end.

    timeout_minutes: how long a rank waits for the others in an exchange. Raises UserError where other ranks are lost.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store: Any = dist.HashStore()
    rank, world_size = 0, 1
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timedelta(minutes=30)))
        # When torchrun starts lost ranks again, its store still holds the addresses of those before.
        store = dist.PrefixStore(f"start{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    ranks = RankContext(rank, world_size, store)
    timeout = timedelta(minutes=timeout_minutes)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    try:
        quiet = quiet_loggers(dict.fromkeys(NOISY_LOGGERS, logging.CRITICAL))
        with quiet, _explain_loss(ranks):
            yield ranks
    finally:
        # Without both, a rank can abort at exit: a thread of gloo that still has to release the last tensors needs the
        # interpreter's lock for it, and is killed in the middle. Sleeping gives it the lock.
        dist.destroy_process_group()
        time.sleep(_SECONDS_TO_LET_GO)


@contextlib.contextmanager
def _explain_loss(ranks: RankContext) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        if ranks.world_size == 1 or not any(sign in text for sign in _SIGNS_OF_LOSS):
            raise
        reason = first_line(error)
        raise UserError(
            f"another of {ranks.world_size} ranks ended or gave no answer, so rank {ranks.rank} can't go on. Read its "
            f"own output, then go on with --resume ({reason})."
        ) from error
