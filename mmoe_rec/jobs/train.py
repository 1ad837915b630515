"""A training, from settings to a registered model: `train_model` reads from top to bottom."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmoe_rec.atomic import checksum
from mmoe_rec.jobs.promotion import Decision, promote_trained
from mmoe_rec.jobs.run_page import MachineMonitor, as_code, command, data_sets, draw_gates, name_training, quoted
from mmoe_rec.jobs.workspace import Workspace, is_first_rank, open_workspace
from mmoe_rec.preprocessing.prepare import FeatureFolder
from mmoe_rec.progress import say
from mmoe_rec.settings.sections import Settings
from mmoe_rec.tracking import registry, runs
from mmoe_rec.tracking.client import hide_password
from mmoe_rec.tracking.runs import Run
from mmoe_rec.training.fbgemm import torchrec_installed
from mmoe_rec.training.origin import result_settings

if TYPE_CHECKING:
    from rich.table import Table

    from mmoe_rec.model.mmoe import RankingModel
    from mmoe_rec.model.score import Calibration
    from mmoe_rec.training.checkpoint import FinishedTraining
    from mmoe_rec.training.choices import Choices
    from mmoe_rec.training.loop import Trainer, TrainingResult
    from mmoe_rec.training.validation import Validation

FEW_STEPS = 50


def train_model(
    settings: Settings,
    start: str | None = None,
    resume: bool = False,
    *,
    parent: str | None = None,
    register: bool = True,
) -> FinishedTraining | None:
    """Features -> training on all ranks -> artifact -> registry. Gives None on ranks other than the first.

    start: address of a model to start from, which needs existing features that were extended from that model's. resume:
    go on from the last checkpoint, where there is one; a training that has ended is not begun again, unless the
    features go on to a later day. parent: id of the open run that this one is a part of; register: whether the model
    goes into the registry. Raises UserError where another process trains in `data.work`.
    """
    with open_workspace(settings, start, resume) as workspace:
        if workspace is None:
            from mmoe_rec.training.checkpoint import FinishedTraining

            return FinishedTraining.read(Path(settings.data.work)) if is_first_rank() else None
        with _open_run(workspace, parent) as run:
            _log_start(run, workspace)
            trainer = _make_trainer(run, workspace)
            _log_choices(run, trainer.choices, workspace.first)
            result = trainer.run()
            return _finish(run, workspace, result, register) if workspace.first else None


def _open_run(workspace: Workspace, parent: str | None) -> AbstractContextManager[Run]:
    """The run of the training, which a resumed or killed one finds again."""
    settings, start, before = workspace.settings, workspace.origin.start, workspace.checkpoint
    return runs.open_run(
        settings.tracking.address,
        settings.experiment,
        run_id=None if before is None else before.state.origin.run_id,
        key=workspace.key,
        parent=parent,
        run_name=name_training(settings, None if start is None else start.exact),
        active=workspace.first,
        unsent=workspace.folder / "unsent",
    )


def _make_trainer(run: Run, workspace: Workspace) -> Trainer:
    from mmoe_rec.training.loop import Trainer

    settings, layout = workspace.settings, workspace.layout

    def draw(validation: Validation, step: int) -> None:
        draw_gates(run, layout, validation.experts, f"plots/gates/step_{step:07}.png")

    return Trainer(
        workspace.prepared,
        layout,
        settings.model,
        settings.training,
        workspace.device,
        workspace.checkpoints,
        MachineMonitor(run, settings.tracking.system_metrics),
        workspace.weights,
        workspace.checkpoint,
        replace(workspace.origin, run_id=run.run_id),
        watch=draw,
    )


def _log_choices(run: Run, choices: Choices, first: bool) -> None:
    if first:
        say(f"computing in {choices}")
    values = asdict(choices)
    tags = {f"choices.{name}": str(value) for name, value in values.items() if name != "measured"}
    run.record(tags=tags, files={"choices.json": values})


def _log_start(run: Run, workspace: Workspace) -> None:
    """What the run's page says before the first step."""
    settings, prepared, manifest = workspace.settings, workspace.prepared, workspace.manifest
    start = workspace.origin.start
    if workspace.first:
        say(f"MLflow run: {run.address}")
        if not torchrec_installed():
            say(
                "tables are trained by plain PyTorch in one process, since torchrec (fbgemm) is not installed: "
                "`mmoe-rec doctor` says what to type for sharded tables"
            )
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
        {
            "settings.yaml": settings.to_yaml(),
            "data.json": manifest,
            "features/layout.json": (prepared.folder / "encoded" / "layout.json").read_text(encoding="utf-8"),
            "features/pipeline.json": (prepared.serving / "pipeline.json").read_text(encoding="utf-8"),
        },
        data_sets(settings, manifest, "train", "validation"),
    )
    command_and_rows = f"{as_code(command())}\n\n{_describe_rows(manifest)}"
    run.describe("Resumed" if run.is_described("Training") else "Training", command_and_rows)


