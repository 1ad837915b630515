"""A training, from settings to a registered model: `train_model` reads from top to bottom.

Log, features, checkpoints and the model that it starts from are opened once and held (`Workspace`). Settings, log,
MLflow and start are checked before torch is loaded, and no other process replaces what is in use. `Ready` has all that
the run needs.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmoe_rec.atomic import checksum
from mmoe_rec.errors import StoppedError, UserError
from mmoe_rec.evaluation.promotion import Decision, promote_trained
from mmoe_rec.evaluation.summary import find_objective
from mmoe_rec.locks import writing
from mmoe_rec.preprocessing.logs import BuildInputs
from mmoe_rec.preprocessing.prepare import FeatureFolder, existing, features_in_use, fingerprint_of, prepare
from mmoe_rec.progress import say
from mmoe_rec.settings.sections import Settings
from mmoe_rec.tracking import registry, runs
from mmoe_rec.tracking.outbox import PATIENCE_SECONDS, UnreachableError, list_waiting_runs
from mmoe_rec.tracking.run_page import MachineMonitor, as_code, command, data_sets, name_training, quoted
from mmoe_rec.tracking.runs import Run, check_server
from mmoe_rec.training.origin import Origin, Start, fixed_settings, result_settings

if TYPE_CHECKING:
    import torch

    from mmoe_rec.batches.encoded_rows import Part
    from mmoe_rec.model.mmoe import RankingModel
    from mmoe_rec.model.model_layout import ModelLayout
    from mmoe_rec.model.score import Calibration
    from mmoe_rec.model.warm_start import WarmStart
    from mmoe_rec.training.checkpoint import Checkpoint, FinishedTraining
    from mmoe_rec.training.loop import Trainer, TrainingResult
    from mmoe_rec.training.validation import Validation


def train_model(
    settings: Settings,
    start: str | None = None,
    resume: bool = False,
    *,
    register: bool = True,
) -> FinishedTraining | None:
    """Features -> training on all ranks -> artifact -> registry. Gives None on ranks other than the first.

    start: address of a model to start from, which needs existing features that were extended from that model's. resume:
    go on from the last checkpoint, where there is one; a training that has ended is not begun again, unless the
    features go on to a later day. register: whether the model goes into the registry. Raises UserError where another
    process trains in `data.work`.
    """
    with open_workspace(settings, start, resume) as (ready, ended):
        if ready is None:
            return ended
        with _open_run(ready) as run:
            _log_start(run, ready)
            trainer = _make_trainer(run, ready)
            _log_choices(run, trainer)
            result = trainer.run()
            return _finish(run, ready, result, register) if ready.first else None


def _open_run(ready: Ready) -> AbstractContextManager[Run]:
    """The run of the training, which a resumed one goes on with."""
    settings, start, before = ready.settings, ready.origin.start, ready.checkpoint
    address, experiment = settings.tracking.address, settings.experiment
    return runs.open_run(
        address,
        experiment,
        run_id=None if before is None else before.state.origin.run_id,
        run_name=name_training(settings, None if start is None else start.exact),
        active=ready.first,
        unsent=ready.folder / "unsent",
    )


def _make_trainer(run: Run, ready: Ready) -> Trainer:
    from mmoe_rec.training.loop import Trainer

    settings = ready.settings

    def draw(validation: Validation, step: int) -> None:
        from mmoe_rec.evaluation.results_report import log_gates

        log_gates(run, ready.layout, validation.experts, f"plots/gates/step_{step:07}.png")

    return Trainer(
        ready.prepared,
        ready.layout,
        settings.model,
        settings.training,
        ready.device,
        ready.folder / "checkpoints",
        MachineMonitor(run, settings.tracking.system_metrics),
        ready.weights,
        ready.checkpoint,
        replace(ready.origin, run_id=run.run_id),
        watch=draw,
    )


def _log_choices(run: Run, trainer: Trainer) -> None:
    names = ("products", "tables", "threads", "batch_size")
    values = asdict(trainer.choices) | {name: getattr(trainer, name) for name in names}
    tags = {f"choices.{name}": str(value) for name, value in values.items() if name != "measured"}
    run.record(tags=tags, files={"choices.json": values})


def _log_start(run: Run, ready: Ready) -> None:
    """What the run's page says before the first step."""
    settings, manifest, start = ready.settings, ready.manifest, ready.origin.start
    if ready.first:
        say(f"MLflow run: {run.address}")
    sections = {"model", "training", "split", "data", "evaluation", "serving"}
    tags = {"data.digest": manifest["digest"], "features.fingerprint": manifest["fingerprint"]}
    tags["data.files_left_out"] = len(manifest["left_out"])  # which and why is in data.json
    if start is not None:
        # An alias such as `champion` will point at the new model soon.
        tags |= {"warm_start": start.address, "warm_start.model": start.exact}
        tags |= {"warm_start.run": start.run or "unknown", "warm_start.weights": start.weights}
    run.record(
        {**settings.model_dump(mode="json", include=sections), **settings.choices},
        tags,
        {"settings.yaml": settings.to_yaml(), "data.json": manifest},
        data_sets(settings, manifest, "train", "validation"),
    )
    command_and_rows = f"{as_code(command())}\n\n{_describe_rows(manifest)}"
    run.describe("Resumed" if "### Training\n" in run.note else "Training", command_and_rows)


