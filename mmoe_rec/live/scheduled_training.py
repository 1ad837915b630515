"""A training when one is due, for a scheduler: days are added to the features, and the model that serves starts it.

Whether one is due is told by the log's own time: the features in `data.work` end where the newest training ended, and
the tables of the model that holds the alias end where the log does. The settings' split is that of the first training;
here the newest days validate, and all rows since the newest training before them train.

Adding days replaces the rows that features hold encoded, so these are kept as they were in `data.work`/before_training
until the training on the new ones has ended, whatever became of its model. While that folder is there, a training is
under way: the same command goes on with it, or begins it anew from there where files have come meanwhile, since a
training needs features that hold all files of the log.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from mmoe_rec.atomic import atomic_folder
from mmoe_rec.errors import UserError
from mmoe_rec.jobs.places import extend_features, log_and_place
from mmoe_rec.jobs.train import train_model
from mmoe_rec.live.refresh import AliasHolder, as_of
from mmoe_rec.locks import writing
from mmoe_rec.log.checks import format_time
from mmoe_rec.log.rows import MICROSECONDS_PER_DAY
from mmoe_rec.preprocessing.logs import HeldFiles, read_held_files
from mmoe_rec.preprocessing.prepare import BUILD, FeatureFolder, existing
from mmoe_rec.settings.sections import Settings, Split
from mmoe_rec.tracking.outbox import list_waiting_runs

_KEPT = "before_training"


def choose_validation_days(settings: Settings, address: str, every: int, days: int | None) -> int:
    """How many of the newest days validate. days: as asked for, None for one more than labels take to mature.

    Raises UserError for what can't be: another model than that of the settings, or no day to train on.
    """
    own = f"models:/{settings.registered_model}@{settings.tracking.alias}"
    if address != own:
        raise UserError(
            f"--train-every-days trains the settings' own model, {own}, and --model is {address}: leave that out, or "
            "set tracking.registered_model and tracking.alias"
        )
    mature = max((task.matures_after_days for task in settings.tasks.values()), default=0)
    newest = 1 + math.ceil(mature) if days is None else days
    if newest >= every:
        why = f" (a label takes {mature:g} to mature)" if days is None and mature else ""
        raise UserError(
            f"--train-every-days {every} leaves no day to train on, as the newest {newest:,} validate{why}: train less "
            "often, or set --validation-days"
        )
    return newest


def train_when_due(settings: Settings, address: str, every: int, days: int) -> Iterator[str]:
    """Goes on with a training that is under way, or begins one if it is due; gives sentences on what was done.

    every: days between the last requests of two trainings' features; days: newest ones that validate. Raises UserError
    where a part of it fails, which leaves the alias as it was.
    """
    work = Path(settings.data.work)
    kept, prepared = work / _KEPT, FeatureFolder(work / "features")
    with writing(kept, "a scheduled training", "set `data.work` to another folder", queue=True):
        served = AliasHolder.at(address, settings.tracking.address)
        newest = as_of(served.about)
        if not kept.is_dir():
            if not (prepared.folder / "manifest.json").is_file():
                raise UserError(f"'{prepared.folder}' holds no features to which days could be added: train once first")
            last = prepared.manifest["request_microseconds"][1]
            behind = (newest - last) / MICROSECONDS_PER_DAY
            if behind < every:
                yield (
                    f"no training is due: the newest one knows requests up to {format_time(last)}, "
                    f"{max(0, behind):.1f} days behind the tables of '{served.alias}', and one is due after {every}"
                )
                return
            with writing(prepared.folder, *BUILD, queue=True), atomic_folder(kept) as folder:
                _link(prepared.folder, folder / "features")
        elif _has_ended(prepared, kept, work):
            _forget(kept)
            yield "the training that was under way has ended"
            return
        end = datetime.fromtimestamp(newest // 1_000_000 + 1, UTC)
        split = Split.model_validate({"train_end": end - timedelta(days=days), "validation_end": end})
        now = settings.model_copy(update={"split": split})
        if existing(*log_and_place(now)) is None:
            _add_days(now, served, kept, prepared)
        yield from _train(now, address, prepared, work)
        _forget(kept)


def _train(settings: Settings, address: str, prepared: FeatureFolder, work: Path) -> Iterator[str]:
    rows, end = prepared.manifest["splits"], settings.split.train_end
    assert end is not None, "days were added, so the log has times"
    yield (
        f"training on {rows['train']['rows']:,} rows before {end.isoformat()}, judged by "
        f"{rows['validation']['rows']:,} since"
    )
    trained = train_model(settings, address, resume=True)
    assert trained is not None, "one process has the first rank"
    yield from trained.compared
    yield f"model: {trained.artifact}, registered as {trained.address}"
    if list_waiting_runs(work / "unsent"):
        raise UserError("the training has ended, but MLflow has not got all of it: start the same command again")


def _add_days(settings: Settings, served: AliasHolder, kept: Path, prepared: FeatureFolder) -> None:
    """Makes features that hold all files of the log.

    The features of before come back first: others, to which days were added, may lack rows of the first of these.
    """
    from mmoe_rec.training.checkpoint import FinishedTraining, forget_training

    with writing(prepared.folder, *BUILD, queue=True), atomic_folder(prepared.folder) as folder:
        _link(kept / "features", folder)
    if FinishedTraining.read(Path(settings.data.work)) is None:
        forget_training(Path(settings.data.work) / "checkpoints")  # of features that are gone
    if extend_features(settings) is None:
        raise UserError(
            f"'{settings.data.log}' has no files that the features in '{prepared.folder}' do not hold, but the tables "
            f"of '{served.version.address}' know later requests: put back the files that these come from"
        )
    _check_all_there(served, prepared)


def _check_all_there(served: AliasHolder, prepared: FeatureFolder) -> None:
    """Raises UserError where the tables of the model that serves hold files that the features could not take in."""
    its = read_held_files(served.folder / "features")
    if its is None:
        return
    lacking = [
        address
        for mine, others in zip(HeldFiles.read(prepared.folder).logs, its.logs, strict=True)
        for address in others.files
        if address not in mine.files
    ]
    if lacking:
        raise UserError(
            f"files are gone that the tables of '{served.alias}' hold and the features in '{prepared.folder}' do not "
            f"({len(lacking):,}, such as '{lacking[0]}'), so a model trained on these would know less: put them back, "
            "and keep files until a training has taken them in"
        )


def _has_ended(prepared: FeatureFolder, kept: Path, work: Path) -> bool:
    """Whether the training on features to which days were added since they were kept has ended."""
    from mmoe_rec.training.checkpoint import FinishedTraining

    finished, now = FinishedTraining.read(work), prepared.manifest["fingerprint"]
    added = now != FeatureFolder(kept / "features").manifest["fingerprint"]
    return added and finished is not None and finished.origin.features == now


def _forget(kept: Path) -> None:
    gone = kept.with_name(f".{kept.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    kept.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    """Copies a folder whose files are replaced and never changed: as links, where the file system has them."""

    def link(one: str, other: str) -> None:
        with suppress(OSError):
            os.link(one, other)
            return
        shutil.copy2(one, other)

    shutil.copytree(source, target, copy_function=link, dirs_exist_ok=True)
