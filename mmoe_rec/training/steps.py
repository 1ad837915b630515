"""Training steps in torchrec's pipeline, which sends the IDs of the next batch while a batch is trained on.

For each batch, the pipeline calls `StepRunner.zero_grad` and `StepRunner._forward`. The pipeline then runs the backward
pass, which updates the tables, and calls `StepRunner.step`.

The CPU queues operations, and the GPU runs them. While the CPU waits for a result, it queues nothing, and the GPU
becomes idle. In a step, the CPU therefore waits only once, in `StepRunner.step`. With several ranks, torchrec's
pipeline also waits for the numbers of IDs to exchange, one step ahead. `tests/gpu/test_device.py` counts the waits.
"""

import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from mmoe_rec.atomic import write_text
from mmoe_rec.batches.batch import Batch, seeded_draws
from mmoe_rec.devices import fp32_matmul_precision, keeping_freed_memory
from mmoe_rec.errors import StopRequest, UserError
from mmoe_rec.model.mmoe import Mixture, Outputs
from mmoe_rec.model.model_layout import ModelLayout
from mmoe_rec.model.routing import Routing, balance_loss, expert_loads, z_loss
from mmoe_rec.settings.training import Training
from mmoe_rec.training.losses import log_variances, masked_loss
from mmoe_rec.training.sharding import ShardedModel


@dataclass
class StepResult:
    """Result of a training step on a batch of B rows and T tasks.

    Attributes:
        batch: The batch of this rank.
        logits: Logits, shape (B, T).
        losses: Sum of each task's losses on this rank, shape (T,).
        observed: Number of each task's observed labels on this rank, or the sum of the rows' weights, shape (T,).
        stop_and_nonfinite: Number of ranks that were asked to stop, and number of ranks with nonfinite logits. Shape
            (2,).
        stop_requested: Whether any rank was asked to stop.
        nonfinite: "loss" or "gradient", the value that is not finite on some rank. Else None. If set, the step has not
            updated the dense part (all weights except tables).
    """

    batch: Batch
    logits: Tensor
    losses: Tensor
    observed: Tensor
    stop_and_nonfinite: Tensor
    stop_requested: bool = False
    nonfinite: Literal["loss", "gradient"] | None = None