def _finish(run: Run, ready: Ready, result: TrainingResult, register: bool) -> FinishedTraining:
    """Best state -> artifact -> registry -> result on disk."""
    from mmoe_rec.batches.encoded_rows import Part
    from mmoe_rec.evaluation.results_report import log_gates
    from mmoe_rec.inference.writing import write_artifact
    from mmoe_rec.model.score import UNCALIBRATED
    from mmoe_rec.training import training_report
    from mmoe_rec.training.checkpoint import FinishedTraining
    from mmoe_rec.training.stacking import grow_trees
    from mmoe_rec.training.validation import find_early_end

    settings, prepared, layout = ready.settings, ready.prepared, ready.layout
    artifact = ready.folder / "model"
    model = best_network(settings, prepared, result)
    run.log_text(result.plan, "sharding_plan.txt")
    run.log_metrics({"train/rows_per_s": result.rows_per_s, "train/waiting_share": result.waiting}, result.steps)
    network = None
    if settings.model.trees is not None:
        network = measure_served(settings, prepared, model, UNCALIBRATED, Part.JUDGING)
        run.log_metrics(network.flat("network"), result.best_step)
        model.trees = grow_trees(settings, prepared, layout, model)
    calibration = calibrate(settings, prepared, model)
    if calibration.tasks:
        run.log_text(calibration.to_dict(), "calibration.json")
    served = measure_served(settings, prepared, model, calibration, Part.JUDGING)
    run.log_metrics(served.flat("best"), result.best_step)
    log_gates(run, layout, served.experts, "plots/gate_weights.png")
    findings = served.experts.findings([task.name for task in layout.tasks])
    run.log_text("\n".join(findings or ["all experts are used, and no gate settles on one"]) + "\n", "experts.txt")
    write_artifact(
        artifact,
        settings=settings,
        prepared=prepared,
        state_dict=model.state_dict(),
        trees=model.trees,
        calibration=calibration,
        early_end=find_early_end(result.history, result.best_step, layout, settings.training),
    )
    decision = Decision(str(artifact), False, ())
    values = [f"{name.removeprefix('best/')} {value:.4f}" for name, value in served.flat("best").items()]
    chosen = (
        f"The selecting rows of the validation split chose the network's state of step {result.best_step:,}. The model "
        f"as it is served, on the judging rows:\n\n{quoted(values)}"
    )
    if register:
        about = f"{as_code(command())}\n\n{_describe_rows(ready.manifest)}\n\n{chosen}"
        with _wait_to_register(run, artifact):
            decision = promote_trained(run, settings, prepared, model, artifact, about)
    run.describe("Result", f"{quoted(decision.reasons)}\n\n{chosen}\n\nModel: `{decision.address}`")
    trained = FinishedTraining(
        artifact,
        decision.address,
        served,
        result.best_step,
        result.rows_per_s,
        result.waiting,
        decision.reasons,
        replace(ready.origin, run_id=run.run_id, settings=result_settings(settings)),
        checksum(artifact / "weights.safetensors"),
        dict(result.history).get(0),
        network,
    )
    trained.write()
    training_report.write(trained, settings)
    return trained


