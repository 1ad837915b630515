"""Trainings of variants of one setting on the same encoded features: other models, or without some features or tasks.

    FOLDER/FINGERPRINT/KEY.parquet    what a variant that was trained with a seed predicts for the rows of a split

No feature is built anew, no model is registered, and weights go once the rows are scored. A training that has ended is
found again by all that it depends on (KEY), also after a kill.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec import __version__
from mmoe_rec.atomic import atomic_file, digest, write_text
from mmoe_rec.errors import StoppedError, UserError
from mmoe_rec.jobs.places import log_and_place
from mmoe_rec.jobs.seeds import CHOICES, LostProcessError, measure_choices, run_each, run_side_by_side, share_threads
from mmoe_rec.locks import writing
from mmoe_rec.preprocessing.prepare import FeatureFolder, existing, features_in_use
from mmoe_rec.progress import bar
from mmoe_rec.settings.sections import Settings
from mmoe_rec.tracking import runs
from mmoe_rec.tracking.outbox import PATIENCE_SECONDS, UnreachableError
from mmoe_rec.training.origin import fixed_settings

if TYPE_CHECKING:
    from mmoe_rec.evaluation.scoring import ScoredRows
    from mmoe_rec.evaluation.sums import EvaluationSums

STARTS = 3
"""Of a training that is killed each time, until it counts as failed."""
FORMAT = 2
_FACTS = b"mmoe_rec"  # in a file's metadata


@dataclass(frozen=True)
class Variant:
    """What is trained.

    name: of no other variant; settings: those that features exist for, with another `model` or `training`, or other
    choices of tasks and features that no encoded row depends on; without_features, without_tasks: names of those that
    are left out (labels of a task still make counters); trees_alone: boosted trees and no network.
    """

    name: str
    settings: Settings
    without_features: tuple[str, ...] = ()
    without_tasks: tuple[str, ...] = ()
    trees_alone: bool = False

    def key(self, seed: int, split: str) -> str:
        """Changes with all that its predictions depend on besides the features."""
        of_model = [fixed_settings(self.settings), self.settings.training.calibration, self.trees_alone]
        left_out = [sorted(self.without_features), sorted(self.without_tasks)]
        return digest(FORMAT, __version__, of_model, left_out, seed, split)


@dataclass(frozen=True)
class TrainedVariant:
    """A variant's trainings, in the order of the seeds.

    rows: of the split; files: what each predicts for them; seconds: that each took; facts: of each, such as `best_step`
    and `steps` of a network.
    """

    variant: Variant
    seeds: tuple[int, ...]
    rows: ScoredRows
    files: tuple[Path, ...]
    seconds: tuple[float, ...]
    facts: tuple[dict[str, Any], ...]

    def measure(self) -> tuple[EvaluationSums, ...]:
        """All metrics of each, on the rows of the split. They are not kept: those of many would fill memory."""
        read = (_read_predictions(file) for file in self.files)
        return tuple(replace(self.rows, predictions=each, score=score).measure() for each, score, _ in read)


@contextmanager
def open_variants(
    settings: Settings, name: str, split: str, at_once: int = 1, depends: Sequence[Any] = ()
) -> Iterator[VariantTrainings]:
    """Makes what variants are trained on ready, and holds it.

    name: of the command, of the folder in `data.work` that it alone writes, and of the run in MLflow; split: whose rows
    are predicted, `validation` or `test`; at_once: how many run at a time; depends: what tells the run from others of
    the same settings and features. Raises UserError where features can't be built, a split has no rows, or MLflow can't
    be used.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"{name} trains in one process: start it without torchrun")
    work, tracking = Path(settings.data.work), settings.tracking.address
    existing(*log_and_place(settings))  # a wrong log is reported before MLflow and torch are loaded
    runs.check_server(tracking, settings.experiment, unsent=work / "unsent")
    needs = ("train", "validation", split)
    with (
        features_in_use(*log_and_place(settings), f"the command {name}", needs) as prepared,
        writing(work / name, f"the command {name}", "set `data.work` to another folder"),
    ):
        key = f"{name}-{digest(fixed_settings(settings), prepared.manifest['fingerprint'], *depends)}"
        with runs.open_run(
            tracking, settings.experiment, run_name=name, key=key, unsent=work / "unsent", patience=PATIENCE_SECONDS
        ) as run:
            yield VariantTrainings(settings, prepared, work / name, split, at_once, run)


