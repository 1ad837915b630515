"""A training run, from settings to a registered model. Start with `train_model`."""

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
from mmoe_rec.training.validation import Validation, validate_on_one_process


@dataclass(frozen=True)
class _Workspace:
    """Everything that a run needs on one rank (one of the processes that train together)."""

    settings: Settings
    folder: Path  # `data.work_dir`
    is_first: bool  # Whether this is rank 0, which writes the results of all ranks.
    device: torch.device
    prepared: FeatureFolder
    manifest: Mapping[str, Any]  # Description of the features' files, splits and times.
    layout: ModelLayout
    provenance: Provenance
    checkpoint: Checkpoint | None  # Checkpoint to resume from.
    weights: WarmStart | None  # Weights to start from, None for random weights.


def train_model(
    settings: Settings, start: str | None = None, resume: bool = False, *, register: bool = True
) -> FinishedRun | None:
    """Train, write the artifact and register the model. All ranks must call this together.

    Args:
        settings: Settings of the run.
        start: URI of a model to start from, None for random weights. The features must exist and extend its features.
        resume: Whether to resume from the last checkpoint, if there is one. A finished run is returned again, unless
            the features now reach a later day. Then a new run starts.
        register: Whether to register the model.

    Returns:
        The finished run on the first rank, None on other ranks.

    Raises:
        StoppedError: A signal or an outage of MLflow stopped the run, which can be resumed.
        UserError: A setting is wrong, or another process trains in `data.work_dir`.
    """
    with _open_workspace(settings, start, resume) as workspace:
        if not isinstance(workspace, _Workspace):
            return workspace
        provenance = workspace.provenance
        with runs.open_run(
            settings.tracking.resolved_uri,
            settings.experiment,
            run_id=provenance.run_id,
            run_name=name_run(settings, None if provenance.start is None else provenance.start.pinned_uri),
            enabled=workspace.is_first,
            outbox_folder=workspace.folder / "unsent",
            log_system_metrics=settings.tracking.system_metrics,
        ) as run:
            _log_start(run, workspace)
            trainer = Trainer(
                workspace.prepared,
                workspace.layout,
                settings.model,
                settings.training,
                workspace.device,
                workspace.folder / "checkpoints",
                run.log_metrics,
                workspace.weights,
                workspace.checkpoint,
                replace(provenance, run_id=run.run_id),
                on_validation=lambda validation, step: log_gate_weights(
                    run, workspace.layout, validation.experts, f"plots/gates/step_{step:07}.png"
                ),
            )
            _log_choices(run, trainer)
            result = trainer.run()
            return _finish(run, workspace, result, register) if workspace.is_first else None


def _log_choices(run: Run, trainer: Trainer) -> None:
    names = ("matmul_backend", "table_backend", "threads", "batch_size")
    values = asdict(trainer.precision_choice) | {name: getattr(trainer, name) for name in names}
    tags = {f"choices.{name}": str(value) for name, value in values.items() if name != "step_ms"}
    run.log_all(tags=tags, files={"choices.json": values})


def _log_start(run: Run, workspace: _Workspace) -> None:
    """Log the run's settings, tags and data sets to MLflow before the first step."""
    settings, manifest, start = workspace.settings, workspace.manifest, workspace.provenance.start
    if workspace.is_first:
        say(f"MLflow run: {run.url}")
    sections = {"model", "training", "split", "data", "evaluation", "serving"}
    tags = {"data.digest": manifest["digest"], "features.fingerprint": manifest["fingerprint"]}
    tags["data.files_left_out"] = len(manifest["skipped"])  # data.json, logged below, has the reasons.
    if start is not None:
        # Also log the URI with the version number, because an alias such as `champion` may soon name another model.
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


def _finish(run: Run, workspace: _Workspace, result: TrainingResult, register: bool) -> FinishedRun:
    """Write the model of the best step, register it, and write the result of the run."""
    settings, prepared, layout = workspace.settings, workspace.prepared, workspace.layout
    artifact = workspace.folder / "model"
    model = load_best_network(settings, prepared, result)
    run.log_text(result.plan, "sharding_plan.txt")
    speed = {"train/rows_per_s": result.rows_per_s, "train/data_wait_fraction": result.data_wait_fraction}
    run.log_metrics(speed, result.steps)
    network = None
    if settings.model.trees is not None:
        network = _validate_served(settings, prepared, model, UNCALIBRATED)
        run.log_metrics(network.to_metrics("network"), result.best_step)
        model.trees = grow_trees(settings, prepared, layout, model)
    calibration = calibrate(settings, prepared, model)
    if calibration.tasks:
        run.log_text(calibration.to_dict(), "calibration.json")
    served = _validate_served(settings, prepared, model, calibration)
    run.log_metrics(served.to_metrics("best"), result.best_step)
    log_gate_weights(run, layout, served.experts, "plots/gate_weights.png")
    findings = served.experts.findings([task.name for task in layout.tasks])
    findings = findings or ["all experts are used, and no gate selects a single expert"]
    run.log_text("\n".join(findings) + "\n", "experts.txt")
    write_artifact(
        artifact,
        settings=settings,
        prepared=prepared,
        state_dict=model.state_dict(),
        trees=model.trees,
        calibration=calibration,
    )
    decision = Decision(str(artifact), False, ())
    values = [f"{name.removeprefix('best/')} {value:.4f}" for name, value in served.to_metrics("best").items()]
    chosen = (
        f"The selection rows of the validation split selected the network of step {result.best_step:,}. Metrics of the "
        f"served model on the evaluation rows:\n\n{bullet_list(values)}"
    )
    if register:
        about = f"{code_block(command_line())}\n\n{_describe_rows(workspace.manifest)}\n\n{chosen}"
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
        replace(workspace.provenance, run_id=run.run_id),
        dict(result.history).get(0),
        network,
    )
    trained.write()
    training_report.write_training_report(trained, settings)
    return trained