class StepRunner:
    """Runs training steps on all ranks together, one batch per step and rank.

    Args:
        sharded: Sharded model.
        optimizer: `Optimizers` of the model. Initial learning rates are the peak rates of the schedule.
        layout: Layout of the model.
        device: Device of this rank.
        bf16: Whether matmuls are in bf16.
        max_grad_norm: Maximum norm of the gradient of the dense part. Larger gradients are scaled down.
        stop: Signal to stop, which is read at each step.
    """

    def __init__(
        self,
        sharded: ShardedModel,
        optimizer: Any,
        layout: ModelLayout,
        device: torch.device,
        *,
        bf16: bool,
        max_grad_norm: float,
        stop: StopRequest,
    ) -> None:
        self._model, self._optimizer, self._layout = sharded.model, optimizer, layout
        self._device, self._bf16, self._max_grad_norm, self._stop = device, bf16, max_grad_norm, stop
        self._mixture: Mixture = sharded.model.module.mixture
        self._gates = self._mixture.gates[0].settings  # The gates of all levels have the same settings.
        self._peak_rates = [group["lr"] for group in optimizer.param_groups]
        self._lr_fraction = 1.0
        self._loads: list[Tensor] = []
        self._parameters = list(sharded.dense_parameters().values())
        self._world_size = dist.get_world_size()
        self._result: StepResult | None = None
        self._pipeline: Any = None
        if sharded.pipelined:
            from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

            self._pipeline = TrainPipelineSparseDist(
                sharded.model, self, device, execute_all_batches=True, custom_model_fwd=self._forward
            )

    def run_next(self, batches: Iterator[Batch], lr_fraction: float) -> StepResult | None:
        """Train on the next batch. Return None after the last batch. All ranks must call this together.

        Args:
            batches: Batches of this rank. The pipeline reads two batches ahead.
            lr_fraction: Learning rate as a fraction of the peak rate.
        """
        self._lr_fraction = lr_fraction
        for group, peak in zip(self._optimizer.param_groups, self._peak_rates, strict=True):
            group["lr"] = peak * lr_fraction
        try:
            with fp32_matmul_precision("tf32", self._device):
                step: StepResult = (self._pipeline or self).progress(batches)
        except StopIteration:
            return None
        return step

    def progress(self, batches: Iterator[Batch]) -> StepResult:
        """Run a step without torchrec's pipeline, in place of the pipeline's method of this name."""
        batch = next(batches)
        if self._device.type != "cpu":
            batch = batch.to(self._device, non_blocking=True)
        self.zero_grad()
        loss, step = self._forward(batch)
        loss.backward()
        self.step()
        return step

    def detach(self) -> None:
        """After `run_next` has returned None, let the model be called directly, until the next `run_next`."""
        if self._pipeline is not None:
            self._pipeline.detach()

    def zero_grad(self) -> None:
        """Clear the gradients. The pipeline calls it before the forward pass."""
        self._optimizer.zero_grad()

    def _forward(self, batch: Batch) -> tuple[Tensor, StepResult]:
        observed = batch.observed_weights
        # Rows without labels don't count, such as the copies that fill the last batch of an epoch.
        counted = batch.observed.any(1).float()
        # `new_full` only queues an operation on the GPU. `torch.tensor` would copy from the host and wait for the GPU.
        signaled = observed.new_full((1,), int(self._stop.signal is not None))
        shared = torch.cat([observed, counted.sum()[None].to(observed), signaled])
        reduced = self._all_reduce(shared)  # The ranks add these sums during the forward pass.
        autocast = torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16)
        with autocast, seeded_draws(batch):
            outputs: Outputs = self._model(batch)
        logits = outputs.logits
        nonfinite = (~logits.isfinite().all()).float()
        balanced = outputs.routings if self._gates.balance != "none" else ()
        # A load is the fraction of rows that use an expert. Multiplied by the number of rows, the loads of several
        # ranks can be added.
        loads = [counted.sum() * expert_loads(routing, counted) for routing in balanced]
        sums = torch.cat([nonfinite[None], *loads])
        for work in (reduced, self._all_reduce(sums)):
            if work is not None:
                work.wait()
        nonfinite = sums[0]
        rows = shared[-2].float().clamp(min=1)
        self._loads = list((sums[1:] / rows).split([len(load) for load in loads]))
        total, losses = masked_loss(
            logits,
            batch.labels,
            batch.observed,
            tasks=self._layout.tasks,
            global_counts=shared[:-2],
            world_size=self._world_size,
            weights=batch.weights,
            log_variances=log_variances(self._model.module),
        )
        total = total + self._balance_loss(outputs.routings, counted * (self._world_size / rows))
        self._result = StepResult(batch, logits, losses, observed, torch.stack([shared[-1].float(), nonfinite]))
        return total, self._result

    def step(self) -> None:
        """Update the dense part, unless a loss or gradient isn't finite on some rank."""
        step = self._result
        assert step is not None
        # The norm is the same on all ranks, because gradients of the dense part are already averaged over ranks.
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm)
        flags = torch.cat([step.stop_and_nonfinite, (~norm.isfinite()).float()[None]])
        step.stop_requested, nonfinite_loss, nonfinite_gradient = (flags > 0).tolist()
        step.nonfinite = "loss" if nonfinite_loss else "gradient" if nonfinite_gradient else None
        if step.nonfinite is not None:
            return
        self._optimizer.step()
        for level, gates in enumerate(self._mixture.gates):
            gates.advance_ramp(self._gates.ramp_steps)
            if self._gates.balance == "bias":
                # The loads of one step are noisy, so bias changes become smaller with the learning rate.
                gates.update_selection_bias(self._loads[level], self._gates.bias_rate * self._lr_fraction)

    def _balance_loss(self, routings: Sequence[Routing], row_weights: Tensor) -> Tensor | float:
        """Return the weighted sum of the gates' balance loss and z-loss, each a mean over the levels of experts."""
        gates, total = self._gates, 0.0
        if gates.balance == "loss":
            pairs = zip(routings, self._loads, strict=True)
            total += gates.balance_weight * sum(balance_loss(*pair, row_weights) for pair in pairs) / len(routings)
        if gates.z_loss > 0:
            total += gates.z_loss * sum(z_loss(routing, row_weights) for routing in routings) / len(routings)
        return total

    def _all_reduce(self, values: Tensor) -> Any:
        """Start to sum values over all ranks, in place. Return a handle with `wait`, or None if there is one rank."""
        return dist.all_reduce(values, async_op=True) if self._world_size > 1 else None