def best_network(settings: Settings, prepared: FeatureFolder, result: TrainingResult) -> RankingModel:
    """The network in the best state of a training."""
    from mmoe_rec.model.mmoe import build_model
    from mmoe_rec.model.model_layout import ModelLayout
    from mmoe_rec.model.tables import PlainTables
    from mmoe_rec.training.checkpoint import load_plain

    layout = ModelLayout.of(prepared.layout, settings)
    model = build_model(layout, settings.model, PlainTables(layout))
    load_plain(model, result.best_checkpoint)
    return model


def measure_served(
    settings: Settings, prepared: FeatureFolder, model: RankingModel, calibration: Calibration, part: Part
) -> Validation:
    """Measure a model as it is served, with its trees and calibration, on the validation rows of one part of the users.

    Prints a note where too few users have labels for two parts, so that all rows are in both.
    """
    from mmoe_rec.batches.encoded_rows import EncodedRows
    from mmoe_rec.model.model_layout import ModelLayout
    from mmoe_rec.training.validation import validate_alone

    layout, weighted = ModelLayout.of(prepared.layout, settings), settings.training.sampling_correction == "weights"
    validation = prepared.split("validation")
    rows = EncodedRows(validation, layout, outcomes=True, weighted=weighted, with_users=True, part=part)
    if not rows.is_divided:
        say("note: too few validation users have labels to hold some out: all rows select the model and judge it")
    return validate_alone(model, rows, layout, settings.evaluation.batch_size, calibration)


@contextmanager
def _wait_to_register(run: Run, artifact: Path) -> Iterator[None]:
    """Around the registration of a trained model: first waits for MLflow, if it is away, and sends what waits. Raises
    StoppedError where it does not answer, and UserError where it refuses, which say how to register the model later.
    """
    run.flush(PATIENCE_SECONDS)
    what = f"the trained model in '{artifact}' is whole but not registered: the same command with --resume does it"
    try:
        yield
    except UnreachableError as error:
        raise StoppedError(f"{error}; {what} once MLflow answers") from None
    except UserError as error:
        raise UserError(f"{error}; {what} once that is put right") from None


def _describe_rows(manifest: Mapping[str, Any]) -> str:
    rows = {split: counts["rows"] for split, counts in manifest["splits"].items()}
    trained = f"{rows['train']:,} rows of `{manifest['log']}` (digest `{manifest['digest']}`)"
    return f"{trained}, validated on {rows['validation']:,}."


def calibrate(settings: Settings, prepared: FeatureFolder, model: RankingModel) -> Calibration:
    """Fit the calibration of a trained model on the validation rows that select, and print the tasks without one."""
    from mmoe_rec.model.score import UNCALIBRATED

    method = settings.training.calibration
    if method == "none":
        return UNCALIBRATED
    from mmoe_rec.batches.encoded_rows import EncodedRows, Part
    from mmoe_rec.evaluation.calibration import calibration_rows, fit_calibration
    from mmoe_rec.model.model_layout import ModelLayout

    layout = ModelLayout.of(prepared.layout, settings)
    # Without the weights that training had, it would undo what they correct.
    weighted = settings.training.sampling_correction == "weights"
    rows = EncodedRows(prepared.split("validation"), layout, weighted=weighted, part=Part.SELECTING)
    fitted_on = calibration_rows(model, layout, rows, settings.evaluation.batch_size)
    calibration, left = fit_calibration(method, layout.tasks, *fitted_on)
    for sentence in left:
        say(sentence)
    return calibration


Course = Literal["begins", "goes on", "has ended"]
"""What a training does."""


