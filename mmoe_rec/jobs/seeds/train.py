"""Trainings of one setting with several seeds, and what is measured of them.

    <data.work>/seeds/SEED/         checkpoints and model of each, with the features of `data.work`
    <data.work>/seeds/seeds.json    and report.html, which shows it: there once all have ended

The trainings are runs within one of MLflow's; none of their models is registered.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

from mmoe_rec.devices import usable_cores
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.trainings import TrainingsMean
from mmoe_rec.inference.artifact import version_of
from mmoe_rec.jobs.places import features_in_use
from mmoe_rec.jobs.run_page import as_code, command
from mmoe_rec.jobs.seeds.found import Found
from mmoe_rec.jobs.seeds.measuring import Trainings, checked, measured
from mmoe_rec.jobs.seeds.side_by_side import side_by_side
from mmoe_rec.jobs.train import train_model
from mmoe_rec.locks import reading, writing
from mmoe_rec.progress import bar, say
from mmoe_rec.settings.sections import Settings
from mmoe_rec.tracking import runs


def train_seeds(
    settings: Settings, number: int, resume: bool = False, at_once: int = 1, against: Sequence[str] = ()
) -> Found:
    """Trains with `training.seed` and those after it, measures all on the test rows, and writes what was found.

    resume: go on with what an earlier run has left; trainings that have ended stay; at_once: how many run at a time;
    against: `data.work` of other settings, whose trainings of several seeds these are compared with. Raises UserError
    where several processes train, where there are no test rows, or no such trainings.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--seeds trains in one process: start it without torchrun")
    folder, uri, what = Path(settings.data.work) / "seeds", settings.tracking.address, "trainings with several seeds"
    seeds = tuple(range(settings.training.seed, settings.training.seed + number))
    others = checked(against, settings, folder)
    with (
        features_in_use(settings, what) as prepared,
        writing(folder, what, "set `data.work` to another folder"),
        ExitStack() as held,
    ):
        prepared.require_rows("train", "validation", "test")
        for each in others.values():
            held.enter_context(reading(each.folder, what))
        # Known before hours of training, where it can't be compared with.
        theirs = {name: measured(settings, each) for name, each in others.items()}
        key = _key(settings, seeds, prepared.manifest["fingerprint"])
        with runs.open_run(uri, settings.experiment, run_name=f"{number} seeds", key=key) as run:
            own = [_with_seed(settings, seed, folder, prepared.folder) for seed in seeds]
            with Found.put_away(folder, lambda: [_version(each) for each in own]):
                models = _trained(own, at_once, resume, run.run_id)
            found = Found.of(settings, seeds, measured(settings, Trainings(folder, models)), theirs, _computed(own))
            found.write()
            run.log_artifact(found.file)
            run.log_artifact(found.report)
            run.log_metrics(dict(_flat(found.summary)))
            run.describe("Trainings", "\n\n".join([as_code(command()), *found.sentences]))
    return found


def _trained(own: Sequence[Settings], at_once: int, resume: bool, parent: str | None) -> list[Path]:
    if at_once > 1:
        return _side_by_side(own, at_once, resume, parent)
    models = []
    for number, settings in enumerate(own, 1):
        say(f"training {number} of {len(own)}, with seed {settings.training.seed}")
        models.append(Path(_train(settings, resume, parent)))
    return models


def _side_by_side(own: Sequence[Settings], at_once: int, resume: bool, parent: str | None) -> list[Path]:
    logs = [Path(each.data.work) / "training.log" for each in own]
    asked, models = [_sharing(each, at_once) for each in own], dict[int, Path]()
    say(f"{len(own)} trainings, {at_once} at a time; each prints to training.log in '{logs[0].parent.parent}'/SEED")
    with bar() as progress:
        task = progress.add_task(f"trainings, {at_once} at a time", total=len(own))
        for number, text in side_by_side(partial(_train, resume=resume, parent=parent), asked, logs, at_once):
            models[number] = Path(text)
            say(f"trained with seed {own[number].training.seed}")
            progress.advance(task)
    return [models[number] for number in range(len(own))]


def _train(settings: Settings, resume: bool, parent: str | None) -> str:
    """The folder of the model."""
    trained = train_model(settings, resume=resume, parent=parent, register=False)
    assert trained is not None, "one process trains"
    return str(trained.artifact)


def _version(settings: Settings) -> str | None:
    """Of the model in a training's folder, None where there is none."""
    with suppress(UserError):
        return version_of(Path(settings.data.work) / "model")
    return None


def _sharing(settings: Settings, at_once: int) -> Settings:
    """Settings by which so many trainings at a time do not ask for more threads than there are cores."""
    if settings.training.threads is not None:
        return settings
    training = settings.training.model_copy(update={"threads": max(1, usable_cores() // at_once)})
    return settings.model_copy(update={"training": training})


def _with_seed(settings: Settings, seed: int, folder: Path, features: Path) -> Settings:
    """The settings with a seed and a folder of its own, which has the features of all."""
    own = folder / str(seed)
    own.mkdir(parents=True, exist_ok=True)
    link = own / "features"
    if not (link.is_symlink() and link.resolve() == features.resolve()):
        with suppress(FileNotFoundError):
            link.unlink()
        link.symlink_to(features.resolve(), target_is_directory=True)
    return settings.model_copy(
        update={
            "training": settings.training.model_copy(update={"seed": seed}),
            "data": settings.data.model_copy(update={"work": str(own)}),
        }
    )


def _computed(own: Sequence[Settings]) -> str:
    """In which precision each training computed: where they chose for themselves, this may differ too."""
    from mmoe_rec.training.checkpoint import latest_checkpoint

    seeds: dict[str, list[str]] = {}
    for each in own:
        checkpoint = latest_checkpoint(Path(each.data.work) / "checkpoints")
        choices = None if checkpoint is None else checkpoint.state.choices
        precision = "unknown" if choices is None else choices.precision
        seeds.setdefault(precision, []).append(str(each.training.seed))
    if len(seeds) == 1:
        return next(iter(seeds))
    told = ", ".join(f"{precision} (seeds {', '.join(those)})" for precision, those in seeds.items())
    return f"{told}: set training.precision, or trainings differ by it as well"


def _key(settings: Settings, seeds: Sequence[int], fingerprint: str) -> str:
    depends = settings.model_dump(mode="json", include={"model", "training"})
    text = json.dumps([depends, settings.choices, list(seeds), fingerprint], sort_keys=True)
    return f"seeds-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _flat(summary: Mapping[str, Mapping[str, TrainingsMean]]) -> Iterator[tuple[str, float]]:
    for group, metrics in summary.items():
        for metric, each in metrics.items():
            for name in ("mean", "low", "high", "between_trainings", "between_users"):
                if (value := getattr(each, name)) is not None:
                    yield f"test/{group}.{metric}.{name}", value
