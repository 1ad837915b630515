"""Training loop for a CPU and for several GPUs.

Each rank (process) runs a `Trainer` with the same arguments. The ranks divide each batch among them, so the rows of a
step don't depend on the number of ranks. Row-wise Adagrad updates the embedding tables, and AdamW all other weights.
"""

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from mmoe_rec.batches.batch import Batch, make_batch
from mmoe_rec.batches.encoded_dataset import EncodedDataset, ValidationPart
from mmoe_rec.batches.row_reader import Position, Prefetch, TrainingReader
from mmoe_rec.devices import keeping_freed_memory, limit_threads
from mmoe_rec.errors import StoppedError, StopRequest, UserError
from mmoe_rec.features.layout import Layout
from mmoe_rec.model.matmul import choose_matmul_backend, set_matmul_backend
from mmoe_rec.model.mmoe import Mixture, build_model
from mmoe_rec.model.model_layout import ModelLayout
from mmoe_rec.model.warm_start import WarmStart, base_rates, set_base_rates
from mmoe_rec.preprocessing.prepare import FeatureFolder
from mmoe_rec.progress import bar, say
from mmoe_rec.settings.model import Model
from mmoe_rec.settings.training import Training
from mmoe_rec.training.checkpoint import Checkpoint, CheckpointWriter, TrainingState, restore, step_folder
from mmoe_rec.training.id_dropout import IdDropout
from mmoe_rec.training.losses import add_log_variances, log_variances, loss_factors
from mmoe_rec.training.provenance import Provenance
from mmoe_rec.training.sharding import Optimizers, ShardedModel, shard, training_tables
from mmoe_rec.training.steps import (
    PrecisionChoice,
    StepRunner,
    choose_precision,
    has_improved,
    learning_rate_fraction,
    validation_steps,
)
from mmoe_rec.training.table_backends import choose_table_backend
from mmoe_rec.training.validation import Validation, validate

STEPS_BETWEEN_LOGS = 25
LogMetrics = Callable[[dict[str, float], int], None]


@dataclass
class TrainingResult:
    """Result of a training loop.

    Attributes:
        plan: Sharding plan, as text.
        steps: Number of steps.
        rows_per_s: Training rows per second of all ranks together since the loop started or resumed, without the time
            of validations.
        data_wait_fraction: Fraction of the training time spent waiting for data.
        best_step: Step of the best validation.
        best_checkpoint: Folder of the checkpoint of the best step.
        history: Step and result of each validation. Step 0, if present, validates the model of a warm start.
        stopped_early: Whether the loop ended before its last step because validations no longer improved.
    """

    plan: str
    steps: int = 0
    rows_per_s: float = 0.0
    data_wait_fraction: float = 0.0
    best_step: int = 0
    best_checkpoint: Path = Path()
    history: list[tuple[int, Validation]] = field(default_factory=list)
    stopped_early: bool = False

    @property
    def best(self) -> Validation | None:
        """Validation of the best step, None before the first validation."""
        return dict(self.history).get(self.best_step)


class Meter:
    """Meter of the speed of a training run and of its losses.

    Args:
        layout: Layout with the tasks.
        world_size: Number of ranks.

    Attributes:
        wait_seconds: Seconds spent waiting for data.
        excluded_seconds: Seconds not spent on training, such as validations.
        note: Text for a progress bar, from the last `read`.
    """

    def __init__(self, layout: Layout, world_size: int) -> None:
        self._names = [task.loss_label for task in layout.tasks]
        self._world_size, self.note = world_size, ""
        self._start = time.perf_counter()
        self._rows, self.wait_seconds, self.excluded_seconds = 0, 0.0, 0.0
        # The sums of losses and counts stay on the device, because reading them at every step would make a GPU wait.
        self._sums: torch.Tensor | int = 0

    def add(self, rows: int, losses: torch.Tensor, counts: torch.Tensor) -> None:
        """Add a step of this rank.

        Args:
            rows: Number of this rank's rows. All ranks have the same number.
            losses: Sum of the losses of each of the T tasks, shape (T,).
            counts: Number of observed labels of each task, or the sum of these rows' weights, shape (T,).
        """
        self._rows += rows * self._world_size
        self._sums = self._sums + torch.stack([losses.double(), counts.double()])

    @property
    def rows_per_s(self) -> float:
        """Rows per second of all ranks together."""
        return self._rows / self._seconds

    @property
    def data_wait_fraction(self) -> float:
        """Fraction of the training time spent waiting for data."""
        return self.wait_seconds / self._seconds

    @property
    def _seconds(self) -> float:
        return max(1e-9, time.perf_counter() - self._start - self.excluded_seconds)

    def read(self) -> dict[str, float]:
        """Return metrics by name: mean losses of this rank's rows since the last `read`, and speeds from the start."""
        means = {}
        if isinstance(self._sums, torch.Tensor):
            sums = zip(self._names, *self._sums.tolist(), strict=True)
            means = {name: total / count for name, total, count in sums if count > 0}
        self._sums = 0
        losses = "  ".join(f"{name} {mean:.4f}" for name, mean in means.items())
        self.note = f"{self.rows_per_s:,.0f} rows/s  {losses}  waiting {self.data_wait_fraction:.0%}"
        metrics = {f"train/{name}.loss": mean for name, mean in means.items()}
        return metrics | {"train/rows_per_s": self.rows_per_s, "train/data_wait_fraction": self.data_wait_fraction}


