"""The precision that a run computes in: bf16 if steps of the model's own shapes are clearly faster with it.

Processors that have bf16 take a quarter of fp32's time with it, or more than fp32. So steps in both precisions are
timed in turns. The fastest step of each precision counts, and ranks decide together, by the slowest of them.
"""

import copy
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.distributed as dist
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from mmoe_rec.atomic import write_text
from mmoe_rec.devices import freed_memory_kept
from mmoe_rec.errors import UserError
from mmoe_rec.model.mmoe import Mixture
from mmoe_rec.model.model_layout import ModelLayout

SECONDS = 0.025  # to time steps for, besides the first step of each precision
RUNS_AT_LEAST = 3
CLEARLY = 1.2  # bf16 is taken if fp32 takes this many times as long
_OPERATIONS = 1.6e9  # floating-point operations of a timed step: some milliseconds in fp32 on two cores
_FIRST_ROWS = 64
_HOPELESS = 4.0  # bf16 that takes this many times as long as fp32 for a few rows is emulated, and not tried on more

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Choices:
    """The precision of a run.

    Attributes:
        precision: The precision of matmuls.
        measured: Milliseconds of a step in each precision, on the slowest rank. Empty if the settings have one.
    """

    precision: Precision
    measured: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        others = [f"{name} {time:.1f}" for name, time in self.measured.items() if name != self.precision]
        times = f" ({self.measured[self.precision]:.1f} ms, {', '.join(others)})" if others else ""
        return f"{self.precision}{times}"


def read_choices(file: Path) -> Choices | None:
    """Read the choices that the runs of a comparison share. Returns None if no run has made them.

    Raises:
        UserError: The file is damaged.
    """
    try:
        return TypeAdapter(Choices).validate_json(file.read_bytes()) if file.exists() else None
    except ValidationError:
        raise UserError(f"'{file}' is damaged: remove it, and the choices are measured again") from None


def write_choices(file: Path, choices: Choices) -> None:
    """Keep choices for further runs of a comparison."""
    write_text(file, json.dumps(asdict(choices), indent=1))


def choose_precision(mixture: Mixture, layout: ModelLayout, device: torch.device, rows: int) -> Choices:
    """Time steps of a model in both precisions, and choose one. A collective call.

    Args:
        mixture: The dense part, as it will be trained. It stays as it is, and so do random states.
        layout: The model's layout.
        device: The device to train on.
        rows: Rows of a rank's batch.
    """
    mixture = copy.deepcopy(mixture).to(device)
    weights = sum(parameter.numel() for parameter in mixture.parameters())
    rows = int(min(rows, max(_FIRST_ROWS, _OPERATIONS // (6 * max(1, weights)))))
    generator = torch.Generator().manual_seed(0)
    widths = layout.width(placement=False), layout.width(placement=True)
    inputs = [torch.randn(rows, width, generator=generator).to(device) for width in widths]

    def time_both(rows: int, seconds: float) -> dict[str, float]:
        steps = {name: partial(_step, mixture, [each[:rows] for each in inputs], name) for name in get_args(Precision)}
        times = time_options(steps, seconds, torch.cuda.synchronize if device.type == "cuda" else lambda: None)
        slowest = torch.tensor(list(times.values()), dtype=torch.float64, device=device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return dict(zip(times, slowest.tolist(), strict=True))

    with torch.random.fork_rng([device] if device.type == "cuda" else []), freed_memory_kept():  # as in training
        times = time_both(_FIRST_ROWS, 0)
        if times["bf16"] <= _HOPELESS * times["fp32"]:
            times = time_both(rows, SECONDS)
    return Choices("bf16" if times["fp32"] >= CLEARLY * times["bf16"] else "fp32", times)


def _step(mixture: Mixture, inputs: list[Tensor], precision: Precision) -> None:
    """Run the forward and backward pass of the dense part."""
    given, placement = (each.detach().requires_grad_() for each in inputs)
    with torch.autocast(given.device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits: Tensor = mixture(given, placement).logits
    weights = [each for each in mixture.parameters() if each.requires_grad]
    torch.autograd.grad(logits.float().square().mean(), [given, *weights], allow_unused=True)


def time_options(
    options: Mapping[str, Callable[[], object]], seconds: float, synchronize: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Return the milliseconds of each option's fastest run.

    Each option runs once before its time counts, because libraries prepare themselves at the first call. Then the
    options run in turns until `seconds` have passed, and at least `RUNS_AT_LEAST` times.
    """
    for run in options.values():
        run()
        synchronize()
    fastest = dict.fromkeys(options, math.inf)
    begun, turns = time.perf_counter(), 0
    while turns < RUNS_AT_LEAST or time.perf_counter() - begun < seconds:
        for name, run in options.items():
            started = time.perf_counter()
            run()
            synchronize()
            fastest[name] = min(fastest[name], time.perf_counter() - started)
        turns += 1
    return {name: 1000 * shortest for name, shortest in fastest.items()}
