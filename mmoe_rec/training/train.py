"""A training, from settings to a registered model: `train_model` reads from top to bottom.

Log, features, checkpoints and the model that it starts from are opened once and held (`open_workspace`). No other
process replaces what is in use. `Workspace` has all that the run needs.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch

from mmoe_rec.atomic import checksum
from mmoe_rec.batches.encoded_dataset import EncodedDataset, ValidationPart
from mmoe_rec.errors import StoppedError, UserError
from mmoe_rec.evaluation.calibration import fit_calibration, predict_for_calibration
from mmoe_rec.evaluation.promotion import Decision, promote_trained
from mmoe_rec.evaluation.results_report import log_gate_weights
from mmoe_rec.evaluation.summary import find_objective_metric
from mmoe_rec.inference.artifact import read_artifact
from mmoe_rec.inference.artifact_writer import write_artifact
from mmoe_rec.locks import write_lock
from mmoe_rec.model.mmoe import RankingModel, build_model
from mmoe_rec.model.model_layout import ModelLayout
from mmoe_rec.model.score import UNCALIBRATED, Calibration
from mmoe_rec.model.tables import PlainTables
from mmoe_rec.model.warm_start import WarmStart
from mmoe_rec.preprocessing.build_inputs import BuildInputs
from mmoe_rec.preprocessing.prepare import (
    FeatureFolder,
    compute_fingerprint,
    find_existing_features,
    lock_features,
    prepare,
)
from mmoe_rec.progress import say
from mmoe_rec.settings.model import Model
from mmoe_rec.settings.sections import Settings, diff_settings
from mmoe_rec.tracking import registry, runs
from mmoe_rec.tracking.client import UnreachableError
from mmoe_rec.tracking.runs import (
    MAX_WAIT_SECONDS,
    Run,
    bullet_list,
    check_server,
    code_block,
    command_line,
    describe_datasets,
    list_unsent_runs,
    name_run,
)
from mmoe_rec.training import training_report
from mmoe_rec.training.checkpoint import Checkpoint, FinishedRun, latest_checkpoint, load_unsharded
from mmoe_rec.training.distributed import training_process_group
from mmoe_rec.training.loop import Trainer, TrainingResult
from mmoe_rec.training.provenance import Provenance, WarmStartSource, artifact_settings, fixed_settings
from mmoe_rec.training.stacking import grow_trees
from mmoe_rec.training.validation import Validation, find_undertraining, validate_on_one_process


@dataclass(frozen=True)
class Workspace:
    """All that a run needs on one rank.

    Attributes:
        folder: Folder of the run, `data.work_dir`.
        first: Whether this rank writes down results that all ranks share.
        prepared: Features.
        manifest: Manifest of the features.
        layout: Layout of the model on the features.
        provenance: What the run begins with, or began with if it is resumed.
        checkpoint: Checkpoint to resume from.
        weights: Weights to start from instead of random ones.
    """

    settings: Settings
    folder: Path
    is_first: bool
    device: torch.device
    prepared: FeatureFolder
    manifest: Mapping[str, Any]
    layout: ModelLayout
    provenance: Provenance
    checkpoint: Checkpoint | None
    weights: WarmStart | None


def train_model(
    settings: Settings, start: str | None = None, resume: bool = False, *, register: bool = True
) -> FinishedRun | None:
    """Features -> training on all ranks -> artifact -> registry. Gives None on ranks other than the first.

    start: address of a model to start from, which needs existing features that were extended from that model's. resume:
    go on from the last checkpoint, where there is one; a training that has ended is not begun again, unless the
    features go on to a later day. register: whether the model goes into the registry. Raises UserError where another
    process trains in `data.work_dir`.
    """
    with open_workspace(settings, start, resume) as ready:
        if not isinstance(ready, Workspace):
            return ready
        provenance = ready.provenance
        with runs.open_run(
            settings.tracking.resolved_uri,
            settings.experiment,
            run_id=provenance.run_id,
            run_name=name_run(settings, None if provenance.start is None else provenance.start.pinned_uri),
            enabled=ready.is_first,
            outbox_folder=ready.folder / "unsent",
            log_system_metrics=settings.tracking.system_metrics,
        ) as run:
            _log_start(run, ready)
            trainer = Trainer(
                ready.prepared,
                ready.layout,
                settings.model,
                settings.training,
                ready.device,
                ready.folder / "checkpoints",
                run.log_metrics,
                ready.weights,
                ready.checkpoint,
                replace(provenance, run_id=run.run_id),
                on_validation=lambda validation, step: log_gate_weights(
                    run, ready.layout, validation.experts, f"plots/gates/step_{step:07}.png"
                ),
            )
            _log_choices(run, trainer)
            result = trainer.run()
            return _finish(run, ready, result, register) if ready.is_first else None


def _log_choices(run: Run, trainer: Trainer) -> None:
    names = ("matmul_backend", "table_backend", "threads", "batch_size")
    values = asdict(trainer.precision_choice) | {name: getattr(trainer, name) for name in names}
    tags = {f"choices.{name}": str(value) for name, value in values.items() if name != "step_ms"}
    run.log_all(tags=tags, files={"choices.json": values})


def _log_start(run: Run, ready: Workspace) -> None:
    """What the run's page says before the first step."""
    settings, manifest, start = ready.settings, ready.manifest, ready.provenance.start
    if ready.is_first:
        say(f"MLflow run: {run.url}")
    sections = {"model", "training", "split", "data", "evaluation", "serving"}
    tags = {"data.digest": manifest["digest"], "features.fingerprint": manifest["fingerprint"]}
    tags["data.files_left_out"] = len(manifest["skipped"])  # which and why is in data.json
    if start is not None:
        # An alias such as `champion` will point at the new model soon.
        tags |= {"warm_start": start.uri, "warm_start.model": start.pinned_uri}
        tags |= {"warm_start.run": start.run_id or "unknown", "warm_start.weights": start.weights_checksum}
    run.log_all(
        {**settings.model_dump(mode="json", include=sections), **settings.model_choices},
        tags,
        {"settings.yaml": settings.to_yaml(), "data.json": manifest},
        describe_datasets(settings, manifest, "train", "validation"),
    )
    command_and_rows = f"{code_block(command_line())}\n\n{_describe_rows(manifest)}"
    run.write_section("Resumed" if "### Training\n" in run.description else "Training", command_and_rows)