class Trainer:
    """Training of one model, see `run`. A process group must exist.

    Args:
        prepared: Folder of the features.
        layout: Layout of the model.
        model_settings: Settings of the model.
        settings: Settings of the training.
        device: Device of this rank.
        checkpoints: Folder for the checkpoints.
        log_metrics: Function that is called with metrics by name and the step.
        warm_start: Weights to start from, None for random ones.
        resume: Checkpoint to resume from. None starts at the first step.
        provenance: Settings, features and starting model, which checkpoints store.
        on_validation: Function that is called with each validation and its step.
        precision_choice: Precision of a new run for the setting `auto`. None measures which precision is faster.

    Raises:
        UserError: The tables don't fit into memory, or encoded rows or the checkpoint can't be read.
    """

    def __init__(
        self,
        prepared: FeatureFolder,
        layout: ModelLayout,
        model_settings: Model,
        settings: Training,
        device: torch.device,
        checkpoints: Path,
        log_metrics: LogMetrics,
        warm_start: WarmStart | None = None,
        resume: Checkpoint | None = None,
        provenance: Provenance = Provenance(),  # noqa: B008 - it is frozen
        on_validation: Callable[[Validation, int], None] | None = None,
        precision_choice: PrecisionChoice | None = None,
    ) -> None:
        self.settings, self.device, self.provenance = settings, device, provenance
        self.layout, self.log_metrics, self.on_validation = layout, log_metrics, on_validation
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        rows = EncodedDataset(prepared.split("train"), layout).rows
        self.batch_size = settings.resolve_batch_size(rows)
        self.reader = self._reader(prepared, "train", self.batch_size)
        self.validation_reader = self._reader(prepared, "validation", max(self.batch_size, 8192))
        self.id_dropout = IdDropout.measure(prepared, layout, settings.max_id_dropout)
        self.position = self.reader.position(0)
        self.matmul_backend = choose_matmul_backend(settings.matmul_backend, device.type)
        self.table_backend = choose_table_backend(settings.table_backend, device.type, self.world_size)
        self.threads = (settings.threads or torch.get_num_threads()) if device.type == "cpu" else 0
        precision_choice = precision_choice if resume is None else resume.state.precision_choice
        self.sharded, self.precision_choice = self._shard(model_settings, warm_start, precision_choice, prepared)
        self.optimizer = Optimizers(self.sharded, settings)
        self.result = TrainingResult(self.sharded.plan)
        self.total_steps = settings.max_epochs * self.reader.batches_per_epoch
        # Learning rates rise and fall once per cycle. A cycle is an epoch under `epochs: auto` (warm restarts:
        # Loshchilov & Hutter, 2017), else the whole run.
        self.cycle_steps = self.reader.batches_per_epoch if settings.epochs == "auto" else self.total_steps
        self.steps_to_validate = validation_steps(self.reader.batches_per_epoch, settings)
        if warm_start is not None or (resume is not None and resume.state.step == 0):
            self.steps_to_validate.add(0)  # For comparison, also validate the model that the run starts from.
        self.stop = StopRequest()
        self.steps = StepRunner(
            self.sharded,
            self.optimizer,
            self.layout,
            device,
            bf16=self.precision_choice.precision == "bf16",
            max_grad_norm=settings.max_grad_norm,
            stop=self.stop,
        )
        self.checkpoints = CheckpointWriter(checkpoints, settings.keep_checkpoints, resume)
        if resume is not None:
            self.optimizer.init_state()
            restore(resume.folder, self.sharded.model, self.optimizer)
            state, result = resume.state, self.result
            self.position = state.position
            result.steps, result.best_step, result.history = state.step, state.best_step, list(state.history)
            result.stopped_early = self._stops_early()

    def _reader(self, prepared: FeatureFolder, split: str, batch_size: int) -> TrainingReader:
        weighted = self.settings.sampling_correction == "weights"
        # Validations select the best step by the selection rows. The evaluation rows only measure the selected model.
        part = ValidationPart.SELECTION if split == "validation" else None
        return TrainingReader(
            EncodedDataset(prepared.split(split), self.layout, joint_labels=True, weighted=weighted, part=part),
            batch_size=batch_size,
            shuffle_buffer_rows=self.settings.shuffle_buffer_rows,
            seed=self.settings.seed,
            rank=self.rank,
            world_size=self.world_size,
        )

    def _shard(
        self,
        model_settings: Model,
        warm_start: WarmStart | None,
        before: PrecisionChoice | None,
        prepared: FeatureFolder,
    ) -> tuple[ShardedModel, PrecisionChoice]:
        model = build_model(
            self.layout, model_settings, training_tables(self.layout, self.table_backend), self.settings.seed
        )
        if warm_start is not None:
            warm_start.fill_dense(model)
        else:
            weighted = self.settings.sampling_correction == "weights"
            rates = base_rates(prepared.manifest, self.layout.tasks, weighted)
            set_base_rates(model.mixture.towers, self.layout.tasks, rates)
        if self.settings.task_weighting == "uncertainty":
            add_log_variances(model, self.layout.tasks)
        set_matmul_backend(model, self.matmul_backend)
        precision_choice = self._choose(model.mixture, before)
        sharded = shard(
            model,
            self.layout,
            self.device,
            batch_size=math.ceil(self.batch_size / self.world_size),
            settings=self.settings,
            row_initializer=None if warm_start is None else warm_start.rows,
        )
        return sharded, precision_choice

    def announce(self) -> None:
        """Print the precision, the backends, and the number of steps of the run or of an epoch."""
        threads = f", {self.threads} thread{'s' * (self.threads > 1)}" * bool(self.threads)
        say(
            f"computing in {self.precision_choice}, matmul backend {self.matmul_backend}, "
            f"table backend {self.table_backend}{threads}"
        )
        if hidden := ", ".join(f"{name} {part:.0%}" for name, part in self.id_dropout.fractions.items()):
            say(f"ids hidden in training, because later rows have unseen ids: {hidden}")
        until = " per epoch, until an epoch no longer improves the validation" * (self.cycle_steps < self.total_steps)
        say(f"{self.cycle_steps:,} step{'s' * (self.cycle_steps != 1)} of {self.batch_size:,} rows{until}")

    def _choose(self, mixture: Mixture, before: PrecisionChoice | None) -> PrecisionChoice:
        """Return the precision of the settings. For `auto`, return the choice `before`, or measure without one."""
        if self.settings.precision != "auto":
            return PrecisionChoice(self.settings.precision)
        rows = min(math.ceil(self.batch_size / self.world_size), self.reader.rows.rows)
        return before or choose_precision(mixture, self.layout, self.device, rows)

    def run(self) -> TrainingResult:
        """Train until the last step, or until validations stop improving. All ranks must call this together.

        Raises:
            StoppedError: A signal asks to stop. The state has been saved in a checkpoint.
            UserError: A checkpoint can't be written, or a loss isn't finite.
        """
        if self.rank == 0:
            self.announce()
        result, meter = self.result, Meter(self.layout, self.world_size)
        progress = bar("{task.fields[note]}", shown=self.rank == 0)
        with progress, self.stop, keeping_freed_memory(), limit_threads(self.threads):
            task = progress.add_task("training", total=None, note="")

            def show() -> None:
                end = math.ceil(result.steps / self.cycle_steps) * self.cycle_steps
                progress.update(task, total=end, completed=result.steps, note=meter.note)

            self._train(meter, show)
        dist.barrier()
        result.rows_per_s, result.data_wait_fraction = meter.rows_per_s, meter.data_wait_fraction
        result.best_checkpoint = step_folder(self.checkpoints.folder, result.best_step)
        return result

    def _train(self, meter: Meter, show: Callable[[], None]) -> None:
        last = self.result.history[-1][0] if self.result.history else -1
        if self.result.steps in self.steps_to_validate and last < self.result.steps:
            self._validate(meter)
            if self.result.steps == 0:
                self._save()
        source = self._batches(self.reader, self.position, self.settings.max_epochs)
        with contextlib.closing(iter(source)) as batches:
            while not self.result.stopped_early and self.result.steps < self.total_steps:
                until = min(step for step in self.steps_to_validate if step > self.result.steps)
                part = itertools.islice(batches, until - self.result.steps)
                while (stop_requested := self._step(part, meter)) is not None:
                    meter.wait_seconds = source.wait_seconds
                    show()
                    if stop_requested:
                        self._save_and_stop()
                    if self.result.steps % self.settings.checkpoint_steps == 0 and self.result.steps < until:
                        self._save()
                self.steps.detach()
                self._validate(meter)
                self._save()
        if self.result.steps % STEPS_BETWEEN_LOGS:
            self._log(meter)

    def _batches(self, reader: TrainingReader, start: Position, epochs: int) -> Prefetch[Batch]:
        def make() -> Generator[Batch, None, None]:
            keyed_jagged = self.table_backend == "fbgemm"
            for rows, position in reader.resume(start, epochs):
                if reader is self.reader:
                    self.id_dropout.hide(rows, position)
                optional = (position, rows.weights, rows.row_numbers)
                batch = make_batch(rows.encoded, self.layout, rows.labels, *optional, torchrec=keyed_jagged)
                yield batch.pin_memory() if self.device.type == "cuda" else batch

        return Prefetch(make())

    def _step(self, batches: Iterator[Batch], meter: Meter) -> bool | None:
        """Train on the next batch. Return whether any rank was asked to stop, or None after the last batch."""
        done = self.result.steps % self.cycle_steps
        lr_fraction = learning_rate_fraction(done, self.cycle_steps, self.settings.warmup_fraction)
        step = self.steps.run_next(batches, lr_fraction)
        if step is None:
            return None
        assert step.batch.position is not None
        if step.nonfinite is not None:  # The flag is the same on all ranks, so all ranks raise the error.
            raise UserError(
                f"the {step.nonfinite} of step {self.result.steps + 1} is not finite. Check the inputs for extreme "
                "values, or lower training.learning_rate or training.table_learning_rate"
            )
        meter.add(len(step.batch), step.losses, step.observed)
        self.position = step.batch.position
        self.result.steps += 1
        if self.result.steps % STEPS_BETWEEN_LOGS == 0:
            self._log(meter)
        return step.stop_requested

    def _log(self, meter: Meter) -> None:
        metrics = meter.read()
        metrics["train/learning_rate"] = self.optimizer.param_groups[-1]["lr"]
        if (learned := log_variances(self.sharded.model.module)) is not None:
            factors = zip(self.layout.tasks, loss_factors(learned.detach(), self.layout.tasks).tolist(), strict=True)
            metrics |= {f"train/{task.name}.weight": task.loss_weight * factor for task, factor in factors}
        self.log_metrics(metrics, self.result.steps)

    def _validate(self, meter: Meter) -> None:
        start = time.perf_counter()
        batches = self._batches(self.validation_reader, self.validation_reader.position(0), 1)
        validation = validate(self.sharded.model.module, batches, self.layout, self.device, self.stop)
        meter.excluded_seconds += time.perf_counter() - start
        if validation is None:  # The validation ended early because a rank was asked to stop.
            self._save_and_stop()
        result, best, monitor = self.result, self.result.best, (self.settings.monitor, self.layout)
        result.history.append((result.steps, validation))
        expert_metrics = validation.experts.to_metrics([task.name for task in self.layout.tasks])
        self.log_metrics(validation.to_metrics() | expert_metrics, result.steps)
        if self.on_validation is not None:
            self.on_validation(validation, result.steps)
        if best is None or validation.objective(*monitor) > best.objective(*monitor):
            result.best_step = result.steps
        result.stopped_early = self._stops_early()

    def _stops_early(self) -> bool:
        """Return whether the epoch that ends here has not improved the validation, under `epochs: auto`."""
        steps, settings = self.result.steps, self.settings
        values = {step: past.objective(settings.monitor, self.layout) for step, past in self.result.history}
        is_end = settings.epochs == "auto" and steps % self.cycle_steps == 0 and steps < self.total_steps
        return is_end and not has_improved(values, steps - self.cycle_steps)

    def _save(self) -> None:
        step, history, best_step = self.result.steps, tuple(self.result.history), self.result.best_step
        state = TrainingState(step, self.position, history, best_step, self.provenance, self.precision_choice)
        tensors = {"model": self.sharded.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        self.checkpoints.save(tensors, state)

    def _save_and_stop(self) -> NoReturn:
        self._save()
        signal = self.stop.signal or "another rank's signal"
        step = f"step {self.result.steps}"
        raise StoppedError(f"{signal} received, and {step} is saved. To continue, run the command with --resume")