class VariantTrainings:
    """Trains variants on the features of one setting, and measures them on the rows of one split.

    folder: of the command; run: in MLflow, which holds a run for each training, None for none.
    """

    def __init__(
        self,
        settings: Settings,
        prepared: FeatureFolder,
        folder: Path,
        split: str,
        at_once: int = 1,
        run: runs.Run | None = None,
    ) -> None:
        self.settings, self.prepared, self.folder, self.split = settings, prepared, folder, split
        self.at_once, self.run = at_once, run
        self.trained = folder / "trainings" / str(prepared.manifest["fingerprint"])
        for other in self.trained.parent.glob("*"):  # of other features; and what killed trainings left
            if other != self.trained:
                shutil.rmtree(other, ignore_errors=True)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        self.trained.mkdir(parents=True, exist_ok=True)
        for each in self.trained.glob("*.failed"):  # it may have been for a full disk, which is no longer
            each.unlink()
        self._rows: ScoredRows | None = None
        self.failed = dict[str, str]()

    def train(self, variants: Sequence[Variant], seeds: Sequence[int]) -> dict[str, TrainedVariant]:
        """Name of each variant -> its trainings with all seeds, of which those that were trained before stay.

        Raises UserError where one can't be trained, StoppedError where a signal came.
        """
        made = [self._make_task(each, seed) for seed in seeds for each in variants]
        tasks = {each.file: each for each in made if not each.file.exists()}
        logs = [self.folder / f"training_{number + 1}.log" for number in range(len(tasks))]
        if self.at_once > 1:
            for log in logs:
                log.unlink(missing_ok=True)
        with self._keep_ended():
            self._share_choices(tasks.values())
            run_each(_train, list(tasks.values()), [each.name for each in tasks.values()], logs, self.at_once)
        return {each.name: self._read(each, seeds) for each in variants}

    def _make_task(self, variant: Variant, seed: int) -> _Task:
        parent = None if self.run is None else self.run.run_id
        unsent = Path(self.settings.data.work) / "unsent" if self.at_once == 1 else None
        prepared = replace(self.prepared, left_out=(variant.without_features, variant.without_tasks))
        training = variant.settings.training.model_copy(update={"seed": seed})
        settings = share_threads(variant.settings.model_copy(update={"training": training}), self.at_once)
        own = replace(variant, settings=settings)
        return _Task(
            own, prepared, self.split, self._file_of(variant, seed), self.folder / "checkpoints", parent, unsent
        )

    def train_until(
        self, pairs: Sequence[tuple[Variant, int]], seconds: float, costs: Sequence[float], pace: float = 0.0
    ) -> None:
        """Trains variants, each with a seed, and begins none that would not end within so many seconds. One that fails,
        or whose process is killed three times, is left out, and `failed` says why.

        costs: times that each takes as long as others; pace: seconds of one of cost 1, as far as known. Raises
        StoppedError where a signal came, UserError where MLflow does not answer.
        """
        tasks = [(self._make_task(*pair), cost) for pair, cost in zip(pairs, costs, strict=True)]
        until, losses = time.monotonic() + seconds, 0
        with self._keep_ended():
            self._share_choices(task for task, _ in tasks)
            while waiting := [each for each in tasks if not (each[0].file.exists() or each[0].failed.exists())]:
                lots: list[_Lot] = [[] for _ in range(min(self.at_once, len(waiting)))]
                for each in waiting:  # to the process that is done with the others first
                    min(lots, key=lambda lot: sum(cost for _, cost in lot)).append(each)
                train = partial(_train_in_turn, until=until, pace=pace)
                if len(lots) == 1:
                    train(lots[0])
                    break
                try:
                    self._train_lots(train, lots)
                    break
                except LostProcessError as error:
                    losses += 1
                    if losses > STARTS * len(tasks) or not any(task.starts() for task, _ in waiting):
                        raise  # it was lost before it could train
                    for task, _ in waiting:
                        if task.starts() >= STARTS and not task.file.exists():
                            write_text(task.failed, str(error))
        failed = [task for task, _ in tasks if task.failed.exists()]
        self.failed |= {task.name: task.failed.read_text(encoding="utf-8") for task in failed}

    def _share_choices(self, tasks: Iterable[_Task]) -> None:
        """Measure what all networks compute in by the first one, unless an earlier one did."""
        from mmoe_rec.training.choices import write_choices

        first = next((each for each in tasks if not each.variant.trees_alone), None)
        if first is not None and not first.choices.exists():
            measured = measure_choices(first.variant.settings, first.prepared, self.folder)
            write_choices(first.choices, measured)

    @contextmanager
    def _keep_ended(self) -> Iterator[None]:
        """Around trainings: leaves no weights behind, and says what stays where a signal came."""
        try:
            yield
        except StoppedError as stopped:
            who = str(stopped).partition(";")[0]
            raise StoppedError(f"{who}; trainings that ended stay: go on with the same command") from None
        finally:
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)

    def _train_lots(self, train: Callable[[_Lot], None], lots: Sequence[_Lot]) -> None:
        """Trains each lot in a process of its own, and shows how many trainings have ended."""
        logs = [self.folder / f"training_{number + 1}.log" for number in range(len(lots))]
        files = [task.file for lot in lots for task, _ in lot]
        with bar() as progress:
            shown = progress.add_task("trainings", total=len(files))

            def look() -> None:
                progress.update(shown, completed=sum(file.exists() for file in files))

            for _ in run_side_by_side(train, lots, logs, len(lots), look):
                pass

    def read(self, variant: Variant, seed: int) -> TrainedVariant | None:
        """What a training gave, None where it has not ended."""
        return self._read(variant, [seed]) if self._make_task(variant, seed).file.exists() else None

    def _rows_of(self, variant: Variant) -> ScoredRows:
        from mmoe_rec.evaluation.scoring import read_labels
        from mmoe_rec.model.layout import ModelLayout

        if self._rows is None:
            self._rows = read_labels(self.settings, self.prepared, self.split)
        layout = ModelLayout.of(self.prepared.layout.without(tasks=variant.without_tasks), variant.settings)
        return self._rows.of_tasks(layout)

    def _file_of(self, variant: Variant, seed: int) -> Path:
        return self.trained / f"{variant.key(seed, self.split)}.parquet"

    def _read(self, variant: Variant, seeds: Sequence[int]) -> TrainedVariant:
        files = tuple(self._file_of(variant, seed) for seed in seeds)
        facts = tuple(_read_predictions(file)[2] for file in files)
        seconds = tuple(float(each.pop("seconds")) for each in facts)
        return TrainedVariant(variant, tuple(seeds), self._rows_of(variant), files, seconds, facts)