# The schedule of a run: learning rates, the steps after which to validate, and the end under `epochs: auto`.


def learning_rate_fraction(step: int, total: int, warmup_fraction: float) -> float:
    """Return the fraction of the peak learning rate: linear warmup, then a cosine to 1% (Loshchilov & Hutter, 2017).

    Args:
        step: Number of completed steps of the cycle. A cycle is an epoch under `epochs: auto`, else the run.
        total: Number of steps of a cycle.
        warmup_fraction: Fraction of the steps in which the learning rate rises.
    """
    warmup = math.ceil(total * warmup_fraction)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def validation_steps(batches_per_epoch: int, settings: Training) -> set[int]:
    """Return the steps after which to validate. They include the last step of each epoch.

    Args:
        batches_per_epoch: Batches of an epoch.
        settings: Settings of the training.
    """
    parts = min(settings.validations_per_epoch, batches_per_epoch)
    return {
        epoch * batches_per_epoch + round(batches_per_epoch * part / parts)
        for epoch in range(settings.max_epochs)
        for part in range(1, parts + 1)
    }


MIN_GAIN = 0.0005
"""Relative gain of the monitored metric above which `training.epochs: auto` adds another epoch."""


def has_improved(values: Mapping[int, float], start: int) -> bool:
    """Return whether a validation after step `start` is better than all earlier ones, by more than `MIN_GAIN`.

    Args:
        values: Step -> value of the monitored metric. Higher values are better.
        start: Last step of the earlier validations. If there are none, the result is True.
    """
    before = [value for step, value in values.items() if step <= start]
    return not before or max(values.values()) - max(before) > MIN_GAIN * abs(max(before))


# Choice of the precision: bf16 if steps are clearly faster in bf16 on this device. Steps in both precisions are timed
# in turns. The time of a precision is the fastest step of each rank, and then the maximum over ranks.

TIMING_SECONDS = 0.025  # Total duration of timing, without the first step of each precision.
MIN_TIMED_RUNS = 3
MIN_BF16_SPEEDUP = 1.2  # Choose bf16 if a step in fp32 takes at least this many times as long.
_TIMED_OPERATIONS = 1.6e9  # Limits the rows of a timed step. So many FLOPs take some milliseconds on two cores.
_FIRST_ROWS = 64
_MAX_SLOWDOWN = 4.0  # Choose fp32 at once if bf16 takes over this many times as long on a few rows (emulated bf16).

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class PrecisionChoice:
    """Precision of a run.

    Attributes:
        precision: Precision of matmuls.
        step_ms: Precision -> milliseconds of a step on the slowest rank. Empty if the settings name a precision.
    """

    precision: Precision
    step_ms: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        slower = [f"{name} {time:.1f}" for name, time in self.step_ms.items() if name != self.precision]
        times = f" ({self.step_ms[self.precision]:.1f} ms, {', '.join(slower)})" if slower else ""
        return f"{self.precision}{times}"


