"""The training loop: one path for a laptop's CPU and for many GPUs.

Every rank runs a `Trainer` with the same arguments. Steps see the same global batches whatever the world size, tables
are updated by fused row-wise Adagrad within the backward pass, the dense part by AdamW.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mmoe_rec.batches.batch import Batch, make_batch
from mmoe_rec.batches.prefetch import Prefetch
from mmoe_rec.batches.reader import EncodedRows, TrainingReader
from mmoe_rec.devices import use_bf16
from mmoe_rec.features.build import Prepared
from mmoe_rec.features.layout import Layout
from mmoe_rec.model.mmoe import build_model
from mmoe_rec.model.tables import torchrec_tables
from mmoe_rec.progress import bar
from mmoe_rec.settings import Model, Training
from mmoe_rec.training.losses import masked_loss
from mmoe_rec.training.sharding import Sharded, save_checkpoint, shard
from mmoe_rec.training.validation import Validation, validate
from mmoe_rec.training.warm_start import WarmStart

STEPS_BETWEEN_LOGS = 25
LogMetrics = Callable[[dict[str, float], int], None]


@dataclass
class TrainingResult:
    """What a training gave. rows_per_s counts all ranks, without validation; waiting is the share of that time."""

    plan: str
    steps: int = 0
    rows_per_s: float = 0.0
    waiting: float = 0.0
    best_step: int = 0
    best: Validation | None = None
    history: list[tuple[int, Validation]] = field(default_factory=list)
    stopped_early: bool = False


class Trainer:
    """Trains one model; `run` leaves the best one's checkpoint in `best_folder`. Needs a process group.

    log_metrics: called with metrics and the step; on rank 0 it may write them down. warm_start: the weights to start
    from, by default random ones.

    Raises:
        UserError: the tables do not fit into memory, or encoded rows can't be read.
    """

    def __init__(
        self,
        prepared: Prepared,
        model_settings: Model,
        settings: Training,
        device: torch.device,
        best_folder: Path,
        log_metrics: LogMetrics,
        warm_start: WarmStart | None = None,
    ) -> None:
        self.settings, self.device = settings, device
        self.best_folder, self.log_metrics = best_folder, log_metrics
        self.layout: Layout = prepared.layout
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.reader = self._reader(prepared, "train", settings.batch_size)
        self.validation_reader = self._reader(prepared, "validation", max(settings.batch_size, 8192))
        rank_rows = math.ceil(settings.batch_size / self.world_size)
        model = build_model(
            self.layout, model_settings, torchrec_tables(self.layout, torch.device("meta")), settings.seed
        )
        if warm_start is not None:
            warm_start.fill_dense(model)
        self.sharded: Sharded = shard(
            model,
            self.layout,
            device,
            batch_size=rank_rows,
            table_learning_rate=settings.table_learning_rate,
            seed=settings.seed,
            first_rows=None if warm_start is None else warm_start.rows,
        )
        self.optimizer = _optimizer(self.sharded, settings)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.result = TrainingResult(self.sharded.plan)
        self.total_steps = settings.epochs * self.reader.batches_per_epoch
        self.validate_at = _validation_steps(self.reader.batches_per_epoch, settings)
        self.bf16 = use_bf16(settings.precision, device)

    def _reader(self, prepared: Prepared, split: str, batch_size: int) -> TrainingReader:
        return TrainingReader(
            EncodedRows(prepared.split(split), self.layout),
            batch_size=batch_size,
            shuffle_window=self.settings.shuffle_window,
            seed=self.settings.seed,
            rank=self.rank,
            world_size=self.world_size,
        )

    def _batches(self, reader: TrainingReader, epoch: int) -> Iterator[Batch]:
        for rows, position in reader.epoch(epoch):
            yield make_batch(rows.encoded, self.layout, rows.labels, position, torchrec=True)

    def run(self) -> TrainingResult:
        """Trains until the last step, or until patience runs out. A collective call."""
        torch.manual_seed(self.settings.seed + self.rank)
        meter = _Meter(self.layout, self.world_size)
        shown = bar("{task.fields[note]}") if self.rank == 0 else contextlib.nullcontext()
        with shown as progress:
            task = progress.add_task("training", total=self.total_steps, note="") if progress else None
            for epoch in range(self.settings.epochs):
                ahead = Prefetch(self._batches(self.reader, epoch))
                for batch in ahead:
                    losses, counts = self._step(batch)
                    meter.add(len(batch), losses, counts, ahead.waited)
                    self.result.steps += 1
                    if self.result.steps % STEPS_BETWEEN_LOGS == 0:
                        self._log(meter)
                    if progress is not None and task is not None:
                        progress.update(task, completed=self.result.steps, note=meter.note)
                    if self.result.steps in self.validate_at and self._validate_and_stop(meter):
                        break
                meter.next_epoch(ahead.waited)
                if self.result.stopped_early:
                    break
            if self.result.steps % STEPS_BETWEEN_LOGS:
                self._log(meter)
        self.result.rows_per_s, self.result.waiting = meter.rows_per_s, meter.waiting
        return self.result

    def _step(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        self._set_learning_rates()
        batch = batch.to(self.device, non_blocking=True)
        counts = batch.observed.sum(0)
        if self.world_size > 1:
            dist.all_reduce(counts)
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.sharded.model(batch)
        total, losses = masked_loss(
            logits,
            batch.labels,
            batch.observed,
            tasks=self.layout.tasks,
            global_counts=counts,
            world_size=self.world_size,
        )
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.sharded.dense_parameters().values(), self.settings.clip_gradient)
        self.optimizer.step()
        return losses, batch.observed.sum(0)

    def _set_learning_rates(self) -> None:
        share = learning_rate_share(self.result.steps, self.total_steps, self.settings.warmup_share)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * share

    def _log(self, meter: _Meter) -> None:
        metrics = meter.read()
        metrics["learning_rate"] = self.optimizer.param_groups[-1]["lr"]
        self.log_metrics(metrics, self.result.steps)

    def _validate_and_stop(self, meter: _Meter) -> bool:
        """Keeps the model if it is the best so far; True when patience has run out."""
        start = time.perf_counter()
        batches = Prefetch(self._batches(self.validation_reader, 0))
        found = validate(self.sharded.model.module, batches, self.layout, self.device)
        self.result.history.append((self.result.steps, found))
        self.log_metrics(found.flat(), self.result.steps)
        best = self.result.best
        select_by = self.settings.select_by
        if best is None or found.objective(select_by, self.layout) > best.objective(select_by, self.layout):
            self.result.best, self.result.best_step = found, self.result.steps
            save_checkpoint({"model": self.sharded.model.state_dict()}, self.best_folder)
        meter.leave_out(time.perf_counter() - start)
        since = sum(step > self.result.best_step for step, _ in self.result.history)
        self.result.stopped_early = since >= self.settings.patience and self.result.steps < self.total_steps
        return self.result.stopped_early


def _optimizer(sharded: Sharded, settings: Training) -> Any:
    from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper

    def adamw(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)

    return CombinedOptimizer([sharded.table_optimizer, KeyedOptimizerWrapper(sharded.dense_parameters(), adamw)])


def learning_rate_share(step: int, total: int, warmup_share: float) -> float:
    """Share of the peak learning rate at a step: linear rise, then a cosine down to 1% (Loshchilov & Hutter 2017)."""
    warmup = math.ceil(total * warmup_share)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _validation_steps(batches_per_epoch: int, settings: Training) -> set[int]:
    parts = min(settings.validations_per_epoch, batches_per_epoch)
    return {
        epoch * batches_per_epoch + round(batches_per_epoch * part / parts)
        for epoch in range(settings.epochs)
        for part in range(1, parts + 1)
    }


class _Meter:
    """Rows a second, the share of time spent waiting for data, and the mean loss per task since the last reading."""

    def __init__(self, layout: Layout, world_size: int) -> None:
        self.names = [task.name for task in layout.tasks]
        self.world_size = world_size
        self.note = ""
        self.start = time.perf_counter()
        self.rows = 0
        self.waited_before, self.waited_now, self.left_out = 0.0, 0.0, 0.0
        self._clear()

    def _clear(self) -> None:
        # Sums stay on the device until they are read: fetching them every step would make a GPU wait.
        self.losses: torch.Tensor | None = None
        self.counts: torch.Tensor | None = None

    def add(self, rows: int, losses: torch.Tensor, counts: torch.Tensor, waited: float) -> None:
        self.rows += rows * self.world_size
        self.waited_now = waited
        self.losses = losses if self.losses is None else self.losses + losses
        self.counts = counts if self.counts is None else self.counts + counts

    def next_epoch(self, waited: float) -> None:
        self.waited_before, self.waited_now = self.waited_before + waited, 0.0

    def leave_out(self, seconds: float) -> None:
        self.left_out += seconds

    @property
    def seconds(self) -> float:
        return max(1e-9, time.perf_counter() - self.start - self.left_out)

    @property
    def rows_per_s(self) -> float:
        return self.rows / self.seconds

    @property
    def waiting(self) -> float:
        return (self.waited_before + self.waited_now) / self.seconds

    def read(self) -> dict[str, float]:
        """Metrics since the last reading; losses are those of this rank's rows."""
        means = self._means()
        losses = "  ".join(f"{name} {mean:.4f}" for name, mean in means.items())
        self.note = f"{self.rows_per_s:,.0f} rows/s  {losses}  waiting {self.waiting:.0%}"
        self._clear()
        return {f"train.{name}.loss": mean for name, mean in means.items()} | {
            "train.rows_per_s": self.rows_per_s,
            "train.waiting_share": self.waiting,
        }

    def _means(self) -> dict[str, float]:
        if self.losses is None or self.counts is None:
            return {}
        pairs = zip(self.names, self.losses.tolist(), self.counts.tolist(), strict=True)
        return {name: total / count for name, total, count in pairs if count > 0}