@contextmanager
def open_workspace(
    settings: Settings, start: str | None = None, resume: bool = False
) -> Iterator[tuple[Ready | None, FinishedTraining | None]]:
    """Open all that a run needs on this rank.

    start, resume: as in `train_model`. Gives None for the first where the run has ended before, and for the second
    otherwise and on other ranks. Raises UserError for a wrong setting, log or address, or a process in the way.
    """
    workspace = Workspace(settings, start, resume)
    if workspace.first:
        workspace.check()  # before torch is loaded

    from mmoe_rec.training.ranks import training_ranks

    with training_ranks(settings.training) as (device, ranks), contextlib.ExitStack() as held:
        decided = ranks.after_first(lambda: json.dumps(workspace.decide(held), default=asdict))
        course, begun = json.loads(decided)
        if course == "has ended":
            yield None, workspace.ended
        else:
            yield workspace.read(device, course, begun and Start(**begun)), None


@dataclass(frozen=True)
class Ready:
    """All that a run needs on one rank.

    Attributes:
        folder: Folder of the run, `data.work`.
        first: Whether this rank writes down results that all ranks share.
        prepared: Features.
        manifest: Manifest of the features.
        layout: Layout of the model on the features.
        origin: What the run begins with.
        checkpoint: Checkpoint to resume from.
        weights: Weights to start from instead of random ones.
    """

    settings: Settings
    folder: Path
    first: bool
    device: torch.device
    prepared: FeatureFolder
    manifest: Mapping[str, Any]
    layout: ModelLayout
    origin: Origin
    checkpoint: Checkpoint | None
    weights: WarmStart | None