def load_best_network(settings: Settings, prepared: FeatureFolder, result: TrainingResult) -> RankingModel:
    """Return the network, without trees, with the weights of the best step of a run.

    Args:
        settings: Settings of the run.
        prepared: Folder of the features.
        result: Result of the training loop.
    """
    layout = ModelLayout.of(prepared.layout, settings)
    model = build_model(layout, settings.model, PlainTables(layout))
    load_unsharded(model, result.best_checkpoint)
    return model


def _validate_served(
    settings: Settings, prepared: FeatureFolder, model: RankingModel, calibration: Calibration
) -> Validation:
    """Validate a model on the evaluation rows: the half of the validation users that did not select the best step."""
    layout, weighted = ModelLayout.of(prepared.layout, settings), settings.training.sampling_correction == "weights"
    validation = prepared.split("validation")
    rows = EncodedDataset(validation, layout, joint_labels=True, weighted=weighted, part=ValidationPart.EVALUATION)
    if not rows.uses_part:
        say("note: too few validation users have labels to hold some out, so all rows select and evaluate the model")
    return validate_on_one_process(model, rows, layout, settings.evaluation.batch_size, calibration)


@contextmanager
def _wait_to_register(run: Run, artifact: Path) -> Iterator[None]:
    """Send a run's saved messages. Add to errors within the context how to register the model later."""
    run.flush(MAX_WAIT_SECONDS)
    fix = f"The model in '{artifact}' is complete but not registered. To register it, run the command with --resume"
    try:
        yield
    except UnreachableError as error:
        raise StoppedError(f"{error}. {fix} once MLflow answers") from None
    except UserError as error:
        raise UserError(f"{error}. {fix} once the error is fixed") from None


def _describe_rows(manifest: Mapping[str, Any]) -> str:
    rows = {split: counts["rows"] for split, counts in manifest["splits"].items()}
    trained = f"{rows['train']:,} rows of `{manifest['log']}` (digest `{manifest['digest']}`)"
    return f"{trained}, validated on {rows['validation']:,}."


def calibrate(settings: Settings, prepared: FeatureFolder, model: RankingModel) -> Calibration:
    """Fit the calibration of a model on the selection rows. Print a note for tasks that can't be calibrated.

    Args:
        settings: Settings of the run.
        prepared: Folder of the features.
        model: Network, with its trees.
    """
    method = settings.training.calibration
    if method == "none":
        return UNCALIBRATED
    layout = ModelLayout.of(prepared.layout, settings)
    # Weight rows as in training. Otherwise, calibration would undo the correction for sampling.
    weighted = settings.training.sampling_correction == "weights"
    rows = EncodedDataset(prepared.split("validation"), layout, weighted=weighted, part=ValidationPart.SELECTION)
    fitted_on = predict_for_calibration(model, layout, rows, settings.evaluation.batch_size)
    calibration, messages = fit_calibration(method, layout.tasks, *fitted_on)
    for sentence in messages:
        say(sentence)
    return calibration


class _RunStatus(StrEnum):
    """Whether a new run starts, or the run in `data.work_dir` is resumed or has already finished."""

    NEW = "new"
    RESUMED = "resumed"
    FINISHED = "finished"


