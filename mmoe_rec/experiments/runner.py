"""Trains variants with several seeds, and keeps what each run predicts for the rows that judge.

    FOLDER/FINGERPRINT/KEY.parquet     predictions of a run, found again by all that they depend on (KEY)
    FOLDER/FINGERPRINT/choices.json    the precision that all runs share
    FOLDER/features/                   features of variants that change them

A run whose predictions are complete isn't repeated. No model is registered, and no weights stay.
"""

import json
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec import __version__
from mmoe_rec.atomic import atomic_file, digest
from mmoe_rec.batches.encoded_rows import EncodedRows, Part
from mmoe_rec.errors import StoppedError, UserError
from mmoe_rec.evaluation.evaluate import predict_rows, read_labels
from mmoe_rec.evaluation.sums import EvaluationSums, PredictedRows
from mmoe_rec.locks import writing
from mmoe_rec.model.mmoe import RankingModel
from mmoe_rec.model.model_layout import ModelLayout
from mmoe_rec.model.score import Calibration
from mmoe_rec.preprocessing.logs import BuildInputs
from mmoe_rec.preprocessing.prepare import FeatureFolder, features_in_use
from mmoe_rec.progress import say
from mmoe_rec.settings.load import override_settings
from mmoe_rec.settings.sections import Settings
from mmoe_rec.tracking import runs
from mmoe_rec.tracking.runs import PATIENCE_SECONDS
from mmoe_rec.training.baselines import boost_tasks, predict_calibrated, read_inputs
from mmoe_rec.training.loop import Trainer, TrainingResult
from mmoe_rec.training.origin import fixed_settings
from mmoe_rec.training.ranks import training_ranks
from mmoe_rec.training.stacking import grow_trees
from mmoe_rec.training.steps import read_choices, write_choices
from mmoe_rec.training.train import best_network, calibrate
from mmoe_rec.training.validation import Validation, find_early_end

Watch = Callable[[Validation, int], None]
_FACTS = b"mmoe_rec"  # The key of a file's metadata.


@dataclass(frozen=True)
class Variant:
    """A name and what it changes in the settings.

    Attributes:
        name: Name that no other variant of the comparison has.
        overrides: Overrides of the settings, such as `model.experts.count=1`.
        without_features: Features that the model never sees. They need no features of their own.
        without_tasks: Tasks that the model doesn't learn. Features made from their labels stay.
        trees_alone: Whether to grow boosted trees instead of training a network.
        simpler: Whether the variant is worth adopting if it loses nothing.
    """

    name: str
    overrides: tuple[str, ...] = ()
    without_features: tuple[str, ...] = ()
    without_tasks: tuple[str, ...] = ()
    trees_alone: bool = False
    simpler: bool = False

    def apply(self, settings: Settings) -> Settings:
        """Return the settings with the overrides. Raises UserError for an unknown key or a wrong value."""
        words = [f"--{override}" for override in self.overrides]
        return override_settings(settings, words, f"variant '{self.name}'") if words else settings

    @property
    def change(self) -> str:
        """The options that adopt the variant in another command."""
        words = [*self.overrides, *(f"features.{name}=null" for name in self.without_features)]
        return " ".join(shlex.quote(f"--{word}") for word in words)


BASE = Variant("these settings")


@dataclass(frozen=True)
class Network:
    """A trained network as it is served."""

    model: RankingModel
    layout: ModelLayout
    calibration: Calibration


def write_predictions(file: Path, tasks: Mapping[str, np.ndarray], score: np.ndarray, facts: Mapping[str, Any]) -> None:
    """Write the predictions of a run.

    Args:
        file: File to write.
        tasks: Task -> predictions of the rows that judge.
        score: Their scores.
        facts: Facts about the run, which become metadata.
    """
    table = pa.table({**tasks, "score": score}).replace_schema_metadata({_FACTS: json.dumps(facts)})
    with atomic_file(file) as path:
        pq.write_table(table, path, compression="zstd")


def read_predictions(file: Path) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, Any]]:
    """Read the predictions of the tasks, the scores, and the facts. Raises UserError for a damaged file."""
    try:
        table = pq.read_table(file)
    except (OSError, pa.ArrowException):
        raise UserError(f"'{file}' is damaged. Remove it and repeat the command.") from None
    *names, score = table.column_names
    facts = json.loads(table.schema.metadata[_FACTS])
    return {name: table.column(name).to_numpy() for name in names}, table.column(score).to_numpy(), facts


@dataclass(frozen=True)
class Task:
    """One run.

    Attributes:
        variant: The variant.
        settings: Settings of the run, with its seed.
        prepared: Features of the run.
        file: File for the predictions.
    """

    variant: Variant
    settings: Settings
    prepared: FeatureFolder
    file: Path

    @property
    def name(self) -> str:
        """Name in words."""
        return f"{self.variant.name}, seed {self.settings.training.seed}"


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
        predicted = (read_predictions(file) for file in self.files)
        return [self.rows.with_predictions(tasks, score).sum() for tasks, score, _ in predicted]


