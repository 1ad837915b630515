"""Whether a training begins, goes on or has ended: what lies in `checkpoints/` beside what is asked for."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from mmoe_rec.atomic import checksum
from mmoe_rec.errors import UserError
from mmoe_rec.jobs.finished import Finished
from mmoe_rec.jobs.places import features_in_use, log_and_place
from mmoe_rec.locks import writing
from mmoe_rec.preprocessing.logs import Logs
from mmoe_rec.preprocessing.prepare import Prepared, existing, fingerprint_of, prepare
from mmoe_rec.progress import say
from mmoe_rec.settings.sections import Settings
from mmoe_rec.tracking.registry import find_model
from mmoe_rec.training.origin import Origin, Start, fixed_settings, result_settings


@dataclass(frozen=True)
class Course:
    """What a training does. start: the model that it starts from, or was started from."""

    kind: Literal["begins", "goes on", "at its end"]
    start: Start | None = None

    def to_json(self) -> str:
        """Text, for the other ranks."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Course:
        """What `to_json` gave."""
        tree = json.loads(text)
        return Course(**{**tree, "start": tree["start"] and Start(**tree["start"])})


def check_training_rows(settings: Settings, found: Prepared | None, start: str | None) -> None:
    """Raises UserError where there is nothing to train on, or to go on from."""
    if start is not None and found is None:
        raise UserError(
            f"'{settings.data.work}' has no features of this log, these features and this split: to go on from a "
            "model, run python -m pipelines.features with --extend first"
        )
    if found is not None:
        found.require_rows("train", "validation")


def resolve(address: str, settings: Settings) -> Start:
    """The model at an address, with its permanent address.

    Raises UserError where there is none, or one that is not as it was written.
    """
    from mmoe_rec.inference.artifact import read_artifact

    found = find_model(address, settings.tracking.address)
    weights = found.folder / "weights.safetensors"
    if not weights.is_file():
        raise UserError(f"the model at '{address}' has no weights (weights.safetensors)")
    read_artifact(found.folder)
    return Start(address, found.address, checksum(weights), found.run_id)


def begin(settings: Settings, start: str | None, resume: bool, held: contextlib.ExitStack) -> Course:
    """What the training does, with its features ready and its folders held."""
    work = Path(settings.data.work)
    for name in ("checkpoints", "model"):
        held.enter_context(writing(work / name, "a training", "set `data.work` to another folder"))
    course = course_of(settings, work / "checkpoints", start, resume)
    if course.kind == "begins":
        check_training_rows(settings, existing(*log_and_place(settings)), start)
    if course.kind != "at its end":
        going_on = start is not None or course.kind == "goes on"
        held.enter_context(features_in_use(settings, "a training", going_on))
    return course


def something_left(checkpoints: Path) -> bool:
    """Whether there is a checkpoint to go on from, or the result of a training that has ended."""
    return any((checkpoints / name).is_file() for name in ("latest.json", "finished.json"))


def course_of(settings: Settings, checkpoints: Path, start: str | None, resume: bool) -> Course:
    """What the training that is asked for does. Nothing else may write to the folder meanwhile.

    Raises UserError where the folder holds another training than the one asked for, unless it is of an earlier day.
    """
    before = _Before.read(checkpoints) if resume else None
    if before is None:
        return Course("begins", None if start is None else resolve(start, settings))
    now = before.asked_for(settings, start)
    found = before.origin.difference(now)
    if found is None:
        return Course("at its end" if before.finished else "goes on", before.origin.start)
    if now.until > before.origin.until:
        say(f"the features go on to a later day than those of the training in '{checkpoints}': a new one begins")
        return Course("begins", None if start is None else resolve(start, settings))
    ended = "has ended, and is not the one asked for" if before.finished else "can't go on"
    raise UserError(f"the training of '{checkpoints}' {ended}: {found}, or train from the start, without --resume")


@dataclass(frozen=True)
class _Before:
    """The training that left something: what it was begun with, and its result if it has ended."""

    origin: Origin
    finished: Finished | None

    @staticmethod
    def read(checkpoints: Path) -> _Before | None:
        if (finished := Finished.read(checkpoints)) is not None:
            return _Before(finished.origin, finished)
        from mmoe_rec.training.checkpoint import latest_checkpoint

        checkpoint = latest_checkpoint(checkpoints)
        return None if checkpoint is None else _Before(checkpoint.state.origin, None)

    def asked_for(self, settings: Settings, start: str | None) -> Origin:
        """What a training would be begun with now."""
        tree = fixed_settings(settings) if self.finished is None else result_settings(settings)
        fingerprint, until = self._features(settings, start)
        return Origin(tree, fingerprint, until, self.origin.run_id, self._start(settings, start))

    def _features(self, settings: Settings, start: str | None) -> tuple[str, int]:
        """Fingerprint of the features, and the last request that they know.

        A training that goes on keeps its features: it cannot go on with others, and its work must not be thrown away
        because the log has grown meanwhile.
        """
        place = log_and_place(settings)
        found = existing(*place)
        if found is None:
            log, schema, windows, _, options = place
            expected = fingerprint_of(Logs(log, schema, options), windows)
            if self.finished is None or expected == self.origin.features:
                return expected, self.origin.until
            check_training_rows(settings, None, start)
            found = prepare(*place)
        manifest = found.manifest
        return manifest["fingerprint"], manifest["request_microseconds"][1]

    def _start(self, settings: Settings, address: str | None) -> Start | None:
        one = self.origin.start
        if address is None:
            return None
        if one is not None and one.address == address and one.moves:
            return one
        start = resolve(address, settings)
        # The folder to start from may be the one that the training has written its model to.
        own = self.finished is not None and start.weights == self.finished.weights
        return one if own and one is not None and one.address == address else start
