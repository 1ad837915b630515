"""What a training works on: log, features, checkpoints and the model that it starts from, opened once and held.

`open_workspace` checks settings, log, MLflow and start before torch is loaded, decides whether the training begins or
goes on, has the features ready, and keeps other processes from replacing what is in use.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmoe_rec.atomic import checksum, write_text
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.comparison import find_objective
from mmoe_rec.jobs.places import features_in_use, log_and_place
from mmoe_rec.locks import writing
from mmoe_rec.preprocessing.logs import Logs
from mmoe_rec.preprocessing.prepare import FeatureFolder, existing, fingerprint_of, prepare
from mmoe_rec.progress import say
from mmoe_rec.settings.sections import Settings
from mmoe_rec.tracking import registry, runs
from mmoe_rec.tracking.outbox import list_waiting_runs
from mmoe_rec.training.origin import Origin, Start, fixed_settings, result_settings

if TYPE_CHECKING:
    import torch

    from mmoe_rec.model.layout import ModelLayout
    from mmoe_rec.training.checkpoint import Checkpoint, FinishedTraining
    from mmoe_rec.training.warm_start import WarmStart

CHALLENGER = "challenger"  # alias of a model that is no better than the one that holds the alias


@dataclass(frozen=True)
class Workspace:
    """What a training has at hand on one rank.

    first: whether this rank writes down what is common to all; manifest: of the features; layout: of the model on them;
    origin: what the training begins with; checkpoint: to go on from; weights: to start from instead of random ones;
    key: of the run of a training that begins, on the first rank.
    """

    settings: Settings
    device: torch.device
    first: bool
    prepared: FeatureFolder
    manifest: Mapping[str, Any]
    layout: ModelLayout
    origin: Origin
    checkpoint: Checkpoint | None = None
    weights: WarmStart | None = None
    key: str | None = None

    @property
    def folder(self) -> Path:
        """`data.work`."""
        return Path(self.settings.data.work)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints and of the result."""
        return self.folder / "checkpoints"


@contextmanager
def open_workspace(settings: Settings, start: str | None = None, resume: bool = False) -> Iterator[Workspace | None]:
    """The workspace of a training on this rank; None where the training has ended before.

    start, resume: as in `mmoe_rec.jobs.train.train_model`. Raises UserError for a wrong setting, log or address, and
    where another process is in the way.
    """
    opening = _Opening(settings, start, resume)
    if is_first_rank():
        opening.check()  # before torch is loaded

    from mmoe_rec.devices import pick_device
    from mmoe_rec.training.ranks import process_group

    device, ranks = pick_device(settings.training.device), int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1 or {settings.training.tables, settings.training.products} != {"auto"}:
        from mmoe_rec.training.choices import check_offered

        check_offered(settings.training, device.type, ranks)
    with process_group(device, settings.training.timeout_minutes) as group, contextlib.ExitStack() as held:
        course, begun = json.loads(group.after_first(lambda: json.dumps(opening.decide(held), default=asdict)))
        if course == "at its end":
            yield None
        else:
            yield opening.read(course, begun and Start(**begun), device, group.first)


Course = Literal["begins", "goes on", "at its end"]
"""What a training does."""