@contextmanager
def _open_workspace(settings: Settings, start: str | None, resume: bool) -> Iterator[_Workspace | FinishedRun | None]:
    """Open and lock everything that a run needs. If the run has finished, yield the result of `train_model` instead."""
    inputs = BuildInputs.of(settings)
    folder, prepared = inputs.work, FeatureFolder(inputs.work / "features")

    def open_first() -> str:
        """Decide for all ranks, and lock their files. Return JSON: status, and URI and run ID of the starting model."""
        find_objective_metric(settings.evaluation.primary_metric)
        has_features = find_existing_features(inputs) is not None
        for name in ("checkpoints", "model"):
            held.enter_context(write_lock(folder / name, "a training", "set `data.work_dir` to another folder"))
        status = _decide(settings, inputs, start, has_features) if resume else _RunStatus.NEW
        if status is _RunStatus.NEW and start is not None and not has_features:
            raise _needs_features(folder)
        if status is not _RunStatus.FINISHED or list_unsent_runs(folder / "unsent"):
            check_server(settings.tracking.resolved_uri, settings.experiment, outbox_folder=folder / "unsent")
            registry.check_registry_names(
                settings.tracking.resolved_uri, settings.registered_model, settings.tracking.alias
            )
        pinned_uri, run_id = start, None
        if status is _RunStatus.NEW and start is not None:
            # Only the first rank looks up the URI, because an alias could move between the lookups of several ranks.
            pinned_uri = registry.pin_model_uri(start, settings.tracking.resolved_uri)
            run_id = registry.find_run_id(pinned_uri, settings.tracking.resolved_uri)
        if status is not _RunStatus.FINISHED:
            keep_existing = start is not None or status is _RunStatus.RESUMED
            held.enter_context(lock_features(inputs, "a training", ("train", "validation"), keep_existing))
        return json.dumps([status, pinned_uri, run_id])

    with training_process_group(settings.training) as (device, ranks), ExitStack() as held:
        status, pinned_uri, run_id = json.loads(ranks.run_on_first_rank(open_first))
        if status == _RunStatus.FINISHED:
            yield FinishedRun.read(folder) if ranks.is_first else None
            return
        manifest, layout = prepared.manifest, ModelLayout.of(prepared.layout, settings)
        checkpoint, weights = None, None
        if status == _RunStatus.RESUMED:
            checkpoint = latest_checkpoint(folder / "checkpoints")
            assert checkpoint is not None, "the first rank has read it"
            provenance = checkpoint.state.provenance
        else:
            source = None
            if start is not None:
                model = registry.fetch_model(pinned_uri, settings.tracking.resolved_uri)
                about = read_artifact(model)  # This also verifies the checksums of the files.
                weights = WarmStart(model, Model.model_validate(about.model), prepared, layout, settings.model)
                source = WarmStartSource(start, pinned_uri, checksum(model / "weights.safetensors"), run_id)
            provenance = Provenance(
                fixed_settings(settings),
                *_feature_version(manifest),
                start=source,
                artifact_settings=artifact_settings(settings),
            )
        yield _Workspace(
            settings, folder, ranks.is_first, device, prepared, manifest, layout, provenance, checkpoint, weights
        )


def _decide(settings: Settings, inputs: BuildInputs, start: str | None, has_features: bool) -> _RunStatus:
    """Decide whether to resume the run in `data.work_dir`, return its result, or start a new run.

    If settings, features or starting model have changed, raise UserError, or start a new run if features reach a later
    day than before.
    """
    checkpoints = inputs.work / "checkpoints"
    finished, checkpoint = FinishedRun.read(inputs.work), latest_checkpoint(checkpoints)
    if finished is not None:
        before = finished.provenance
    elif checkpoint is not None:
        before = checkpoint.state.provenance
    else:
        return _RunStatus.NEW
    features, last_request_us = compute_fingerprint(inputs.logs, inputs.windows), before.last_request_us
    if not has_features and features != before.features and start is not None:
        raise _needs_features(inputs.work)
    if has_features or (finished is not None and features != before.features):
        # Build no features for an unfinished run whose log has changed, because they would replace its features.
        features, last_request_us = _feature_version(prepare(inputs, keep_existing=has_features).manifest)
    difference = before.describe_mismatch(fixed_settings(settings), features, start)
    if difference is None and finished is not None:
        for name, old, new in diff_settings(before.artifact_settings, artifact_settings(settings)):
            difference = f"it was started with {name} {old}, and now it is {new}. Restore the setting"
    weights = Path(start or "", "weights.safetensors")
    if difference is None and before.start is not None and weights.is_file():
        is_same = checksum(weights) == before.start.weights_checksum
        difference = None if is_same else f"the model in '{start}' has changed. Restore it"
    if difference is None:
        return _RunStatus.RESUMED if finished is None else _RunStatus.FINISHED
    if last_request_us > before.last_request_us:
        say(f"the features reach a later day than the run in '{checkpoints}': a new run starts")
        return _RunStatus.NEW
    raise UserError(f"the run in '{checkpoints}' can't be resumed: {difference}, or train without --resume")


def _needs_features(work: Path) -> UserError:
    return UserError(
        f"'{work}' has no features for this log and these settings. To start from a model, run mmoe-rec features with "
        "--extend first"
    )


def _feature_version(manifest: Mapping[str, Any]) -> tuple[str, int]:
    """Return the fingerprint of features, and the time of their last request in microseconds since 1970."""
    return manifest["fingerprint"], manifest["request_microseconds"][1]
