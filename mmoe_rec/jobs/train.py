"""A training, from settings to a registered model."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmoe_rec.atomic import checksum
from mmoe_rec.evaluation.comparison import find_objective
from mmoe_rec.jobs.after_training import Promotion, promote
from mmoe_rec.jobs.finished import Finished, Trained, training_key
from mmoe_rec.jobs.places import log_and_place
from mmoe_rec.jobs.resuming import Course, begin, check_training_rows, something_left
from mmoe_rec.jobs.run_page import WithMachine, as_code, command, data_sets, draw_gates, name_of_training, quoted
from mmoe_rec.preprocessing.prepare import Prepared, existing
from mmoe_rec.progress import say
from mmoe_rec.settings.sections import Settings
from mmoe_rec.tracking import registry, runs
from mmoe_rec.tracking.client import hide_password
from mmoe_rec.tracking.outbox import list_waiting_runs
from mmoe_rec.tracking.registry import check_address, fetch_model
from mmoe_rec.tracking.runs import Run
from mmoe_rec.training.origin import result_settings

if TYPE_CHECKING:
    import torch

    from mmoe_rec.model.layout import ModelLayout
    from mmoe_rec.model.mmoe import RankingModel
    from mmoe_rec.model.score import Calibration
    from mmoe_rec.training.choices import Choices
    from mmoe_rec.training.loop import TrainingResult
    from mmoe_rec.training.origin import Origin
    from mmoe_rec.training.validation import Validation
    from mmoe_rec.training.warm_start import WarmStart


def train_model(
    settings: Settings,
    start: str | None = None,
    resume: bool = False,
    *,
    parent: str | None = None,
    register: bool = True,
) -> Trained | None:
    """Features -> training on all ranks -> artifact -> registry. Gives None on ranks other than the first.

    start: address of a model to start from, which needs existing features that were extended from that model's. resume:
    go on from the last checkpoint, where there is one; a training that has ended is not begun again, unless the
    features go on to a later day. parent: id of the open run that this one is a part of; register: whether the model
    goes into the registry. Raises UserError where another process trains in `data.work`.
    """
    # A wrong setting, log or address is reported before torch is loaded.
    find_objective(settings.evaluation.decide_by)
    found = existing(*log_and_place(settings))
    checkpoints = Path(settings.data.work) / "checkpoints"
    if not (resume and something_left(checkpoints)):
        check_training_rows(settings, found, start)
        if start is not None:
            check_address(start, settings.tracking.address)
    _ask_mlflow(settings, resume)

    from mmoe_rec.devices import pick_device
    from mmoe_rec.training.ranks import process_group

    device = pick_device(settings.training.device)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1 or {settings.training.tables, settings.training.products} != {"auto"}:
        from mmoe_rec.training.choices import check_offered

        check_offered(settings.training, device.type, ranks)
    with (
        process_group(device, settings.training.timeout_minutes) as group,
        contextlib.ExitStack() as held,
    ):
        text = group.after_first(lambda: begin(settings, start, resume, held).to_json())
        course = Course.from_json(text)
        if course.kind == "at its end":
            finished = Finished.read(checkpoints) if group.first else None
            return None if finished is None else finished.trained(settings, before=True)
        return _train(settings, group.first, device, course, resume, parent, register)


def _ask_mlflow(settings: Settings, resume: bool) -> None:
    """Raises UserError, before any work, where MLflow is away or would refuse a name. Sends what waits for it."""
    work = Path(settings.data.work)
    ended = resume and (work / "checkpoints" / "finished.json").is_file()
    if int(os.environ.get("RANK", "0")) or (ended and not list_waiting_runs(work / "unsent")):
        return
    address = settings.tracking.address
    runs.check_server(address, settings.experiment, unsent=work / "unsent")
    registry.check_names(address, settings.registered_model, settings.tracking.alias)


def _train(
    settings: Settings,
    first: bool,
    device: torch.device,
    course: Course,
    resume: bool,
    parent: str | None,
    register: bool,
) -> Trained | None:
    import torch.distributed as dist

    from mmoe_rec.model.layout import ModelLayout
    from mmoe_rec.training.checkpoint import latest_checkpoint
    from mmoe_rec.training.fbgemm import note, torchrec_installed
    from mmoe_rec.training.loop import Trainer
    from mmoe_rec.training.origin import Origin, fixed_settings

    work, start = Path(settings.data.work), course.start
    prepared, checkpoints = Prepared(work / "features"), work / "checkpoints"
    manifest, layout = prepared.manifest, ModelLayout.of(prepared.layout, settings)
    until = manifest["request_microseconds"][1]
    origin = Origin(fixed_settings(settings), manifest["fingerprint"], until, start=start)
    run_id, key, checkpoint, warm_start = None, None, None, None
    if course.kind == "goes on":
        checkpoint = latest_checkpoint(checkpoints)
        assert checkpoint is not None, "the first rank has read it"
        checkpoint.state.origin.check(origin, checkpoint.folder)
        run_id = checkpoint.state.origin.run_id
    elif start is not None:
        warm_start = _warm_start(settings, prepared, fetch_model(start.exact, settings.tracking.address))
    if first and checkpoint is None:
        key = training_key(checkpoints, origin, new=not resume)
    with runs.open_run(
        settings.tracking.address,
        settings.experiment,
        run_id=run_id,
        key=key,
        parent=parent,
        run_name=name_of_training(settings, None if start is None else start.exact),
        active=first,
        unsent=work / "unsent",
    ) as run:
        if first:
            say(f"MLflow run: {run.address}")
            if not torchrec_installed():
                say(note())
        _log_start(run, settings, prepared)
        run.log_inputs(data_sets(settings, manifest, "train", "validation"))
        begun = f"{as_code(command())}\n\n{_rows_told(manifest)}"
        run.describe("Resumed" if run.is_described("Training") else "Training", begun)
        if start is not None:
            # An alias such as `champion` will point at the new model soon.
            tags = {"warm_start": start.address, "warm_start.model": start.exact}
            run.set_tags({**tags, "warm_start.run": start.run or "unknown", "warm_start.weights": start.weights})

        def draw(found: Validation, step: int) -> None:
            draw_gates(run, layout, found.experts, f"plots/gates/step_{step:07}.png")

        origin = replace(origin, run_id=run.run_id)
        trainer = Trainer(
            prepared,
            layout,
            settings.model,
            settings.training,
            device,
            checkpoints,
            WithMachine(run, settings.tracking.system_metrics),
            warm_start,
            checkpoint,
            origin,
            watch=draw,
        )
        _log_choices(run, trainer.choices, first)
        if first and checkpoint is None:
            Finished.forget(checkpoints)
        result = trainer.run()
        dist.barrier()
        return _finish(run, settings, prepared, layout, result, origin, register) if first else None


def _log_choices(run: Run, choices: Choices, first: bool) -> None:
    if first:
        say(f"computing in {choices}")
    run.log_dict(choices.to_dict(), "choices.json")
    taken = {name: value for name, value in choices.to_dict().items() if name != "measured"}
    run.set_tags({f"choices.{name}": str(value) for name, value in taken.items()})


def _warm_start(settings: Settings, prepared: Prepared, folder: Path) -> WarmStart:
    from mmoe_rec.inference.artifact import read_artifact
    from mmoe_rec.model.layout import ModelLayout
    from mmoe_rec.settings.model import Model
    from mmoe_rec.training.warm_start import WarmStart

    # The first rank has checked its files: all ranks read theirs from one place.
    structure = Model.model_validate(read_artifact(folder, verify=False).model)
    return WarmStart(folder, structure, prepared, ModelLayout.of(prepared.layout, settings), settings.model)


def _log_start(run: Run, settings: Settings, prepared: Prepared) -> None:
    sections = {"model", "training", "split", "data", "evaluation", "serving"}
    run.log_params({**settings.model_dump(mode="json", include=sections), **settings.choices})
    run.log_text(settings.to_yaml(), "settings.yaml")
    run.log_dict(prepared.manifest, "data.json")
    manifest = prepared.manifest
    run.set_tags({"data.digest": manifest["digest"], "features.fingerprint": manifest["fingerprint"]})
    run.set_tags({"data.files_left_out": len(manifest["left_out"])})  # which and why is in data.json
    run.log_text(prepared.layout.to_json(), "features/layout.json")
    run.log_text((prepared.serving / "pipeline.json").read_text(encoding="utf-8"), "features/pipeline.json")


def _finish(
    run: Run,
    settings: Settings,
    prepared: Prepared,
    layout: ModelLayout,
    result: TrainingResult,
    origin: Origin,
    register: bool,
) -> Trained:
    from mmoe_rec.inference.writing import write_artifact
    from mmoe_rec.model.mmoe import build_model
    from mmoe_rec.model.tables import plain_tables
    from mmoe_rec.training.checkpoint import load_plain

    work, best = Path(settings.data.work), result.best
    assert best is not None, "every training validates at least once"
    run.log_text(result.plan, "sharding_plan.txt")
    draw_gates(run, layout, best.experts, "plots/gate_weights.png")
    findings = best.experts.findings([task.name for task in layout.tasks])
    run.log_text("\n".join(findings or ["all experts are used, and no gate settles on one"]) + "\n", "experts.txt")
    run.log_metrics(best.flat("best"), result.best_step)
    run.log_metrics({"train/rows_per_s": result.rows_per_s, "train/waiting_share": result.waiting}, result.steps)
    model = build_model(layout, settings.model, plain_tables(layout))
    load_plain(model, result.best_checkpoint)
    calibration = _calibrate(settings, prepared, model)
    if calibration.tasks:
        run.log_dict(calibration.to_dict(), "calibration.json")
    write_artifact(
        work / "model",
        settings=settings,
        prepared=prepared,
        state_dict=model.state_dict(),
        calibration=calibration,
    )
    promotion = Promotion(str(work / "model"), False, ())
    chosen = f"The state of step {result.best_step:,} was chosen, by its validation:\n\n{_table_of(best)}"
    if register:
        about = f"{as_code(command())}\n\n{_rows_told(prepared.manifest)}\n\n{chosen}"
        with registry.wait_to_register(run, work / "model"):
            promotion = promote(run, settings, prepared, model, work / "model", about)
    run.describe("Result", f"{quoted(promotion.compared)}\n\n{chosen}\n\nModel: `{promotion.address}`")
    before = dict(result.history).get(0)
    finished = Finished(
        replace(origin, settings=result_settings(settings)),
        checksum(work / "model" / "weights.safetensors"),
        promotion.address,
        best.to_dict(),
        result.best_step,
        result.rows_per_s,
        result.waiting,
        promotion.compared,
        None if before is None else before.to_dict(),
    )
    finished.write(work / "checkpoints")
    return finished.trained(settings)


def _rows_told(manifest: Mapping[str, Any]) -> str:
    rows = {split: counts["rows"] for split, counts in manifest["splits"].items()}
    return (
        f"{rows['train']:,} rows of `{hide_password(manifest['log'])}` (digest `{manifest['digest']}`), validated on "
        f"{rows['validation']:,}."
    )


def _table_of(best: Validation) -> str:
    """In Markdown."""
    metrics = {"loss": best.loss, "auc": best.auc, "gauc": best.gauc, "calibration": best.calibration}
    lines = [f"| task | {' | '.join(metrics)} |", f"|---{'|---' * len(metrics)}|"]
    for task in best.loss:
        cells = [f"{each[task]:.4f}" if task in each else "–" for each in metrics.values()]  # noqa: RUF001
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _calibrate(settings: Settings, prepared: Prepared, model: RankingModel) -> Calibration:
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
