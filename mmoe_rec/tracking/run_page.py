"""What a run's page in MLflow says of it: its name, a description, the rows that it read, and the machine meanwhile."""

import hashlib
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from mmoe_rec.settings.sections import Settings
from mmoe_rec.tracking.client import hide_password
from mmoe_rec.tracking.runs import Run

SECONDS_BETWEEN_SAMPLES = 10.0
_CONTEXTS = {"train": "training", "validation": "validation", "test": "test"}


def command() -> str:
    """The command line of this process, without passwords."""
    first, *words = sys.argv
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = None if spec is None else spec.name.removesuffix(".__main__")
    start = f"python -m {name}" if name else shlex.quote(Path(first).name)
    return hide_password(" ".join([start, *(shlex.quote(word) for word in words)]))


def name_training(settings: Settings, start: str | None = None) -> str:
    """What a training is called: until when its rows go, its start and its seed."""
    end = settings.split.train_end
    until = "" if end is None else f" until {end:%Y-%m-%d}"
    begun = "" if start is None else f" from {start}"
    return f"train{until}{begun}, seed {settings.training.seed}"


def data_sets(settings: Settings, manifest: Mapping[str, Any], *splits: str) -> list[dict[str, Any]]:
    """Splits of a log as the inputs of a run, by the manifest of its features.

    MLflow tells data sets apart by name and digest, so each split has a digest of its own.
    """
    sets, windows, by_column = [], settings.split.windows(), settings.split.by_column
    for split in splits:
        text = f"{manifest['digest']} {split} {windows[split]} {by_column} {settings.columns.weight}"
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        about = {"name": settings.name, "digest": digest, "source": str(manifest["log"]), "context": _CONTEXTS[split]}
        sets.append(about | {"rows": int(manifest["splits"][split]["rows"]), "split": split})
    return sets


def quoted(sentences: Iterable[str]) -> str:
    """Sentences as a list of Markdown."""
    return "\n".join(f"- {sentence}" for sentence in sentences)


def as_code(text: str) -> str:
    """A block of Markdown."""
    return f"```sh\n{text}\n```"


class MachineMonitor:
    """Logs metrics, and from time to time what the machine does meanwhile: `system/...`, as MLflow itself names it.

    MLflow's own monitor would talk to it beside the outbox, in which messages wait while it is away.
    """

    def __init__(self, run: Run, wanted: bool) -> None:
        self.run, self._next = run, math.inf
        if wanted and run.outbox is not None:
            self._next = 0.0
            sample_machine()  # the first load of processors is since nothing

    def __call__(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.run.log_metrics(metrics, step)
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + SECONDS_BETWEEN_SAMPLES
            self.run.log_metrics(sample_machine(), step)


def sample_machine() -> dict[str, float]:
    """Loads of processors, memory, disk, network (since the machine started) and GPUs, as far as they can be had."""
    import psutil
    import torch

    readers: dict[str, Callable[[], float]] = {
        "cpu_utilization_percentage": psutil.cpu_percent,
        "system_memory_usage_percentage": lambda: psutil.virtual_memory().percent,
        "system_memory_usage_megabytes": lambda: psutil.virtual_memory().used / 1e6,
        "disk_usage_percentage": lambda: psutil.disk_usage(os.sep).percent,
        "network_receive_megabytes": lambda: psutil.net_io_counters().bytes_recv / 1e6,
        "network_transmit_megabytes": lambda: psutil.net_io_counters().bytes_sent / 1e6,
    }
    for card in range(torch.cuda.device_count()):
        readers[f"gpu_{card}_utilization_percentage"] = partial(torch.cuda.utilization, card)
        readers[f"gpu_{card}_memory_usage_bytes"] = partial(torch.cuda.device_memory_used, card)
    values = {}
    for name, read in readers.items():
        with suppress(Exception):  # no training ends for want of a chart
            values[f"system/{name}"] = float(read())
    return values