def _read_predictions(file: Path) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """(N, T) predictions, (N,) scores, and facts of a training."""
    try:
        table = pq.read_table(file)
    except (OSError, pa.ArrowException):
        raise UserError(f"'{file}' can't be read, it may be damaged: remove it, and go on") from None
    *predicted, score = (table.column(name).to_numpy() for name in table.column_names)
    return np.column_stack(predicted), score, json.loads(table.schema.metadata[_FACTS])


@dataclass(frozen=True)
class _Task:
    """One training. variant: with settings that have its seed; file: for what it predicts; checkpoints: a folder that
    may go; parent: id of the run that it is a part of, None for no run; unsent: as in `runs.open_run`."""

    variant: Variant
    prepared: FeatureFolder
    split: str
    file: Path
    checkpoints: Path
    parent: str | None
    unsent: Path | None

    @property
    def choices(self) -> Path:
        """The file of what all networks of the comparison compute in."""
        return self.file.with_name(CHOICES)

    @property
    def name(self) -> str:
        """In words."""
        return f"{self.variant.name}, seed {self.variant.settings.training.seed}"

    @property
    def failed(self) -> Path:
        """The file that says why it failed, if it did."""
        return self.file.with_suffix(".failed")

    @property
    def begun(self) -> Path:
        """The file that has a line for each start of this training that neither ended nor was asked to stop."""
        return self.file.with_suffix(".begun")

    def starts(self) -> int:
        """How often it was started without an end."""
        return len(self.begun.read_text(encoding="utf-8").splitlines()) if self.begun.exists() else 0


_Lot = list[tuple[_Task, float]]


def _train_in_turn(lot: _Lot, until: float, pace: float) -> None:
    """Trains one after the other, each with what it costs. until: of `time.monotonic`; pace: see `train_until`."""
    paces = [pace] if pace else []
    for task, cost in lot:
        begun = time.monotonic()
        if begun + cost * sum(paces) / max(1, len(paces)) > until:
            continue
        if task.starts() >= STARTS:
            write_text(task.failed, f"its process was killed {STARTS} times: does it need more memory than there is?")
            continue
        with task.begun.open("a", encoding="utf-8") as file:
            file.write(f"process {os.getpid()}\n")
        try:
            _train(task)
        except (StoppedError, KeyboardInterrupt, UnreachableError):
            task.begun.unlink()
            raise
        except UserError as error:
            write_text(task.failed, str(error))
        task.begun.unlink()
        paces.append((time.monotonic() - begun) / cost)