def read_precision_choice(file: Path) -> PrecisionChoice | None:
    """Read the precision that all runs of a comparison share. Return None if no run has chosen one yet.

    Raises:
        UserError: The file is damaged.
    """
    try:
        return TypeAdapter(PrecisionChoice).validate_json(file.read_bytes()) if file.exists() else None
    except ValidationError:
        raise UserError(f"'{file}' is damaged. Remove it, and the precisions are timed again") from None


def write_precision_choice(file: Path, precision_choice: PrecisionChoice) -> None:
    """Write the precision that the first run of a comparison has chosen, for `read_precision_choice` in later runs.

    Args:
        file: JSON file to write.
        precision_choice: Choice of the first run.
    """
    write_text(file, json.dumps(asdict(precision_choice), indent=1))


def choose_precision(mixture: Mixture, layout: ModelLayout, device: torch.device, rows: int) -> PrecisionChoice:
    """Time steps of a model's dense part in both precisions, and choose one. All ranks must call this together.

    Args:
        mixture: Dense part of the model, which stays unchanged.
        layout: Layout of the model.
        device: Device to train on.
        rows: Rows of a rank's batch, an upper limit on the rows of a timed step.
    """
    mixture = copy.deepcopy(mixture).to(device)
    weights = sum(parameter.numel() for parameter in mixture.parameters())
    rows = int(min(rows, max(_FIRST_ROWS, _TIMED_OPERATIONS // (6 * max(1, weights)))))
    generator = torch.Generator().manual_seed(0)
    widths = layout.width(placement=False), layout.width(placement=True)
    inputs = [torch.randn(rows, width, generator=generator).to(device) for width in widths]

    def time_both(rows: int, seconds: float) -> dict[str, float]:
        steps = {name: partial(_dense_step, mixture, [x[:rows] for x in inputs], name) for name in get_args(Precision)}
        times = time_alternatives(steps, seconds, torch.cuda.synchronize if device.type == "cuda" else lambda: None)
        slowest = torch.tensor(list(times.values()), dtype=torch.float64, device=device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return dict(zip(times, slowest.tolist(), strict=True))

    with torch.random.fork_rng([device] if device.type == "cuda" else []), keeping_freed_memory():  # as in training
        times = time_both(_FIRST_ROWS, 0)
        if times["bf16"] <= _MAX_SLOWDOWN * times["fp32"]:
            times = time_both(rows, TIMING_SECONDS)
    return PrecisionChoice("bf16" if times["fp32"] >= MIN_BF16_SPEEDUP * times["bf16"] else "fp32", times)


def _dense_step(mixture: Mixture, inputs: list[Tensor], precision: Precision) -> None:
    dense, placement = (values.detach().requires_grad_() for values in inputs)
    with torch.autocast(dense.device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits: Tensor = mixture(dense, placement).logits
    weights = [parameter for parameter in mixture.parameters() if parameter.requires_grad]
    torch.autograd.grad(logits.float().square().mean(), [dense, *weights], allow_unused=True)


def time_alternatives(
    options: Mapping[str, Callable[[], object]], seconds: float, synchronize: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Return the milliseconds of the fastest run of each alternative, by name.

    The alternatives run in turns, at least `MIN_TIMED_RUNS` times each. The first run of each doesn't count, because
    libraries initialize themselves at the first call.

    Args:
        options: Functions to time, by name.
        seconds: Total duration of timing.
        synchronize: Function that waits until the device has finished its work.
    """
    for run in options.values():
        run()
        synchronize()
    fastest = dict.fromkeys(options, math.inf)
    begun, turns = time.perf_counter(), 0
    while turns < MIN_TIMED_RUNS or time.perf_counter() - begun < seconds:
        for name, run in options.items():
            started = time.perf_counter()
            run()
            synchronize()
            fastest[name] = min(fastest[name], time.perf_counter() - started)
        turns += 1
    return {name: 1000 * shortest for name, shortest in fastest.items()}
