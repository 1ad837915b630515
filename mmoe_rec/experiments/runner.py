"""Trains variants with several seeds, and keeps what each run predicts for the rows that judge.

    FOLDER/FINGERPRINT/KEY.parquet     predictions of a run, found again by all that they depend on (KEY)
    FOLDER/FINGERPRINT/choices.json    the precision that all runs share
    FOLDER/features/                   features of variants that change them

A run whose predictions are complete isn't repeated. No model is registered, and no weights stay.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmoe_rec import __version__
from mmoe_rec.atomic import digest
from mmoe_rec.errors import StoppedError, UserError
from mmoe_rec.experiments.processes import run_side_by_side, share_threads
from mmoe_rec.experiments.variants import Variant
from mmoe_rec.locks import writing
from mmoe_rec.preprocessing.logs import BuildInputs
from mmoe_rec.preprocessing.prepare import FeatureFolder, features_in_use
from mmoe_rec.progress import say
from mmoe_rec.settings.sections import Settings
from mmoe_rec.tracking import runs
from mmoe_rec.tracking.outbox import PATIENCE_SECONDS
from mmoe_rec.training.origin import fixed_settings

if TYPE_CHECKING:
    from mmoe_rec.batches.encoded_rows import Part
    from mmoe_rec.evaluation.summary import PredictedRows
    from mmoe_rec.evaluation.sums import EvaluationSums
    from mmoe_rec.experiments.predictions import Predictions
    from mmoe_rec.model.mmoe import RankingModel
    from mmoe_rec.model.model_layout import ModelLayout
    from mmoe_rec.model.score import Calibration
    from mmoe_rec.training.choices import Choices
    from mmoe_rec.training.loop import Trainer, TrainingResult
    from mmoe_rec.training.validation import Validation

Watch = Callable[["Validation", int], None]


@dataclass(frozen=True)
class Network:
    """A trained network as it is served."""

    model: RankingModel
    layout: ModelLayout
    calibration: Calibration


@dataclass(frozen=True)
class TrainedVariant:
    """The runs of a variant, in the order of the seeds.

    Attributes:
        variant: The variant.
        seeds: Seeds of the runs.
        rows: Rows that judge.
        files: Predictions of the runs.
        facts: Facts about the runs, such as `seconds`, and `steps` of a network.
    """

    variant: Variant
    seeds: tuple[int, ...]
    rows: PredictedRows
    files: tuple[Path, ...]
    facts: tuple[dict[str, Any], ...]

    def measure(self) -> list[EvaluationSums]:
        """Measure each run. The sums aren't kept, because those of many runs would fill the memory."""
        from mmoe_rec.experiments.predictions import Predictions

        return [Predictions.read(file)[0].measure(self.rows) for file in self.files]