def _finish(run: Run, ready: Workspace, result: TrainingResult, register: bool) -> FinishedRun:
    """Best state -> artifact -> registry -> result on disk."""
    settings, prepared, layout = ready.settings, ready.prepared, ready.layout
    artifact = ready.folder / "model"
    model = load_best_network(settings, prepared, result)
    run.log_text(result.plan, "sharding_plan.txt")
    run.log_metrics(
        {"train/rows_per_s": result.rows_per_s, "train/waiting_share": result.data_wait_fraction}, result.steps
    )
    network = None
    if settings.model.trees is not None:
        network = validate_served(settings, prepared, model, UNCALIBRATED)
        run.log_metrics(network.to_metrics("network"), result.best_step)
        model.trees = grow_trees(settings, prepared, layout, model)
    calibration = calibrate(settings, prepared, model)
    if calibration.tasks:
        run.log_text(calibration.to_dict(), "calibration.json")
    served = validate_served(settings, prepared, model, calibration)
    run.log_metrics(served.to_metrics("best"), result.best_step)
    log_gate_weights(run, layout, served.experts, "plots/gate_weights.png")
    findings = served.experts.findings([task.name for task in layout.tasks])
    run.log_text("\n".join(findings or ["all experts are used, and no gate settles on one"]) + "\n", "experts.txt")
    write_artifact(
        artifact,
        settings=settings,
        prepared=prepared,
        state_dict=model.state_dict(),
        trees=model.trees,
        calibration=calibration,
        undertraining=find_undertraining(result.history, result.best_step, layout, settings.training),
    )
    decision = Decision(str(artifact), False, ())
    values = [f"{name.removeprefix('best/')} {value:.4f}" for name, value in served.to_metrics("best").items()]
    chosen = (
        f"The selecting rows of the validation split chose the network's state of step {result.best_step:,}. The model "
        f"as it is served, on the judging rows:\n\n{bullet_list(values)}"
    )
    if register:
        about = f"{code_block(command_line())}\n\n{_describe_rows(ready.manifest)}\n\n{chosen}"
        with _wait_to_register(run, artifact):
            decision = promote_trained(run, settings, prepared, model, artifact, about)
    run.write_section("Result", f"{bullet_list(decision.reasons)}\n\n{chosen}\n\nModel: `{decision.address}`")
    trained = FinishedRun(
        artifact,
        decision.address,
        served,
        result.best_step,
        result.rows_per_s,
        result.data_wait_fraction,
        decision.reasons,
        replace(ready.provenance, run_id=run.run_id),
        dict(result.history).get(0),
        network,
    )
    trained.write()
    training_report.write_training_report(trained, settings)
    return trained