def _train(task: _Task) -> None:
    """Trains, predicts the rows of the split, and writes that."""
    variant, settings = task.variant, task.variant.settings
    if task.parent is None:
        _train_within(task, runs.Run(None))
        return
    with runs.open_run(
        settings.tracking.address,
        settings.experiment,
        run_name=task.name,
        key=f"{task.parent}-{task.file.stem}",
        parent=task.parent,
        unsent=task.unsent,
        patience=PATIENCE_SECONDS,
    ) as run:
        run.log_params({**settings.model_dump(mode="json", include={"model", "training"}), **settings.choices})
        left_out = {"features": variant.without_features, "tasks": variant.without_tasks}
        run.set_tags({f"without.{what}": ", ".join(names) for what, names in left_out.items() if names})
        _train_within(task, run)


def _train_within(task: _Task, run: runs.Run) -> None:
    begun = time.perf_counter()
    scored, facts = (_grow_trees if task.variant.trees_alone else _train_network)(task, run)
    columns = {task.name: scored.predictions[:, place] for place, task in enumerate(scored.layout.tasks)}
    table = pa.table({**columns, "score": scored.score})
    text = json.dumps({**facts, "seconds": time.perf_counter() - begun})
    try:
        with atomic_file(task.file) as file:
            pq.write_table(table.replace_schema_metadata({_FACTS: text}), file, compression="zstd")
    except OSError as error:
        raise UserError(f"'{task.file}' can't be written: {error.strerror or error}") from None
    run.log_text(text, "facts.json")


def _train_network(task: _Task, run: runs.Run) -> tuple[ScoredRows, dict[str, Any]]:
    """As `train_model` does, but that nothing is kept."""
    from mmoe_rec.batches.encoded_rows import Part
    from mmoe_rec.jobs.evaluate import score_by
    from mmoe_rec.jobs.stacking import grow_trees
    from mmoe_rec.jobs.train import best_network, calibrate, measure_served
    from mmoe_rec.model.layout import ModelLayout
    from mmoe_rec.training.choices import read_choices
    from mmoe_rec.training.loop import Trainer
    from mmoe_rec.training.ranks import training_ranks
    from mmoe_rec.training.validation import find_early_end

    settings, prepared = task.variant.settings, task.prepared
    layout, folder = ModelLayout.of(prepared.layout, settings), task.checkpoints / task.file.stem
    training = settings.training.model_copy(update={"checkpoint_steps": 10**9, "checkpoints_kept": 1})
    choices = read_choices(task.choices)
    try:
        with training_ranks(training) as (device, _):
            trainer = Trainer(
                prepared, layout, settings.model, training, device, folder, run.log_metrics, choices=choices
            )
            result = trainer.run()
        model = best_network(settings, prepared, result)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if settings.model.trees is not None:
        model.trees = grow_trees(settings, prepared, layout, model)
    calibration = calibrate(settings, prepared, model)
    served = measure_served(settings, prepared, model, calibration, Part.SELECTING)
    run.log_metrics(served.flat("best"), result.best_step)
    scored = score_by(settings, model, layout, prepared.split(task.split), calibration, task.variant.name)
    return scored, {
        "best_step": result.best_step,
        "steps": result.steps,
        "precision": trainer.choices.precision,
        "early_end": find_early_end(result.history, result.best_step, layout, settings.training),
        "parameters": sum(each.numel() for each in model.parameters()),
    }


def _grow_trees(task: _Task, run: runs.Run) -> tuple[ScoredRows, dict[str, Any]]:
    """Grow the LightGBM trees of `baselines` in place of a network."""
    from mmoe_rec.batches.encoded_rows import EncodedRows
    from mmoe_rec.evaluation.scoring import read_labels
    from mmoe_rec.jobs.baselines import boost_tasks, predict_calibrated, read_inputs
    from mmoe_rec.jobs.trees import LIGHTGBM

    settings, prepared = task.variant.settings, task.prepared
    layout = prepared.layout
    learnt, held_out, last = read_inputs(settings, prepared, layout)
    boosted, facts = boost_tasks(settings, layout, learnt, held_out, [LIGHTGBM], last)
    rows = EncodedRows(prepared.split(task.split), layout)
    predicted = predict_calibrated(settings, layout, boosted[LIGHTGBM.name], held_out, rows)
    return read_labels(settings, prepared, task.split).with_predictions(predicted), {"trees": facts}