@contextmanager
def open_runner(
    settings: Settings, name: str, split: str, part: Part | None = None, jobs: int = 1, folder: str | None = None
) -> Iterator[Runner]:
    """Prepare features and hold everything that the runs of a command need.

    Args:
        settings: The settings that variants change.
        name: Name of the command and of its run in MLflow.
        split: Split whose rows judge the variants.
        part: Part of the split's users that judges, None for all.
        jobs: Number of runs side by side.
        folder: Folder in `data.work`, None for the name.

    Raises:
        UserError: Features can't be built, a split has no rows, or MLflow can't be used.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"{name} trains in one process. Start it without torchrun.")
    work, tracking = Path(settings.data.work), settings.tracking.address
    runs.check_server(tracking, settings.experiment, unsent=work / "unsent")
    needs, own = ("train", "validation", split), work / (folder or name)
    with ExitStack() as held:
        prepared = held.enter_context(features_in_use(BuildInputs.of(settings), f"the command {name}", needs))
        held.enter_context(writing(own, f"the command {name}", "set `data.work` to another folder"))
        key = f"{name}-{digest(fixed_settings(settings), prepared.manifest['fingerprint'])}"
        unsent, patience = work / "unsent", PATIENCE_SECONDS
        run = held.enter_context(
            runs.open_run(tracking, settings.experiment, run_name=name, key=key, unsent=unsent, patience=patience)
        )
        yield Runner(settings, prepared, own, split, part, jobs, run, held)


class Runner:
    """Trains variants of settings.

    Attributes:
        prepared: Features of the settings.
        folder: Folder of the command.
        run: Run in MLflow, which holds a run for each variant and seed.
    """

    def __init__(
        self,
        settings: Settings,
        prepared: FeatureFolder,
        folder: Path,
        split: str,
        part: Part | None,
        jobs: int,
        run: runs.Run,
        held: ExitStack,
    ) -> None:
        self.settings, self.prepared, self.folder, self.split, self.part = settings, prepared, folder, split, part
        self.jobs, self.run, self._held = jobs, run, held
        self._kept = folder / str(prepared.manifest["fingerprint"])
        self._kept.mkdir(parents=True, exist_ok=True)
        for other in folder.iterdir():  # Runs on other features, and weights that a killed command left.
            if other.is_dir() and other not in (self._kept, folder / "features"):
                shutil.rmtree(other, ignore_errors=True)
        self._features = {self._identify(settings): prepared}
        self._rows = dict[Path, "PredictedRows"]()

    def train(self, variants: Sequence[Variant], seeds: Sequence[int]) -> list[TrainedVariant]:
        """Train all variants with all seeds, but those whose predictions are complete.

        Raises:
            UserError: A variant has an unknown key, or can't be trained.
            StoppedError: A signal came.
        """
        wanted = {variant.name: [self.make_task(variant, seed) for seed in seeds] for variant in variants}
        by_seed = [task for same_seed in zip(*wanted.values(), strict=True) for task in same_seed]
        tasks = list({task.file: task for task in by_seed if not task.file.exists()}.values())
        with self.keeping_runs():
            self.share_choices(tasks)
            self._run(tasks)
        return [self._read(variant, seeds, wanted[variant.name]) for variant in variants]

    def train_network(self, variant: Variant, seed: int) -> Network:
        """Train one variant, keep its predictions and return the network."""
        task = self.make_task(variant, seed)
        with self.keeping_runs():
            self.share_choices([task])
            say(f"run: {task.name}")
            network = _train(task)
        assert network is not None, "only trees alone have no network"
        return network

    def make_task(self, variant: Variant, seed: int) -> Task:
        """Return what a process needs to train a variant with a seed."""
        changed = variant.apply(self.settings)
        prepared = replace(self._find_features(changed), left_out=(variant.without_features, variant.without_tasks))
        training = changed.training.model_copy(update={"seed": seed})
        changed = share_threads(changed.model_copy(update={"training": training}), self.jobs)
        depends = [__version__, fixed_settings(changed), changed.training.calibration, variant.trees_alone]
        depends += [sorted(variant.without_features), sorted(variant.without_tasks), self.split, self.part]
        key = digest(*depends, prepared.manifest["fingerprint"])
        return Task(
            name=f"{variant.name}, seed {seed}",
            variant=variant,
            settings=changed,
            base=self.settings,
            prepared=prepared,
            split=self.split,
            part=self.part,
            file=self._kept / f"{key}.parquet",
            checkpoints=self.folder / "checkpoints",
            parent=self.run.run_id,
            unsent=Path(self.settings.data.work) / "unsent" if self.jobs == 1 else None,
        )

    def share_choices(self, tasks: Sequence[Task]) -> None:
        """Measure the precision by the first network, for all runs, unless an earlier command did."""
        networks = [task for task in tasks if not task.variant.trees_alone]
        if networks and not networks[0].choices.exists():
            from mmoe_rec.training.choices import write_choices

            with _open_trainer(networks[0], None) as trainer:
                trainer.checkpoints.close()
                write_choices(networks[0].choices, trainer.choices)

    @contextmanager
    def keeping_runs(self) -> Iterator[None]:
        """Leave no weights behind, and report that complete runs stay if a signal comes."""
        try:
            yield
        except StoppedError as stopped:
            reason = str(stopped).partition(";")[0]
            raise StoppedError(f"{reason}; complete runs stay: repeat the command to go on") from None
        finally:
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)

    def _run(self, tasks: Sequence[Task]) -> None:
        if self.jobs == 1:
            begun = time.monotonic()
            for done, task in enumerate(tasks):
                minutes = (time.monotonic() - begun) / max(1, done) * (len(tasks) - done) / 60
                left = f" (about {max(1, round(minutes))} minutes left)" if done else ""
                say(f"run {done + 1} of {len(tasks)}: {task.name}{left}")
                _train(task)
            return
        logs = [self.folder / f"run_{number + 1}.log" for number in range(len(tasks))]
        for log in logs:
            log.unlink(missing_ok=True)
        for done, number in enumerate(run_side_by_side(_train, tasks, logs, self.jobs)):
            say(f"{done + 1} of {len(tasks)} runs are complete: {tasks[number].name}")

    def _read(self, variant: Variant, seeds: Sequence[int], tasks: Sequence[Task]) -> TrainedVariant:
        from mmoe_rec.evaluation.scoring import read_labels
        from mmoe_rec.experiments.predictions import Predictions

        files, folder = tuple(task.file for task in tasks), tasks[0].prepared.folder
        if folder not in self._rows:
            whole = replace(tasks[0].prepared, left_out=((), ()))
            self._rows[folder] = read_labels(self.settings, whole, self.split, self.part).predicted
        facts = tuple(Predictions.read(file)[1] for file in files)
        return TrainedVariant(variant, tuple(seeds), self._rows[folder], files, facts)

    def _find_features(self, settings: Settings) -> FeatureFolder:
        """Return features of a variant, which are built first if they differ from the others."""
        key = self._identify(settings)
        if key not in self._features:
            inputs = replace(BuildInputs.of(settings), work=self.folder / "features" / key)
            needs = ("train", "validation", self.split)
            self._features[key] = self._held.enter_context(features_in_use(inputs, "a comparison", needs))
        return self._features[key]

    def _identify(self, settings: Settings) -> str:
        data = settings.data.model_dump(mode="json", exclude={"work"})
        return digest(settings.schema_.identity(), settings.split.windows(), data)


@dataclass(frozen=True)
class Task:
    """One run.

    Attributes:
        name: Name in words.
        variant: The variant.
        settings: Settings of the run, with its seed.
        base: Settings that the variant changes.
        prepared: Features of the run.
        split: Split whose rows are predicted.
        part: Part of its users that is predicted, None for all.
        file: File for the predictions.
        checkpoints: Folder for weights, which is removed.
        parent: ID of the run in MLflow that holds this one.
        unsent: Folder for messages that MLflow can't take, see `runs.open_run`.
    """

    name: str
    variant: Variant
    settings: Settings
    base: Settings
    prepared: FeatureFolder
    split: str
    part: Part | None
    file: Path
    checkpoints: Path
    parent: str | None
    unsent: Path | None

    @property
    def choices(self) -> Path:
        """The file of the choices that all runs share."""
        return self.file.with_name("choices.json")

    @contextmanager
    def open_run(self) -> Iterator[runs.Run]:
        """Open the run in MLflow, with its settings as parameters."""
        settings, tracking = self.settings, self.settings.tracking
        with runs.open_run(
            tracking.address,
            settings.experiment,
            run_name=self.name,
            key=f"{self.parent}-{self.file.stem}",
            parent=self.parent,
            unsent=self.unsent,
            patience=PATIENCE_SECONDS,
        ) as run:
            run.log_params({**settings.model_dump(mode="json", include={"model", "training"}), **settings.choices})
            run.set_tags({"variant": self.variant.name})
            yield run

    def judge(self, best: Validation) -> float:
        """Return the objective of a validation on the selecting rows, by the measure of the base settings."""
        from mmoe_rec.model.model_layout import ModelLayout

        return best.objective(self.base.training.select_by, ModelLayout.of(self.prepared.layout, self.base))


@contextmanager
def _open_trainer(
    task: Task, choices: Choices | None, run: runs.Run | None = None, watch: Watch | None = None
) -> Iterator[Trainer]:
    from mmoe_rec.model.model_layout import ModelLayout
    from mmoe_rec.training.loop import Trainer
    from mmoe_rec.training.ranks import training_ranks

    settings, folder = task.settings, task.checkpoints / task.file.stem
    training = settings.training.model_copy(update={"checkpoint_steps": 10**9, "checkpoints_kept": 1})
    log = (lambda metrics, step: None) if run is None else run.log_metrics
    layout = ModelLayout.of(task.prepared.layout, settings)
    with training_ranks(settings.training) as (device, _):
        yield Trainer(
            task.prepared, layout, settings.model, training, device, folder, log, watch=watch, choices=choices
        )


def fit(task: Task, run: runs.Run, watch: Watch | None = None) -> tuple[TrainingResult, Choices]:
    """Train the network of a task. Returns the result, whose checkpoints the caller removes, and the choices."""
    from mmoe_rec.training.choices import read_choices

    with _open_trainer(task, read_choices(task.choices), run, watch) as trainer:
        return trainer.run(), trainer.choices


def _train(task: Task) -> Network | None:
    """Train, predict the rows that judge and write the predictions. Returns the network, None for trees alone."""
    with task.open_run() as run:
        begun = time.perf_counter()
        network, predicted, facts = (_grow_trees if task.variant.trees_alone else _train_network)(task, run)
        facts |= {"seconds": time.perf_counter() - begun}
        predicted.write(task.file, facts)
        run.log_text(facts, "facts.json")
    return network


def _train_network(task: Task, run: runs.Run) -> tuple[Network | None, Predictions, dict[str, Any]]:
    """Train as `train_model` does, without keeping anything."""
    from mmoe_rec.batches.encoded_rows import EncodedRows
    from mmoe_rec.experiments.predictions import predict
    from mmoe_rec.model.mmoe import build_model
    from mmoe_rec.model.model_layout import ModelLayout
    from mmoe_rec.model.tables import PlainTables
    from mmoe_rec.training.checkpoint import load_plain
    from mmoe_rec.training.stacking import grow_trees
    from mmoe_rec.training.train import calibrate
    from mmoe_rec.training.validation import find_early_end

    settings, prepared = task.settings, task.prepared
    layout = ModelLayout.of(prepared.layout, settings)
    try:
        result, choices = fit(task, run)
        model = build_model(layout, settings.model, PlainTables(layout))
        load_plain(model, result.best_checkpoint)
    finally:
        shutil.rmtree(task.checkpoints / task.file.stem, ignore_errors=True)
    assert result.best is not None, "every training is validated at its end"
    run.log_metrics(result.best.flat("best"), result.best_step)
    if settings.model.trees is not None:
        model.trees = grow_trees(settings, prepared, layout, model)
    calibration = calibrate(settings, prepared, model)
    rows = EncodedRows(prepared.split(task.split), layout, part=task.part)
    parts = (part for part, _ in rows.stream(settings.evaluation.batch_size))
    facts = {
        "selecting": task.judge(result.best),
        "best_step": result.best_step,
        "steps": result.steps,
        "precision": choices.precision,
        "early_end": find_early_end(result.history, result.best_step, layout, settings.training),
        "parameters": sum(each.numel() for each in model.parameters()),
    }
    return Network(model, layout, calibration), predict(model, layout, calibration, parts), facts


def _grow_trees(task: Task, run: runs.Run) -> tuple[Network | None, Predictions, dict[str, Any]]:
    """Grow the trees of `baselines` in place of a network."""
    import numpy as np

    from mmoe_rec.batches.encoded_rows import EncodedRows
    from mmoe_rec.experiments.predictions import Predictions
    from mmoe_rec.training.baselines import boost_tasks, predict_calibrated, read_inputs

    settings, layout = task.settings, task.prepared.layout
    learnt, held_out, last = read_inputs(settings, task.prepared, layout)
    boosted, facts = boost_tasks(settings, layout, learnt, held_out, last)
    rows = EncodedRows(task.prepared.split(task.split), layout, part=task.part)
    values = predict_calibrated(settings, layout, boosted, held_out, rows)
    weights = np.array([settings.tasks[each.name].score_weight for each in layout.tasks])
    score = np.log(np.clip(values, 1e-12, None)) @ weights
    return None, Predictions(tuple(each.name for each in layout.tasks), values, score), {"trees": facts}
