"""Training steps in torchrec's pipeline: while a batch is trained on, the ids of the next one are on their way already.

The pipeline calls back in this order: `zero_grad`, `_forward`, and `step` after its backward pass, in which tables are
updated.

A GPU works through what the host has queued, and stands still whenever the host first waits for it and then queues the
next. So the host waits for the device in these places only:

- once a step, `StepRunner.step` reads whether loss and gradient are finite and whether a rank was asked to stop;
- torchrec's pipeline, with several ranks: how many ids they send each other, on a stream of its own, a step ahead;
- every `STEPS_BETWEEN_LOGS` steps `Meter.read` and the learnt task weights;
- a validation reads the logits of each batch, with several ranks also whether one was asked to stop, and its sums;
- a checkpoint is written;
- the first use of each number that a device keeps from then on (`mmoe_rec.devices.constant`).

`tests/gpu/test_device.py` counts them.
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
    """A batch that was trained on.

    Attributes:
        batch: The batch.
        logits: Logits. Shape (B, T).
        losses: Sums of the tasks' losses on this rank. Shape (T,).
        observed: Labels that the losses cover, or their weights. Shape (T,).
        signals: Above 0: a rank was asked to stop, a loss is not finite on some rank. Shape (2,).
        stop_requested: Whether any rank was asked to stop.
        bad: What is not finite on some rank, "loss" or "gradient". Then the dense part was not updated.
    """

    batch: Batch
    logits: Tensor
    losses: Tensor
    observed: Tensor
    stop_and_nonfinite: Tensor
    stop_requested: bool = False
    nonfinite: str | None = None


class StepRunner:
    """Trains on batches, one a step, all ranks together.

    optimizer: of all parameters, with peak learning rates; bf16: whether products are in bf16; max_grad_norm: largest
    norm of the dense part's gradient; stop: asked at each step.
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
        self._device, self._bf16, self._clip, self._stop = device, bf16, max_grad_norm, stop
        self._mixture: Mixture = sharded.model.module.mixture
        self._gates = self._mixture.gates[0].settings  # those of all levels
        self._peaks = [group["lr"] for group in optimizer.param_groups]
        self._share = 1.0
        self._loads: list[Tensor] = []
        self._parameters = list(sharded.dense_parameters().values())
        self._ranks = dist.get_world_size()
        self._now: StepResult | None = None
        self._pipeline: Any = None
        if sharded.pipelined:
            from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

            self._pipeline = TrainPipelineSparseDist(
                sharded.model, self, device, execute_all_batches=True, custom_model_fwd=self._forward
            )

    def run_next(self, batches: Iterator[Batch], lr_fraction: float) -> StepResult | None:
        """Trains on the next batch, at a share of the peak learning rates; None after the last one.

        It looks two batches ahead. A collective call.
        """
        self._share = lr_fraction
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * lr_fraction
        try:
            with fp32_matmul_precision("tf32", self._device):
                step: StepResult = (self._pipeline or self).progress(batches)
        except StopIteration:
            return None
        return step

    def progress(self, batches: Iterator[Batch]) -> StepResult:
        """The order of the pipeline's calls where no ids are to be sent ahead: without tables, or other ranks."""
        batch = next(batches)
        if self._device.type != "cpu":
            batch = batch.to(self._device, non_blocking=True)
        self.zero_grad()
        loss, step = self._forward(batch)
        loss.backward()
        self.step()
        return step

    def detach(self) -> None:
        """Gives the model back to other uses, once `next` has given None; `next` takes it again."""
        if self._pipeline is not None:
            self._pipeline.detach()

    def zero_grad(self) -> None:
        """Clears the gradients; the pipeline calls it before the forward pass."""
        self._optimizer.zero_grad()

    def _forward(self, batch: Batch) -> tuple[Tensor, StepResult]:
        observed = batch.observed_weights
        # The copies that stretch an epoch's last batch have no labels.
        counted = batch.observed.any(1).float()
        # Queued, where a tensor of it would be copied.
        signalled = observed.new_full((1,), int(self._stop.signal is not None))
        shared = torch.cat([observed, counted.sum()[None].to(observed), signalled])
        added = self._add_up(shared)  # beside the forward pass
        autocast = torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16)
        with autocast, seeded_draws(batch):
            outputs: Outputs = self._model(batch)
        logits = outputs.logits
        bad = (~logits.isfinite().all()).float()
        balanced = outputs.routings if self._gates.balance != "none" else ()
        # Of all levels, one after the other, times the rows that they are of: so they may be added up over ranks.
        loads = [counted.sum() * expert_loads(each, counted) for each in balanced]
        found = torch.cat([bad[None], *loads])
        for each in (added, self._add_up(found)):
            if each is not None:
                each.wait()
        bad = found[0]
        rows = shared[-2].float().clamp(min=1)
        self._loads = list((found[1:] / rows).split([len(each) for each in loads]))
        total, losses = masked_loss(
            logits,
            batch.labels,
            batch.observed,
            tasks=self._layout.tasks,
            global_counts=shared[:-2],
            world_size=self._ranks,
            weights=batch.weights,
            log_variances=log_variances(self._model.module),
        )
        total = total + self._balance_loss(outputs.routings, counted * (self._ranks / rows))
        self._now = StepResult(batch, logits, losses, observed, torch.stack([shared[-1].float(), bad]))
        return total, self._now

    def step(self) -> None:
        """Step the dense part, unless a loss or gradient is not finite on some rank.

        The pipeline calls it after the backward pass, in which the tables were updated.
        """
        step = self._now
        assert step is not None
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)  # the same on all ranks
        told = torch.cat([step.stop_and_nonfinite, (~norm.isfinite()).float()[None]])
        step.stop_requested, bad_loss, bad_gradient = (told > 0).tolist()
        step.nonfinite = "loss" if bad_loss else "gradient" if bad_gradient else None
        if step.nonfinite is not None:
            return
        self._optimizer.step()
        for level, gates in enumerate(self._mixture.gates):
            gates.advance_ramp(self._gates.ramp_steps)
            if self._gates.balance == "bias":
                # It comes to rest with the learning rate, as the loads of one step are noisy.
                gates.update_selection_bias(self._loads[level], self._gates.bias_rate * self._share)

    def _balance_loss(self, routings: Sequence[Routing], shares: Tensor) -> Tensor | float:
        """What keeps experts in use: the mean over levels of the weighted balance loss and z-loss.

        shares: (B,) float32, how much each row counts.
        """
        gates, total = self._gates, 0.0
        if gates.balance == "loss":
            pairs = zip(routings, self._loads, strict=True)
            total += gates.balance_weight * sum(balance_loss(*pair, shares) for pair in pairs) / len(routings)
        if gates.z_loss > 0:
            total += gates.z_loss * sum(z_loss(routing, shares) for routing in routings) / len(routings)
        return total

    def _add_up(self, values: Tensor) -> Any:
        """Begins to add up over all ranks, in place; None with one."""
        return dist.all_reduce(values, async_op=True) if self._ranks > 1 else None


