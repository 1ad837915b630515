"""Train variants with several seeds, and keep the predictions of each run on the rows on which variants are compared.

    FOLDER/FINGERPRINT/KEY.parquet     predictions of a run, where KEY hashes everything that they depend on
    FOLDER/FINGERPRINT/choices.json    the precision that all runs share
    FOLDER/features/                   features of variants that change them

A run with complete predictions isn't repeated. No model is registered, and no weights are kept.
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
from mmoe_rec.batches.encoded_dataset import EncodedDataset, ValidationPart
from mmoe_rec.errors import StoppedError, UserError
from mmoe_rec.evaluation.evaluate import predict_rows, read_labels
from mmoe_rec.evaluation.sums import EvaluationSums, PredictedRows
from mmoe_rec.locks import write_lock
from mmoe_rec.model.mmoe import RankingModel
from mmoe_rec.model.model_layout import ModelLayout
from mmoe_rec.model.score import Calibration
from mmoe_rec.preprocessing.build_inputs import BuildInputs
from mmoe_rec.preprocessing.prepare import FeatureFolder, lock_features
from mmoe_rec.progress import say
from mmoe_rec.settings.load import override_settings
from mmoe_rec.settings.sections import Settings
from mmoe_rec.tracking import runs
from mmoe_rec.tracking.runs import MAX_WAIT_SECONDS
from mmoe_rec.training.baselines import fit_trees_per_task, predict_calibrated, read_tree_inputs
from mmoe_rec.training.distributed import training_process_group
from mmoe_rec.training.loop import Trainer, TrainingResult
from mmoe_rec.training.provenance import fixed_settings
from mmoe_rec.training.stacking import grow_trees
from mmoe_rec.training.steps import read_precision_choice, write_precision_choice
from mmoe_rec.training.train import calibrate, load_best_network
from mmoe_rec.training.validation import Validation

ValidationCallback = Callable[[Validation, int], None]
# Key in the metadata of a Parquet file, under which the facts about a run are stored.
_FACTS_KEY = b"mmoe_rec"


@dataclass(frozen=True)
class Variant:
    """A named change of the settings.

    Attributes:
        name: Name, unique within the comparison.
        overrides: Overrides of the settings, such as `model.experts.count=1`.
        without_features: Features that the model doesn't read, although the built features contain them.
        without_tasks: Tasks that the model doesn't learn. It keeps features that are made from labels of these tasks.
        trees_only: Whether to grow boosted trees instead of training a network.
        is_simpler: Whether the variant is simpler than the base, and so worth adopting without a gain.
    """

    name: str
    overrides: tuple[str, ...] = ()
    without_features: tuple[str, ...] = ()
    without_tasks: tuple[str, ...] = ()
    trees_only: bool = False
    is_simpler: bool = False

    def apply(self, settings: Settings) -> Settings:
        """Return the settings with the overrides applied. Raises UserError for an unknown key or an invalid value."""
        words = [f"--{override}" for override in self.overrides]
        return override_settings(settings, words, f"variant '{self.name}'") if words else settings

    @property
    def cli_options(self) -> str:
        """Options that apply the overrides and leave out the features in another command."""
        words = [*self.overrides, *(f"features.{name}=null" for name in self.without_features)]
        return " ".join(shlex.quote(f"--{word}") for word in words)


BASE_VARIANT = Variant("these settings")


@dataclass(frozen=True)
class Network:
    """A trained network as it would be served."""

    model: RankingModel
    layout: ModelLayout
    calibration: Calibration


def write_run_predictions(
    file: Path, tasks: Mapping[str, np.ndarray], score: np.ndarray, facts: Mapping[str, Any]
) -> None:
    """Write the predictions of a run.

    Args:
        file: File to write.
        tasks: Task -> predictions, one for each row on which variants are compared.
        score: Score of each row.
        facts: Facts about the run, stored as metadata.
    """
    table = pa.table({**tasks, "score": score}).replace_schema_metadata({_FACTS_KEY: json.dumps(facts)})
    with atomic_file(file) as path:
        pq.write_table(table, path, compression="zstd")


def read_run_predictions(file: Path) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, Any]]:
    """Read the task predictions, the scores and the facts of a run. Raises UserError for a damaged file."""
    try:
        table = pq.read_table(file)
    except (OSError, pa.ArrowException):
        raise UserError(f"'{file}' is damaged. Remove it and repeat the command.") from None
    *names, score = table.column_names
    facts = json.loads(table.schema.metadata[_FACTS_KEY])
    return {name: table.column(name).to_numpy() for name in names}, table.column(score).to_numpy(), facts


@dataclass(frozen=True)
class RunSpec:
    """Everything that defines a run.

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
        """Name for progress messages and MLflow."""
        return f"{self.variant.name}, seed {self.settings.training.seed}"