class _Opening:
    """The steps of opening a workspace, and what they have looked up: features, and the model to start from."""

    def __init__(self, settings: Settings, start: str | None, resume: bool) -> None:
        self.settings, self.start, self.resume = settings, start, resume
        self.work = Path(settings.data.work)
        self.checkpoints = self.work / "checkpoints"
        self.place = log_and_place(settings)
        self.features: FeatureFolder | None = None
        self.model: tuple[Start, Path] | None = None

    def check(self) -> None:
        """Raises UserError for a wrong setting, log or address, and where MLflow is away or would refuse a name."""
        settings, checkpoints = self.settings, self.checkpoints
        find_objective(settings.evaluation.decide_by)
        self.features = existing(*self.place)
        if not (self.resume and any((checkpoints / name).is_file() for name in ("latest.json", "finished.json"))):
            self._check_rows()
            self._look_up_start()
        ended = self.resume and (checkpoints / "finished.json").is_file()
        if not ended or list_waiting_runs(self.work / "unsent"):
            check_mlflow(settings)

    def decide(self, held: contextlib.ExitStack) -> tuple[Course, Start | None]:
        """What the training does, and the model that it starts, or was started, from; its features are ready, and its
        folders held, from now on. On the first rank.

        Raises UserError where the folder holds another training than the one asked for, unless it is of an earlier day.
        """
        for name in ("checkpoints", "model"):
            held.enter_context(writing(self.work / name, "a training", "set `data.work` to another folder"))
        course, start = self._decide()
        if course != "at its end":
            going_on = self.start is not None or course == "goes on"
            held.enter_context(features_in_use(self.settings, "a training", going_on))
        return course, start

    def _decide(self) -> tuple[Course, Start | None]:
        from mmoe_rec.training.checkpoint import FinishedTraining, latest_checkpoint

        if self.resume:
            ended = FinishedTraining.read(self.work)
            before = None if ended is None else ended.origin
            if ended is None and (checkpoint := latest_checkpoint(self.checkpoints)) is not None:
                before = checkpoint.state.origin
            if before is not None:
                now = self._expect(before, ended)
                difference = before.difference(now)
                if difference is None:
                    return "at its end" if ended else "goes on", before.start
                if now.until <= before.until:
                    what = "has ended, and is not the one asked for" if ended else "can't go on"
                    raise UserError(
                        f"the training of '{self.checkpoints}' {what}: {difference}, or train from the start, without "
                        "--resume"
                    )
                where = f"the training in '{self.checkpoints}'"
                say(f"the features go on to a later day than those of {where}: a new training begins")
                self._check_rows()
        return "begins", self._look_up_start()

    def _expect(self, before: Origin, ended: FinishedTraining | None) -> Origin:
        """What the training would begin with now. One that goes on keeps its features: it cannot go on with others, and
        its work must not be thrown away because the log has grown meanwhile."""
        tree = fixed_settings(self.settings) if ended is None else result_settings(self.settings)
        if self.features is None:
            log, schema, windows, _, options = self.place
            fingerprint, until = fingerprint_of(Logs(log, schema, options), windows), before.until
            if ended is not None and fingerprint != before.features:
                self._check_rows()
                self.features = prepare(*self.place)
        if self.features is not None:
            manifest = self.features.manifest
            fingerprint, until = manifest["fingerprint"], manifest["request_microseconds"][1]
        start, now = before.start, None
        if self.start is not None:
            same = start is not None and start.address == self.start
            now = start if start is not None and same and start.moves else self._look_up_start()
            # The folder to start from may be the one that the training has written its model to.
            if same and ended is not None and now is not None and now.weights == ended.weights:
                now = start
        return Origin(tree, fingerprint, until, before.run_id, now)

    def read(self, course: Course, start: Start | None, device: torch.device, first: bool) -> Workspace:
        """The workspace of a training that begins or goes on."""
        from mmoe_rec.model.layout import ModelLayout
        from mmoe_rec.training.checkpoint import latest_checkpoint

        settings, prepared = self.settings, FeatureFolder(self.work / "features")
        manifest, layout = prepared.manifest, ModelLayout.of(prepared.layout, settings)
        until = manifest["request_microseconds"][1]
        origin = Origin(fixed_settings(settings), manifest["fingerprint"], until, start=start)
        if course == "goes on":
            checkpoint = latest_checkpoint(self.checkpoints)
            assert checkpoint is not None, "the first rank has read it"
            checkpoint.state.origin.check(origin, checkpoint.folder)
            return Workspace(settings, device, first, prepared, manifest, layout, origin, checkpoint)
        weights = None if start is None else self._weights(start, prepared, layout)
        key = training_key(self.checkpoints, origin, new=not self.resume) if first else None
        return Workspace(settings, device, first, prepared, manifest, layout, origin, None, weights, key)

    def _check_rows(self) -> None:
        """Raises UserError where there is nothing to train on, or to go on from."""
        if self.start is not None and self.features is None:
            raise UserError(
                f"'{self.work}' has no features of this log, these features and this split: to go on from a model, run "
                "mmoe-rec features with --extend first"
            )
        if self.features is not None:
            self.features.require_rows("train", "validation")

    def _look_up_start(self) -> Start | None:
        """The model to start from, looked up once: an alias may move."""
        if self.start is None:
            return None
        if self.model is None:
            self.model = resolve(self.start, self.settings)
        return self.model[0]

    def _weights(self, start: Start, prepared: FeatureFolder, layout: ModelLayout) -> WarmStart:
        from mmoe_rec.inference.artifact import read_artifact
        from mmoe_rec.settings.model import Model
        from mmoe_rec.training.warm_start import WarmStart

        # The first rank has checked its files; the others may be on other machines.
        address = self.settings.tracking.address
        folder = registry.fetch_model(start.exact, address) if self.model is None else self.model[1]
        structure = Model.model_validate(read_artifact(folder, verify=False).model)
        return WarmStart(folder, structure, prepared, layout, self.settings.model)


def is_first_rank() -> bool:
    """Whether this process is torchrun's first one, or alone; known before there is a process group."""
    return int(os.environ.get("RANK", "0")) == 0


def check_mlflow(settings: Settings) -> None:
    """Raises UserError where MLflow is away or would refuse a name. Sends what waits for it."""
    address = settings.tracking.address
    runs.check_server(address, settings.experiment, unsent=Path(settings.data.work) / "unsent")
    registry.check_names(address, settings.registered_model, settings.tracking.alias)


def resolve(address: str, settings: Settings) -> tuple[Start, Path]:
    """The model at an address, with its permanent address, and its folder.

    Raises UserError where there is none, or one that is not as it was written.
    """
    from mmoe_rec.inference.artifact import read_artifact

    model = registry.find_model(address, settings.tracking.address)
    weights = model.folder / "weights.safetensors"
    if not weights.is_file():
        raise UserError(f"the model at '{address}' has no weights (weights.safetensors)")
    read_artifact(model.folder)
    return Start(address, model.address, checksum(weights), model.run_id), model.folder


def training_key(folder: Path, origin: Origin, new: bool) -> str:
    """The key of a training's run, even before its first checkpoint; a killed training finds it again, unless `new`.

    A training begun with something else gets another key.
    """
    file = folder / "key.json"
    begun = hashlib.sha256(json.dumps(asdict(origin), sort_keys=True).encode()).hexdigest()
    if not new:
        try:
            tree = json.loads(file.read_text(encoding="utf-8"))
            if tree.get("origin") == begun:
                return str(tree["key"])
        except (OSError, ValueError, KeyError, AttributeError):
            pass  # none, or one that means nothing any more
    key = uuid.uuid4().hex
    write_text(file, json.dumps({"key": key, "origin": begun}))
    return key