# When learning rates rise and fall, and when validation rows are scored.


def learning_rate_fraction(step: int, total: int, warmup_fraction: float) -> float:
    """Share of the peak learning rate at a step: linear rise, then a cosine down to 1% (Loshchilov & Hutter 2017)."""
    warmup = math.ceil(total * warmup_fraction)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def validation_steps(batches_per_epoch: int, settings: Training) -> set[int]:
    """Numbers of steps after which to validate, the last step of each epoch among them."""
    parts = min(settings.validations_per_epoch, batches_per_epoch)
    return {
        epoch * batches_per_epoch + round(batches_per_epoch * part / parts)
        for epoch in range(settings.epochs)
        for part in range(1, parts + 1)
    }


# The precision that a run computes in: bf16 if steps of the model's own shapes are clearly faster with it.
#
# Processors that have bf16 take a quarter of fp32's time with it, or more than fp32. So steps in both precisions are
# timed in turns. The fastest step of each precision counts, and ranks decide together, by the slowest of them.


TIMING_SECONDS = 0.025  # to time steps for, besides the first step of each precision
MIN_TIMED_RUNS = 3
MIN_BF16_SPEEDUP = 1.2  # bf16 is taken if fp32 takes this many times as long
_OPERATIONS = 1.6e9  # floating-point operations of a timed step: some milliseconds in fp32 on two cores
_FIRST_ROWS = 64
_HOPELESS = 4.0  # bf16 that takes this many times as long as fp32 for a few rows is emulated, and not tried on more

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class PrecisionChoice:
    """The precision of a run.

    Attributes:
        precision: The precision of matmuls.
        step_ms: Milliseconds of a step in each precision, on the slowest rank. Empty if the settings have one.
    """

    precision: Precision
    step_ms: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        others = [f"{name} {time:.1f}" for name, time in self.step_ms.items() if name != self.precision]
        times = f" ({self.step_ms[self.precision]:.1f} ms, {', '.join(others)})" if others else ""
        return f"{self.precision}{times}"


def read_precision_choice(file: Path) -> PrecisionChoice | None:
    """Read the choices that the runs of a comparison share. Returns None if no run has made them.

    Raises:
        UserError: The file is damaged.
    """
    try:
        return TypeAdapter(PrecisionChoice).validate_json(file.read_bytes()) if file.exists() else None
    except ValidationError:
        raise UserError(f"'{file}' is damaged: remove it, and the choices are measured again") from None


def write_precision_choice(file: Path, precision_choice: PrecisionChoice) -> None:
    """Keep choices for further runs of a comparison."""
    write_text(file, json.dumps(asdict(precision_choice), indent=1))


def choose_precision(mixture: Mixture, layout: ModelLayout, device: torch.device, rows: int) -> PrecisionChoice:
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
        times = time_alternatives(steps, seconds, torch.cuda.synchronize if device.type == "cuda" else lambda: None)
        slowest = torch.tensor(list(times.values()), dtype=torch.float64, device=device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return dict(zip(times, slowest.tolist(), strict=True))

    with torch.random.fork_rng([device] if device.type == "cuda" else []), keeping_freed_memory():  # as in training
        times = time_both(_FIRST_ROWS, 0)
        if times["bf16"] <= _HOPELESS * times["fp32"]:
            times = time_both(rows, TIMING_SECONDS)
    return PrecisionChoice("bf16" if times["fp32"] >= MIN_BF16_SPEEDUP * times["bf16"] else "fp32", times)


def _step(mixture: Mixture, inputs: list[Tensor], precision: Precision) -> None:
    """Run the forward and backward pass of the dense part."""
    given, placement = (each.detach().requires_grad_() for each in inputs)
    with torch.autocast(given.device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits: Tensor = mixture(given, placement).logits
    weights = [each for each in mixture.parameters() if each.requires_grad]
    torch.autograd.grad(logits.float().square().mean(), [given, *weights], allow_unused=True)


def time_alternatives(
    options: Mapping[str, Callable[[], object]], seconds: float, synchronize: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Return the milliseconds of each option's fastest run.

    Each option runs once before its time counts, because libraries prepare themselves at the first call. Then the
    options run in turns until `seconds` have passed, and at least `MIN_TIMED_RUNS` times.
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