def load_best_network(settings: Settings, prepared: FeatureFolder, result: TrainingResult) -> RankingModel:
    """The network in the best state of a training."""
    layout = ModelLayout.of(prepared.layout, settings)
    model = build_model(layout, settings.model, PlainTables(layout))
    load_unsharded(model, result.best_checkpoint)
    return model


def validate_served(
    settings: Settings, prepared: FeatureFolder, model: RankingModel, calibration: Calibration
) -> Validation:
    """Measure a model as it is served, with its trees and calibration, on the validation rows of the users that judge.

    Prints a note where too few users have labels for two parts, so that all rows are in both.
    """
    layout, weighted = ModelLayout.of(prepared.layout, settings), settings.training.sampling_correction == "weights"
    validation = prepared.split("validation")
    rows = EncodedDataset(validation, layout, joint_labels=True, weighted=weighted, part=ValidationPart.EVALUATION)
    if not rows.uses_part:
        say("note: too few validation users have labels to hold some out: all rows select the model and judge it")
    return validate_on_one_process(model, rows, layout, settings.evaluation.batch_size, calibration)


@contextmanager
def _wait_to_register(run: Run, artifact: Path) -> Iterator[None]:
    """Around the registration of a trained model: first waits for MLflow, if it is away, and sends what waits. Raises
    StoppedError where it does not answer, and UserError where it refuses, which say how to register the model later.
    """
    run.flush(MAX_WAIT_SECONDS)
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
    method = settings.training.calibration
    if method == "none":
        return UNCALIBRATED
    layout = ModelLayout.of(prepared.layout, settings)
    # Without the weights that training had, it would undo what they correct.
    weighted = settings.training.sampling_correction == "weights"
    rows = EncodedDataset(prepared.split("validation"), layout, weighted=weighted, part=ValidationPart.SELECTION)
    fitted_on = predict_for_calibration(model, layout, rows, settings.evaluation.batch_size)
    calibration, left = fit_calibration(method, layout.tasks, *fitted_on)
    for sentence in left:
        say(sentence)
    return calibration


class RunStatus(StrEnum):
    """What becomes of a run."""

    NEW = "new"
    RESUMED = "resumed"
    FINISHED = "finished"