@dataclass(frozen=True)
class TrainedVariant:
    """The runs of a variant, in the order of the seeds.

    Attributes:
        variant: The variant.
        seeds: Seeds of the runs.
        rows: Rows on which variants are compared, with their labels.
        files: Prediction files of the runs.
        facts: Facts about the runs, such as `seconds`, and `steps` of a network.
    """

    variant: Variant
    seeds: tuple[int, ...]
    rows: PredictedRows
    files: tuple[Path, ...]
    facts: tuple[dict[str, Any], ...]

    def measure(self) -> list[EvaluationSums]:
        """Return each run's sums for metrics. They aren't cached, since the sums of many runs would fill the memory."""
        predicted = (read_run_predictions(file) for file in self.files)
        return [self.rows.with_predictions(tasks, score).sum() for tasks, score, _ in predicted]


@contextmanager
def open_runner(
    settings: Settings, name: str, split: str, part: ValidationPart | None = None, folder: str | None = None
) -> Iterator["Runner"]:
    """Prepare features and hold the locks and the MLflow run of a command.

    Args:
        settings: Settings that variants change.
        name: Name of the command and of its run in MLflow.
        split: Split with the rows on which variants are compared.
        part: Part of the split's users whose rows are used for this, None for all users.
        folder: Name of the command's folder in `data.work_dir`. None takes `name`.

    Raises:
        UserError: Features can't be built, a split has no rows, or MLflow can't be used.
        StoppedError: A signal came. Completed runs are kept.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"{name} trains in one process. Start it without torchrun.")
    work, tracking = Path(settings.data.work_dir), settings.tracking.resolved_uri
    outbox_folder, command_folder = work / "unsent", work / (folder or name)
    runs.check_server(tracking, settings.experiment, outbox_folder=outbox_folder)
    with ExitStack() as exit_stack:
        splits = ("train", "validation", split)
        prepared = exit_stack.enter_context(lock_features(BuildInputs.of(settings), f"the command {name}", splits))
        exit_stack.enter_context(
            write_lock(command_folder, f"the command {name}", "set `data.work_dir` to another folder")
        )
        key = digest(fixed_settings(settings), prepared.manifest["fingerprint"])
        run = exit_stack.enter_context(
            runs.open_run(
                tracking,
                settings.experiment,
                run_name=name,
                resume_key=f"{name}-{key}",
                outbox_folder=outbox_folder,
                max_wait_seconds=MAX_WAIT_SECONDS,
            )
        )
        runner = Runner(settings, prepared, command_folder, split, part, run, exit_stack)
        try:
            yield runner
        except StoppedError as stopped:
            reason = str(stopped).partition(";")[0]
            raise StoppedError(f"{reason}; completed runs are kept. Repeat the command to continue.") from None
        finally:
            shutil.rmtree(runner.checkpoints, ignore_errors=True)


@dataclass
class Runner:
    """Trains variants of settings.

    Attributes:
        settings: Settings that variants change.
        prepared: Features of the settings.
        folder: Folder of the command.
        split: Split with the rows on which variants are compared.
        part: Part of the split's users whose rows are used for this, None for all users.
        run: Run of the command in MLflow, the parent of a run for each variant and seed.
        exit_stack: Keeps the features of variants locked until the command ends.
    """

    settings: Settings
    prepared: FeatureFolder
    folder: Path
    split: str
    part: ValidationPart | None
    run: runs.Run
    exit_stack: ExitStack

    def __post_init__(self) -> None:
        self.checkpoints = self.folder / "checkpoints"
        self._run_folder = self.folder / self.prepared.manifest["fingerprint"]
        self._run_folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():  # Remove runs on other features, and weights left by a killed command.
            if path.is_dir() and path not in (self._run_folder, self.folder / "features"):
                shutil.rmtree(path, ignore_errors=True)
        self._features = {self._identify(self.settings): self.prepared}
        self._rows = dict[Path, PredictedRows]()

    def train(self, variants: Sequence[Variant], seeds: Sequence[int]) -> list[TrainedVariant]:
        """Train each variant with each seed, except for runs with complete predictions.

        Args:
            variants: The variants.
            seeds: Seeds of the runs of each variant.

        Raises:
            UserError: A variant has an unknown key or can't be trained.
            StoppedError: A signal came.
        """
        specs = {variant.name: [self.plan_run(variant, seed) for seed in seeds] for variant in variants}
        by_seed = [spec for same_seed in zip(*specs.values(), strict=True) for spec in same_seed]
        pending = list({spec.file: spec for spec in by_seed if not spec.file.exists()}.values())
        start = time.monotonic()
        for done, spec in enumerate(pending):
            minutes = (time.monotonic() - start) / max(1, done) * (len(pending) - done) / 60
            left = f" (about {max(1, round(minutes))} minutes left)" if done else ""
            say(f"run {done + 1} of {len(pending)}: {spec.name}{left}")
            self.train_run(spec)
        return [self._read(variant, seeds, specs[variant.name]) for variant in variants]

    def plan_run(self, variant: Variant, seed: int) -> RunSpec:
        """Return the run of a variant with a seed, without training it.

        Args:
            variant: The variant.
            seed: Seed of the run.
        """
        changed = variant.apply(self.settings)
        prepared = replace(self._find_features(changed), left_out=(variant.without_features, variant.without_tasks))
        changed = changed.model_copy(update={"training": changed.training.model_copy(update={"seed": seed})})
        dependencies = [__version__, fixed_settings(changed), changed.training.calibration, variant.trees_only]
        dependencies += [sorted(variant.without_features), sorted(variant.without_tasks), self.split, self.part]
        key = digest(*dependencies, prepared.manifest["fingerprint"])
        return RunSpec(variant, changed, prepared, self._run_folder / f"{key}.parquet")

    def train_run(self, spec: RunSpec) -> Network | None:
        """Train a run and write its predictions. Return the network, or None if the variant has only trees."""
        settings, layout, network = spec.settings, ModelLayout.of(spec.prepared.layout, spec.settings), None
        rows = EncodedDataset(spec.prepared.split(self.split), layout, part=self.part)
        with self.open_run(spec.name, spec) as run:
            start = time.perf_counter()
            if spec.variant.trees_only:
                values, score, facts = _grow_trees(spec, layout, rows)
            else:
                network, facts = self._train_network(spec, layout, run)
                parts = (part for part, _ in rows.stream(settings.evaluation.batch_size))
                values, score = predict_rows(network.model, layout, parts, network.calibration)
            facts["seconds"] = time.perf_counter() - start
            tasks = {task.name: values[:, index] for index, task in enumerate(layout.tasks)}
            write_run_predictions(spec.file, tasks, score, facts)
            run.log_text(facts, "facts.json")
        return network

    @contextmanager
    def open_run(self, name: str, spec: RunSpec) -> Iterator[runs.Run]:
        """Open a run in MLflow, with its settings as parameters.

        Args:
            name: Name of the run.
            spec: The run.
        """
        settings, tracking = spec.settings, self.settings.tracking
        with runs.open_run(
            tracking.resolved_uri,
            self.settings.experiment,
            run_name=name,
            resume_key=f"{self.run.run_id}-{spec.file.stem}",
            parent_run_id=self.run.run_id,
            outbox_folder=Path(self.settings.data.work_dir) / "unsent",
            max_wait_seconds=MAX_WAIT_SECONDS,
        ) as run:
            run.log_params(
                {**settings.model_dump(mode="json", include={"model", "training"}), **settings.model_choices}
            )
            run.set_tags({"variant": spec.variant.name})
            yield run

    def fit(
        self, spec: RunSpec, run: runs.Run, on_validation: ValidationCallback | None = None
    ) -> tuple[TrainingResult, str]:
        """Train the network of a run.

        Args:
            spec: The run.
            run: The run in MLflow.
            on_validation: Function to call with each validation and its step.

        Returns:
            The result, and the floating-point precision of the run, such as bf16. Checkpoints exist until the next run.
        """
        settings, shared = spec.settings, self._run_folder / "choices.json"
        training = settings.training.model_copy(update={"checkpoint_steps": 10**9, "keep_checkpoints": 1})
        layout = ModelLayout.of(spec.prepared.layout, settings)
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        with training_process_group(training) as (device, _):
            trainer = Trainer(
                spec.prepared,
                layout,
                settings.model,
                training,
                device,
                self.checkpoints,
                run.log_metrics,
                on_validation=on_validation,
                precision_choice=read_precision_choice(shared),
            )
            if training.precision == "auto" and not shared.exists():
                write_precision_choice(shared, trainer.precision_choice)
            return trainer.run(), trainer.precision_choice.precision

    def monitored_metric(self, best: Validation) -> float:
        """Return the value of the monitored metric (`training.monitor`) in a validation.

        The base settings name the metric, so that variants that change `training.monitor` stay comparable.
        """
        return best.objective(self.settings.training.monitor, ModelLayout.of(self.prepared.layout, self.settings))

    def _train_network(self, spec: RunSpec, layout: ModelLayout, run: runs.Run) -> tuple[Network, dict[str, Any]]:
        """Train the network of a run without saving it. Return the network and facts about the run."""
        settings, prepared = spec.settings, spec.prepared
        result, precision = self.fit(spec, run)
        model = load_best_network(settings, prepared, result)
        assert result.best is not None, "every run is validated at its end"
        run.log_metrics(result.best.to_metrics("best"), result.best_step)
        if settings.model.trees is not None:
            model.trees = grow_trees(settings, prepared, layout, model)
        facts = {
            "monitored_metric": self.monitored_metric(result.best),
            "best_step": result.best_step,
            "steps": result.steps,
            "precision": precision,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }
        return Network(model, layout, calibrate(settings, prepared, model)), facts

    def _read(self, variant: Variant, seeds: Sequence[int], specs: Sequence[RunSpec]) -> TrainedVariant:
        files, folder = tuple(spec.file for spec in specs), specs[0].prepared.folder
        if folder not in self._rows:
            complete = replace(specs[0].prepared, left_out=((), ()))
            self._rows[folder] = read_labels(self.settings, complete, self.split, self.part)
        facts = tuple(read_run_predictions(file)[2] for file in files)
        return TrainedVariant(variant, tuple(seeds), self._rows[folder], files, facts)

    def _find_features(self, settings: Settings) -> FeatureFolder:
        """Return the features of a variant. Build them unless an earlier variant has the same features."""
        key = self._identify(settings)
        if key not in self._features:
            inputs = replace(BuildInputs.of(settings), work=self.folder / "features" / key)
            splits = ("train", "validation", self.split)
            self._features[key] = self.exit_stack.enter_context(lock_features(inputs, "a comparison", splits))
        return self._features[key]

    def _identify(self, settings: Settings) -> str:
        data = settings.data.model_dump(mode="json", exclude={"work_dir"})
        return digest(settings.schema_.identity(), settings.split.windows(), data)


def _grow_trees(
    spec: RunSpec, layout: ModelLayout, rows: EncodedDataset
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Grow trees as the command `baselines` does. Return predictions (rows, tasks), scores (rows,) and facts."""
    settings = spec.settings
    train_rows, held_out = read_tree_inputs(settings, spec.prepared, layout)
    boosted, facts = fit_trees_per_task(settings, layout, train_rows, held_out)
    values = predict_calibrated(settings, layout, boosted, held_out, rows)
    weights = np.array([task.score_weight for task in layout.tasks])
    return values, np.log(np.clip(values, 1e-12, None)) @ weights, {"trees": facts}