@contextmanager
def open_runner(
    settings: Settings, name: str, split: str, part: Part | None = None, folder: str | None = None
) -> Iterator["Runner"]:
    """Prepare features and hold everything that the runs of a command need.

    Args:
        settings: The settings that variants change.
        name: Name of the command and of its run in MLflow.
        split: Split whose rows judge the variants.
        part: Part of the split's users that judges, None for all.
        folder: Folder in `data.work_dir`, None for the name.

    Raises:
        UserError: Features can't be built, a split has no rows, or MLflow can't be used.
        StoppedError: A signal came. Complete runs stay.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"{name} trains in one process. Start it without torchrun.")
    work, tracking = Path(settings.data.work_dir), settings.tracking.address
    unsent, own = work / "unsent", work / (folder or name)
    runs.check_server(tracking, settings.experiment, unsent=unsent)
    with ExitStack() as held:
        needs = ("train", "validation", split)
        prepared = held.enter_context(features_in_use(BuildInputs.of(settings), f"the command {name}", needs))
        held.enter_context(writing(own, f"the command {name}", "set `data.work_dir` to another folder"))
        key, patience = f"{name}-{digest(fixed_settings(settings), prepared.manifest['fingerprint'])}", PATIENCE_SECONDS
        run = held.enter_context(
            runs.open_run(tracking, settings.experiment, run_name=name, key=key, unsent=unsent, patience=patience)
        )
        runner = Runner(settings, prepared, own, split, part, run, held)
        try:
            yield runner
        except StoppedError as stopped:
            reason = str(stopped).partition(";")[0]
            raise StoppedError(f"{reason}; complete runs stay: repeat the command to go on") from None
        finally:
            shutil.rmtree(runner.checkpoints, ignore_errors=True)


@dataclass
class Runner:
    """Trains variants of settings.

    Attributes:
        settings: The settings that variants change.
        prepared: Features of the settings.
        folder: Folder of the command.
        split: Split whose rows judge.
        part: Part of the split's users that judges, None for all.
        run: Run in MLflow, which holds a run for each variant and seed.
        held: Holds features of variants until the command ends.
    """

    settings: Settings
    prepared: FeatureFolder
    folder: Path
    split: str
    part: Part | None
    run: runs.Run
    held: ExitStack

    def __post_init__(self) -> None:
        self.checkpoints, self._kept = self.folder / "checkpoints", self.folder / self.prepared.manifest["fingerprint"]
        self._kept.mkdir(parents=True, exist_ok=True)
        for other in self.folder.iterdir():  # Runs on other features, and weights that a killed command left.
            if other.is_dir() and other not in (self._kept, self.folder / "features"):
                shutil.rmtree(other, ignore_errors=True)
        self._features = {self._identify(self.settings): self.prepared}
        self._rows = dict[Path, PredictedRows]()

    def train(self, variants: Sequence[Variant], seeds: Sequence[int]) -> list[TrainedVariant]:
        """Train all variants with all seeds, but those whose predictions are complete.

        Raises:
            UserError: A variant has an unknown key, or can't be trained.
            StoppedError: A signal came.
        """
        wanted = {variant.name: [self.make_task(variant, seed) for seed in seeds] for variant in variants}
        by_seed = [task for same_seed in zip(*wanted.values(), strict=True) for task in same_seed]
        tasks = list({task.file: task for task in by_seed if not task.file.exists()}.values())
        begun = time.monotonic()
        for done, task in enumerate(tasks):
            minutes = (time.monotonic() - begun) / max(1, done) * (len(tasks) - done) / 60
            left = f" (about {max(1, round(minutes))} minutes left)" if done else ""
            say(f"run {done + 1} of {len(tasks)}: {task.name}{left}")
            self.train_task(task)
        return [self._read(variant, seeds, wanted[variant.name]) for variant in variants]

    def make_task(self, variant: Variant, seed: int) -> Task:
        """Return the run of a variant with a seed."""
        changed = variant.apply(self.settings)
        prepared = replace(self._find_features(changed), left_out=(variant.without_features, variant.without_tasks))
        training = changed.training.model_copy(update={"seed": seed})
        changed = changed.model_copy(update={"training": training})
        depends = [__version__, fixed_settings(changed), changed.training.calibration, variant.trees_alone]
        depends += [sorted(variant.without_features), sorted(variant.without_tasks), self.split, self.part]
        key = digest(*depends, prepared.manifest["fingerprint"])
        return Task(variant, changed, prepared, self._kept / f"{key}.parquet")

    def train_task(self, task: Task) -> Network | None:
        """Train, predict the rows that judge and write the predictions. Returns the network, None for trees alone."""
        settings, layout, network = task.settings, ModelLayout.of(task.prepared.layout, task.settings), None
        rows = EncodedRows(task.prepared.split(self.split), layout, part=self.part)
        with self.open_run(task.name, task) as run:
            begun = time.perf_counter()
            if task.variant.trees_alone:
                values, score, facts = _grow_trees(task, layout, rows)
            else:
                network, facts = self._train_network(task, layout, run)
                parts = (part for part, _ in rows.stream(settings.evaluation.batch_size))
                values, score = predict_rows(network.model, layout, parts, network.calibration)
            facts["seconds"] = time.perf_counter() - begun
            tasks = {each.name: values[:, place] for place, each in enumerate(layout.tasks)}
            write_predictions(task.file, tasks, score, facts)
            run.log_text(facts, "facts.json")
        return network

    @contextmanager
    def open_run(self, name: str, task: Task) -> Iterator[runs.Run]:
        """Open the run of a task in MLflow, with its settings as parameters."""
        settings, tracking = task.settings, self.settings.tracking
        with runs.open_run(
            tracking.address,
            self.settings.experiment,
            run_name=name,
            key=f"{self.run.run_id}-{task.file.stem}",
            parent=self.run.run_id,
            unsent=Path(self.settings.data.work_dir) / "unsent",
            patience=PATIENCE_SECONDS,
        ) as run:
            run.log_params({**settings.model_dump(mode="json", include={"model", "training"}), **settings.choices})
            run.set_tags({"variant": task.variant.name})
            yield run

    def fit(self, task: Task, run: runs.Run, watch: Watch | None = None) -> tuple[TrainingResult, str]:
        """Train the network of a task.

        Args:
            task: The task.
            run: Its run in MLflow.
            watch: Function that is called with each validation and its step.

        Returns:
            The result, whose checkpoints stay until the next run, and the precision.
        """
        settings, shared = task.settings, self._kept / "choices.json"
        training = settings.training.model_copy(update={"checkpoint_steps": 10**9, "keep_checkpoints": 1})
        layout = ModelLayout.of(task.prepared.layout, settings)
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        with training_ranks(training) as (device, _):
            trainer = Trainer(
                task.prepared,
                layout,
                settings.model,
                training,
                device,
                self.checkpoints,
                run.log_metrics,
                watch=watch,
                choices=read_choices(shared),
            )
            if training.precision == "auto" and not shared.exists():
                write_choices(shared, trainer.choices)
            return trainer.run(), trainer.choices.precision

    def judge(self, best: Validation) -> float:
        """Return the objective of a validation on the selecting rows, by the measure of the base settings."""
        return best.objective(self.settings.training.monitor, ModelLayout.of(self.prepared.layout, self.settings))

    def _train_network(self, task: Task, layout: ModelLayout, run: runs.Run) -> tuple[Network, dict[str, Any]]:
        """Train as `train_model` does, without keeping anything. Returns the network and facts about the run."""
        settings, prepared = task.settings, task.prepared
        result, precision = self.fit(task, run)
        model = best_network(settings, prepared, result)
        assert result.best is not None, "every training is validated at its end"
        run.log_metrics(result.best.flat("best"), result.best_step)
        if settings.model.trees is not None:
            model.trees = grow_trees(settings, prepared, layout, model)
        facts = {
            "selecting": self.judge(result.best),
            "best_step": result.best_step,
            "steps": result.steps,
            "precision": precision,
            "early_end": find_early_end(result.history, result.best_step, layout, settings.training),
            "parameters": sum(each.numel() for each in model.parameters()),
        }
        return Network(model, layout, calibrate(settings, prepared, model)), facts

    def _read(self, variant: Variant, seeds: Sequence[int], tasks: Sequence[Task]) -> TrainedVariant:
        files, folder = tuple(task.file for task in tasks), tasks[0].prepared.folder
        if folder not in self._rows:
            whole = replace(tasks[0].prepared, left_out=((), ()))
            self._rows[folder] = read_labels(self.settings, whole, self.split, self.part)
        facts = tuple(read_predictions(file)[2] for file in files)
        return TrainedVariant(variant, tuple(seeds), self._rows[folder], files, facts)

    def _find_features(self, settings: Settings) -> FeatureFolder:
        """Return features of a variant, which are built first if they differ from the others."""
        key = self._identify(settings)
        if key not in self._features:
            inputs = replace(BuildInputs.of(settings), work=self.folder / "features" / key)
            needs = ("train", "validation", self.split)
            self._features[key] = self.held.enter_context(features_in_use(inputs, "a comparison", needs))
        return self._features[key]

    def _identify(self, settings: Settings) -> str:
        data = settings.data.model_dump(mode="json", exclude={"work_dir"})
        return digest(settings.schema_.identity(), settings.split.windows(), data)


def _grow_trees(task: Task, layout: ModelLayout, rows: EncodedRows) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Grow the trees of `baselines` in place of a network. Returns predictions (N, T), scores (N,), and facts."""
    settings = task.settings
    learnt, held_out = read_inputs(settings, task.prepared, layout)
    boosted, facts = boost_tasks(settings, layout, learnt, held_out)
    values = predict_calibrated(settings, layout, boosted, held_out, rows)
    weights = np.array([each.score_weight for each in layout.tasks])
    return values, np.log(np.clip(values, 1e-12, None)) @ weights, {"trees": facts}