class Workspace:
    """The folder of a run, and what the run is to do there, on one rank.

    first: whether this rank writes down what is common to all; ended: the training that has ended before, on the first
    rank.
    """

    ended: FinishedTraining | None = None

    def __init__(self, settings: Settings, start: str | None, resume: bool) -> None:
        self.settings, self.start, self.resume = settings, start, resume
        self.first = int(os.environ.get("RANK", "0")) == 0  # known before there is a process group
        self.folder = Path(settings.data.work)
        self.checkpoints = self.folder / "checkpoints"
        self.prepared = FeatureFolder(self.folder / "features")
        self._inputs = BuildInputs.of(settings)
        self._has_features = False
        self._model: tuple[Start, Path] | None = None

    def check(self) -> None:
        """Raises UserError for a wrong setting, log or address, and where MLflow is away or would refuse a name."""
        find_objective(self.settings.evaluation.decide_by)
        self._has_features = existing(self._inputs) is not None
        ended = self.resume and (self.checkpoints / "finished.json").is_file()
        if not ended and not (self.resume and (self.checkpoints / "latest.json").is_file()):
            self._require_features()
            self._look_up_start()
        if not ended or list_waiting_runs(self.folder / "unsent"):
            tracking = self.settings.tracking
            check_server(tracking.address, self.settings.experiment, unsent=self.folder / "unsent")
            registry.check_names(tracking.address, self.settings.registered_model, tracking.alias)

    def decide(self, held: contextlib.ExitStack) -> tuple[Course, Start | None]:
        """What the training does, and the model that it starts, or was started, from; its features are ready, and its
        folders held, from now on. On the first rank.

        Raises UserError where the folder holds another training than the one asked for, unless it is of an earlier day.
        """
        for name in ("checkpoints", "model"):
            held.enter_context(writing(self.folder / name, "a training", "set `data.work` to another folder"))
        course, start = self._decide()
        if course != "has ended":
            going_on = self.start is not None or course == "goes on"
            needs = ("train", "validation")
            held.enter_context(features_in_use(self._inputs, "a training", needs, going_on))
        return course, start

    def _decide(self) -> tuple[Course, Start | None]:
        from mmoe_rec.training.checkpoint import FinishedTraining, latest_checkpoint

        if self.resume:
            self.ended = ended = FinishedTraining.read(self.folder)
            before = None if ended is None else ended.origin
            if ended is None and (checkpoint := latest_checkpoint(self.checkpoints)) is not None:
                before = checkpoint.state.origin
            if before is not None:
                now = self._expect(before)
                difference = before.difference(now)
                if difference is None:
                    return "has ended" if ended else "goes on", before.start
                if now.until <= before.until:
                    what = "has ended, and is not the one asked for" if ended else "can't go on"
                    told = f"{what}: {difference}, or train from the start, without --resume"
                    raise UserError(f"the training of '{self.checkpoints}' {told}")
                where = f"the training in '{self.checkpoints}'"
                say(f"the features go on to a later day than those of {where}: a new training begins")
                self._require_features()
        return "begins", self._look_up_start()

    def _expect(self, before: Origin) -> Origin:
        """What the training would begin with now. One that goes on keeps its features: it cannot go on with others, and
        its work must not be thrown away because the log has grown meanwhile."""
        ended = self.ended
        tree = fixed_settings(self.settings) if ended is None else result_settings(self.settings)
        if not self._has_features:
            fingerprint, until = fingerprint_of(self._inputs.logs, self._inputs.windows), before.until
            if ended is not None and fingerprint != before.features:
                self._require_features()
                prepare(self._inputs)
                self._has_features = True
        if self._has_features:
            fingerprint, until = _what_is_known(self.prepared.manifest)
        start, now = before.start, None
        if self.start is not None:
            same = start is not None and start.address == self.start
            now = start if start is not None and same and start.moves else self._look_up_start()
            # The folder to start from may be the one that the training has written its model to.
            if same and ended is not None and now is not None and now.weights == ended.weights:
                now = start
        return Origin(tree, fingerprint, until, before.run_id, now)

    def read(self, device: torch.device, course: Course, start: Start | None) -> Ready:
        """Read what a new or resumed run needs. start: as `decide` gave it."""
        from mmoe_rec.model.model_layout import ModelLayout
        from mmoe_rec.training.checkpoint import latest_checkpoint

        settings, manifest, checkpoint = self.settings, self.prepared.manifest, None
        layout = ModelLayout.of(self.prepared.layout, settings)
        origin = Origin(fixed_settings(settings), *_what_is_known(manifest), start=start)
        if course == "goes on":
            checkpoint = latest_checkpoint(self.checkpoints)
            assert checkpoint is not None, "the first rank has read it"
            checkpoint.state.origin.check(origin, checkpoint.folder)
        weights = self._read_weights(start, layout) if start is not None and checkpoint is None else None
        common = (settings, self.folder, self.first, device, self.prepared, manifest, layout, origin)
        return Ready(*common, checkpoint, weights)

    def _require_features(self) -> None:
        """Raises UserError where a training has nothing to go on from."""
        if self.start is not None and not self._has_features:
            raise UserError(
                f"'{self.folder}' has no features of this log, these features and this split: to go on from a model, "
                "run mmoe-rec features with --extend first"
            )

    def _look_up_start(self) -> Start | None:
        """The model to start from, looked up once: an alias may move."""
        if self.start is None:
            return None
        if self._model is None:
            from mmoe_rec.inference.artifact import read_artifact

            model = registry.find_model(self.start, self.settings.tracking.address)
            weights = model.folder / "weights.safetensors"
            if not weights.is_file():
                raise UserError(f"the model at '{self.start}' has no weights (weights.safetensors)")
            read_artifact(model.folder)  # it is as it was written
            self._model = Start(self.start, model.address, checksum(weights), model.run_id), model.folder
        return self._model[0]

    def _read_weights(self, start: Start, layout: ModelLayout) -> WarmStart:
        from mmoe_rec.inference.artifact import read_artifact
        from mmoe_rec.model.warm_start import WarmStart
        from mmoe_rec.settings.model import Model

        # The first rank has checked its files; the others may be on other machines.
        address = self.settings.tracking.address
        folder = registry.fetch_model(start.exact, address) if self._model is None else self._model[1]
        structure = Model.model_validate(read_artifact(folder, verify=False).model)
        return WarmStart(folder, structure, self.prepared, layout, self.settings.model)


def _what_is_known(manifest: Mapping[str, Any]) -> tuple[str, int]:
    """The fingerprint of features, and the time of the last request that they know."""
    return manifest["fingerprint"], manifest["request_microseconds"][1]