@contextmanager
def open_workspace(
    settings: Settings, address: str | None = None, resume: bool = False
) -> Iterator[Workspace | FinishedRun | None]:
    """Open all that a run needs on this rank.

    address, resume: as in `train_model`. Gives the result of a run that has ended before on the first rank, and None
    on others. Raises UserError for a wrong setting, log or address, or a process in the way.
    """
    inputs = BuildInputs.of(settings)
    folder, prepared = inputs.work, FeatureFolder(inputs.work / "features")

    def open_first() -> str:
        """Decide on the first rank what all ranks do, and hold what they use from now on."""
        find_objective_metric(settings.evaluation.primary_metric)
        has_features = find_existing_features(inputs) is not None
        for name in ("checkpoints", "model"):
            held.enter_context(write_lock(folder / name, "a training", "set `data.work_dir` to another folder"))
        status = _decide(settings, inputs, address, has_features) if resume else RunStatus.NEW
        if status is RunStatus.NEW and address is not None and not has_features:
            raise _needs_features(folder)
        if status is not RunStatus.FINISHED or list_unsent_runs(folder / "unsent"):
            check_server(settings.tracking.resolved_uri, settings.experiment, outbox_folder=folder / "unsent")
            registry.check_registry_names(
                settings.tracking.resolved_uri, settings.registered_model, settings.tracking.alias
            )
        pinned, run = address, None
        if status is RunStatus.NEW and address is not None:
            # Looked up once, as an alias may move.
            pinned = registry.pin_model_uri(address, settings.tracking.resolved_uri)
            run = registry.find_run_id(pinned, settings.tracking.resolved_uri)
        if status is not RunStatus.FINISHED:
            keep_existing = address is not None or status is RunStatus.RESUMED
            held.enter_context(lock_features(inputs, "a training", ("train", "validation"), keep_existing))
        return json.dumps([status, pinned, run])

    with training_process_group(settings.training) as (device, ranks), ExitStack() as held:
        status, pinned, run = json.loads(ranks.run_on_first_rank(open_first))
        if status == RunStatus.FINISHED:
            yield FinishedRun.read(folder) if ranks.is_first else None
            return
        manifest, layout = prepared.manifest, ModelLayout.of(prepared.layout, settings)
        checkpoint, weights = None, None
        if status == RunStatus.RESUMED:
            checkpoint = latest_checkpoint(folder / "checkpoints")
            assert checkpoint is not None, "the first rank has read it"
            provenance = checkpoint.state.provenance
        else:
            start = None
            if address is not None:
                model = registry.fetch_model(pinned, settings.tracking.resolved_uri)
                about = read_artifact(model)  # it is as it was written
                weights = WarmStart(model, Model.model_validate(about.model), prepared, layout, settings.model)
                start = WarmStartSource(address, pinned, checksum(model / "weights.safetensors"), run)
            provenance = Provenance(
                fixed_settings(settings),
                *_what_is_known(manifest),
                start=start,
                artifact_settings=artifact_settings(settings),
            )
        yield Workspace(
            settings, folder, ranks.is_first, device, prepared, manifest, layout, provenance, checkpoint, weights
        )


def _decide(settings: Settings, inputs: BuildInputs, address: str | None, has_features: bool) -> RunStatus:
    """Return whether the run in `data.work_dir` is resumed, has finished, or gives way to one on a later day.

    Raises:
        UserError: The run there is not the one that is asked for.
    """
    checkpoints = inputs.work / "checkpoints"
    finished, checkpoint = FinishedRun.read(inputs.work), latest_checkpoint(checkpoints)
    if finished is not None:
        before = finished.provenance
    elif checkpoint is not None:
        before = checkpoint.state.provenance
    else:
        return RunStatus.NEW
    features, last_request_us = compute_fingerprint(inputs.logs, inputs.windows), before.last_request_us
    if not has_features and features != before.features and address is not None:
        raise _needs_features(inputs.work)
    if has_features or (finished is not None and features != before.features):
        # Work of a run that can be resumed isn't thrown away because the log has grown.
        features, last_request_us = _what_is_known(prepare(inputs, keep_existing=has_features).manifest)
    difference = before.describe_mismatch(fixed_settings(settings), features, address)
    if difference is None and finished is not None:
        for where, was, found in diff_settings(before.artifact_settings, artifact_settings(settings)):
            difference = f"it was begun with {where} {was}, now it is {found}; set it back"
    weights_checksum = Path(address or "", "weights.safetensors")
    if difference is None and before.start is not None and weights_checksum.is_file():
        is_same = checksum(weights_checksum) == before.start.weights_checksum
        difference = None if is_same else f"the model in '{address}' is another one now"
    if difference is None:
        return RunStatus.RESUMED if finished is None else RunStatus.FINISHED
    if last_request_us > before.last_request_us:
        say(f"the features go on to a later day than those of the training in '{checkpoints}': a new training begins")
        return RunStatus.NEW
    raise UserError(
        f"the training of '{checkpoints}' is not the one asked for: {difference}, or train from the start, without "
        "--resume"
    )


def _needs_features(work: Path) -> UserError:
    return UserError(
        f"'{work}' has no features of this log, these features and this split: to go on from a model, run mmoe-rec "
        "features with --extend first"
    )


def _what_is_known(manifest: Mapping[str, Any]) -> tuple[str, int]:
    """The fingerprint of features, and the time of the last request that they know."""
    return manifest["fingerprint"], manifest["request_microseconds"][1]