def _finish(run: Run, workspace: Workspace, result: TrainingResult, register: bool) -> FinishedTraining:
    """Best state -> artifact -> registry -> result on disk."""
    from mmoe_rec.inference.writing import write_artifact
    from mmoe_rec.model.mmoe import build_model
    from mmoe_rec.model.tables import PlainTables
    from mmoe_rec.training.checkpoint import FinishedTraining, load_plain

    settings, prepared, layout, best = workspace.settings, workspace.prepared, workspace.layout, result.best
    artifact = workspace.folder / "model"
    assert best is not None, "every training validates at least once"
    run.log_text(result.plan, "sharding_plan.txt")
    draw_gates(run, layout, best.experts, "plots/gate_weights.png")
    findings = best.experts.findings([task.name for task in layout.tasks])
    run.log_text("\n".join(findings or ["all experts are used, and no gate settles on one"]) + "\n", "experts.txt")
    run.log_metrics(best.flat("best"), result.best_step)
    run.log_metrics({"train/rows_per_s": result.rows_per_s, "train/waiting_share": result.waiting}, result.steps)
    model = build_model(layout, settings.model, PlainTables(layout))
    load_plain(model, result.best_checkpoint)
    calibration = _calibrate(settings, prepared, model)
    if calibration.tasks:
        run.log_text(calibration.to_dict(), "calibration.json")
    write_artifact(
        artifact,
        settings=settings,
        prepared=prepared,
        state_dict=model.state_dict(),
        calibration=calibration,
    )
    decision = Decision(str(artifact), False, ())
    chosen = f"The state of step {result.best_step:,} was chosen, by its validation:\n\n{_make_table(best)}"
    if register:
        about = f"{as_code(command())}\n\n{_describe_rows(workspace.manifest)}\n\n{chosen}"
        with registry.wait_to_register(run, artifact):
            decision = promote_trained(run, settings, prepared, model, artifact, about)
    run.describe("Result", f"{quoted(decision.reasons)}\n\n{chosen}\n\nModel: `{decision.address}`")
    trained = FinishedTraining(
        artifact,
        decision.address,
        best,
        result.best_step,
        result.rows_per_s,
        result.waiting,
        decision.reasons,
        replace(workspace.origin, run_id=run.run_id, settings=result_settings(settings)),
        checksum(artifact / "weights.safetensors"),
        dict(result.history).get(0),
    )
    trained.write()
    return trained


def _describe_rows(manifest: Mapping[str, Any]) -> str:
    rows = {split: counts["rows"] for split, counts in manifest["splits"].items()}
    return (
        f"{rows['train']:,} rows of `{hide_password(manifest['log'])}` (digest `{manifest['digest']}`), validated on "
        f"{rows['validation']:,}."
    )


def _make_table(best: Validation) -> str:
    """The metrics of the best state, as a table in Markdown."""
    metrics = {"loss": best.loss, "auc": best.auc, "gauc": best.gauc, "calibration": best.calibration}
    lines = [f"| task | {' | '.join(metrics)} |", f"|---{'|---' * len(metrics)}|"]
    for task in best.loss:
        cells = [f"{each[task]:.4f}" if task in each else "–" for each in metrics.values()]  # noqa: RUF001
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _calibrate(settings: Settings, prepared: FeatureFolder, model: RankingModel) -> Calibration:
    """The calibration of a trained model on the validation rows; reports the tasks that it leaves as they are."""
    from mmoe_rec.model.score import UNCALIBRATED

    method = settings.training.calibration
    if method == "none":
        return UNCALIBRATED
    from mmoe_rec.batches.encoded_rows import EncodedRows
    from mmoe_rec.evaluation.calibration import calibration_rows, fit_calibration

    layout = prepared.layout
    # Without the weights that training had, it would undo what they correct.
    weighted = settings.training.sampling_correction == "weights"
    rows = EncodedRows(prepared.split("validation"), layout, weighted=weighted)
    fitted_on = calibration_rows(model, layout, rows, settings.evaluation.batch_size)
    calibration, left = fit_calibration(method, layout.tasks, *fitted_on)
    for sentence in left:
        say(sentence)
    return calibration


def describe_training(trained: FinishedTraining, settings: Settings) -> Iterator[Table | str]:
    """The table of all validations of a training that has ended, why its state was chosen, and warnings."""
    from mmoe_rec.inference.artifact import read_calibration
    from mmoe_rec.report.tables import validations_table
    from mmoe_rec.training.checkpoint import latest_checkpoint
    from mmoe_rec.training.validation import explain_choice, warnings_of

    checkpoint = latest_checkpoint(trained.artifact.parent / "checkpoints")
    if checkpoint is not None:
        yield validations_table(checkpoint.state.history, trained.best_step)
        if checkpoint.state.step < FEW_STEPS:
            steps = f"{checkpoint.state.step:,} step{'s' * (checkpoint.state.step != 1)}"
            yield (
                f"warning: the training had {steps}, of training.batch_size {settings.training.batch_size:,}: a model "
                "learns little in so few; take a smaller batch size, or more training.epochs"
            )
    yield from explain_choice(trained.best, trained.best_step, settings.training.select_by)
    for warning in warnings_of(trained.best, read_calibration(trained.artifact).tasks):
        yield f"warning: {warning}"
