"""The steps that commands are made of, each from settings to a folder or a result."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmoe_rec import tracking
from mmoe_rec.atomic import atomic_file
from mmoe_rec.errors import UserError
from mmoe_rec.features.build import Prepared, at_hand, encode_with, prepare
from mmoe_rec.features.extend import Extended, extend
from mmoe_rec.features.learn import Window
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.features.steps import BuildOptions, Logs
from mmoe_rec.progress import say
from mmoe_rec.schema import Schema
from mmoe_rec.settings import Settings
from pipelines.finished import CHALLENGER, Finished, Trained, training_key

if TYPE_CHECKING:
    import torch

    from mmoe_rec.evaluation.scoring import Scored
    from mmoe_rec.evaluation.sums import EvaluationSums
    from mmoe_rec.features.layout import Layout
    from mmoe_rec.model.calibration import Calibration
    from mmoe_rec.model.mmoe import RankingModel
    from mmoe_rec.model.utilisation import Utilisation
    from mmoe_rec.training.checkpoint import Checkpoint
    from mmoe_rec.training.loop import TrainingResult
    from mmoe_rec.training.validation import Validation
    from mmoe_rec.training.warm_start import WarmStart


def prepare_features(settings: Settings) -> Prepared:
    """Fitted features and encoded rows; what is there already is taken if it is still right."""
    return prepare(*_log_and_place(settings))


def extend_features(settings: Settings) -> Extended | None:
    """Adds new files of the log to the features at hand; None where there are none."""
    return extend(*_log_and_place(settings))


def _log_and_place(settings: Settings) -> tuple[str, Schema, dict[str, Window], Path, BuildOptions]:
    data = settings.data
    return data.log, settings.schema_, settings.split.windows(), Path(data.work), build_options(settings)


def build_options(settings: Settings) -> BuildOptions:
    """How the settings want features to be built."""
    names = [each.name for each in fields(BuildOptions)]
    return BuildOptions(**{name: getattr(settings.data, name) for name in names})


def train_model(settings: Settings, start: str | None = None, resume: bool = False) -> Trained | None:
    """Features -> training on all ranks -> artifact -> registry. Gives None on ranks other than the first.

    start: address of a model to start from. It needs features at hand that were extended from that model's. resume: go
    on from the last checkpoint, where there is one; a training that has come to its end is not begun again.
    """
    # A wrong log or address is told of before torch is loaded.
    found = at_hand(*_log_and_place(settings))
    checkpoints = Path(settings.data.work) / "checkpoints"
    going_on = resume and (checkpoints / "latest.json").is_file()
    folder = None if start is None or going_on else tracking.local_model(start, settings.tracking.address)
    _check_training_rows(settings, found, start)
    warm_start = None if folder is None or found is None else _warm_start(settings, found, folder)
    _ask_mlflow(settings, resume)

    from mmoe_rec.devices import pick_device
    from mmoe_rec.training.checkpoint import latest_checkpoint
    from mmoe_rec.training.ranks import process_group

    device = pick_device(settings.training.device)
    with process_group(device, settings.training.timeout_minutes) as ranks:
        ranks.after_first(lambda: prepare_features(settings))
        checkpoint = latest_checkpoint(checkpoints) if resume else None
        if resume and (finished := Finished.read(checkpoints)) is not None:
            return replace(finished.trained(settings), before=True) if ranks.first else None
        if ranks.first:
            Finished.forget(checkpoints)
        return _train(settings, ranks.first, device, start, warm_start, resume, checkpoint)


def _ask_mlflow(settings: Settings, resume: bool) -> None:
    """Raises UserError, before any work, where MLflow is away or would refuse a name. What waits for it is sent."""
    work = Path(settings.data.work)
    ended = resume and (work / "checkpoints" / "finished.json").is_file()
    if int(os.environ.get("RANK", "0")) or (ended and not tracking.runs_waiting(work / "unsent")):
        return
    names = (settings.experiment, settings.registered_model, settings.tracking.alias)
    tracking.check(settings.tracking.address, *names, unsent=work / "unsent")


def _train(
    settings: Settings,
    first: bool,
    device: torch.device,
    start: str | None,
    warm_start: WarmStart | None,
    resume: bool,
    checkpoint: Checkpoint | None,
) -> Trained | None:
    import torch.distributed as dist

    from mmoe_rec.training.checkpoint import Origin, fixed_settings
    from mmoe_rec.training.loop import Trainer

    work = Path(settings.data.work)
    prepared = Prepared(work / "features")
    run_id = None
    origin = Origin(fixed_settings(settings.model, settings.training), prepared.manifest["fingerprint"])
    if checkpoint is not None:
        checkpoint.state.origin.check(origin, checkpoint.folder)
        run_id = checkpoint.state.origin.run_id
    key = training_key(work / "checkpoints", new=not resume) if first and checkpoint is None else None
    with tracking.open_run(
        settings.tracking.address,
        settings.experiment,
        run_id=run_id,
        key=key,
        active=first,
        unsent=work / "unsent",
    ) as run:
        if first:
            say(f"MLflow run: {run.address}")
        _log_start(run, settings, prepared)
        if first and start is not None and checkpoint is None:
            # An alias such as `champion` will point at the new model soon.
            origin_run = tracking.run_of(start, settings.tracking.address)
            run.set_tags({"warm_start": start, "warm_start.run": origin_run or "unknown"})

        def draw(found: Validation, step: int) -> None:
            _draw_gates(run, prepared.layout, found.experts, f"plots/gates/step_{step:07}.png")

        trainer = Trainer(
            prepared,
            settings.model,
            settings.training,
            device,
            work / "checkpoints",
            run.log_metrics,
            warm_start,
            checkpoint,
            replace(origin, run_id=run.run_id),
            watch=draw,
        )
        result = trainer.run()
        dist.barrier()
        return _finish(run, settings, prepared, result) if first else None


def _check_training_rows(settings: Settings, found: Prepared | None, start: str | None) -> None:
    """Raises UserError where there is nothing to train on, or to go on from."""
    if start is not None and found is None:
        raise UserError(
            f"'{settings.data.work}' has no features of this log, these features and this split: to go on from a "
            "model, run python -m pipelines.features with --extend first"
        )
    if found is not None:
        empty = [name for name in ("train", "validation") if not found.manifest["splits"][name]["rows"]]
        if empty:
            raise UserError(
                f"the features in '{found.folder}' have no {empty[0]} rows: they were extended by new rows only, and "
                f"none of these lies in that split; extend them by more rows, with `split` set around them"
            )


def _warm_start(settings: Settings, prepared: Prepared, folder: Path) -> WarmStart:
    from mmoe_rec.serving.artifact import read_artifact
    from mmoe_rec.settings import Model
    from mmoe_rec.training.warm_start import WarmStart

    return WarmStart(folder, Model.model_validate(read_artifact(folder).model), prepared, settings.model)


def _log_start(run: tracking.Run, settings: Settings, prepared: Prepared) -> None:
    sections = {"model", "training", "split", "data", "evaluation", "serving"}
    run.log_params(settings.model_dump(mode="json", include=sections))
    run.log_text(settings.to_yaml(), "settings.yaml")
    run.log_dict(prepared.manifest, "data.json")
    manifest = prepared.manifest
    run.set_tags({"data.digest": manifest["digest"], "features.fingerprint": manifest["fingerprint"]})
    run.set_tags({"data.files_left_out": len(manifest["left_out"])})  # which and why is in data.json
    run.log_text(prepared.layout.to_json(), "features/layout.json")
    run.log_text((prepared.serving / "pipeline.json").read_text(encoding="utf-8"), "features/pipeline.json")


def _finish(run: tracking.Run, settings: Settings, prepared: Prepared, result: TrainingResult) -> Trained:
    from mmoe_rec.model.mmoe import build_model
    from mmoe_rec.model.tables import plain_tables
    from mmoe_rec.serving.artifact import write_artifact
    from mmoe_rec.training.sharding import load_plain

    work, layout, best = Path(settings.data.work), prepared.layout, result.best
    assert best is not None, "every training validates at least once"
    run.log_text(result.plan, "sharding_plan.txt")
    _draw_gates(run, layout, best.experts, "plots/gate_weights.png")
    findings = best.experts.findings([task.name for task in layout.tasks])
    run.log_text("\n".join(findings or ["no expert is dead and no gate has collapsed"]) + "\n", "experts.txt")
    run.log_metrics({f"best.{name}": value for name, value in best.flat().items()}, result.best_step)
    run.log_metrics({"train.rows_per_s": result.rows_per_s, "train.waiting_share": result.waiting}, result.steps)
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
    before = dict(result.history).get(0)
    select_by = settings.training.select_by
    better = before is None or best.objective(select_by, layout) > before.objective(select_by, layout)
    alias = settings.tracking.alias if better else CHALLENGER
    run.set_tags({"promoted": better})
    with tracking.or_later(run, work / "model"):
        tracking.register(run, work / "model", settings.registered_model, alias)
    started_from = None if before is None else before.to_dict()
    finished = Finished(best.to_dict(), result.best_step, result.rows_per_s, result.waiting, alias, started_from)
    finished.write(work / "checkpoints")
    return finished.trained(settings)


def _calibrate(settings: Settings, prepared: Prepared, model: RankingModel) -> Calibration:
    """The calibration of a trained model on the validation rows; tasks that are left as they are are told of."""
    from mmoe_rec.model.calibration import UNCALIBRATED

    method = settings.training.calibration
    if method == "none":
        return UNCALIBRATED
    from mmoe_rec.batches.reader import EncodedRows
    from mmoe_rec.evaluation.fit_calibration import calibration_rows, fit_calibration

    layout = prepared.layout
    # Without the weights that training had, it would undo what they correct.
    weighted = settings.training.sampling_correction == "weights"
    rows = EncodedRows(prepared.split("validation"), layout, weighted=weighted)
    fitted_on = calibration_rows(model, layout, rows, settings.evaluation.batch_size)
    calibration, left = fit_calibration(method, layout.tasks, *fitted_on)
    for sentence in left:
        say(sentence)
    return calibration


@dataclass(frozen=True)
class Evaluated:
    """An evaluation: the scored test rows, their sums, and the summary of metrics."""

    scored: Scored
    sums: EvaluationSums
    summary: dict[str, Any]


def evaluate_model(settings: Settings, address: str, out: Path) -> Evaluated:
    """Scores the test rows with the model at an address, writes metrics, sums and plots to a folder, logs to MLflow."""
    # A wrong address is told of before torch is loaded.
    artifact = tracking.local_model(address, settings.tracking.address)
    from mmoe_rec.batches.reader import EncodedRows
    from mmoe_rec.evaluation.scoring import score_rows
    from mmoe_rec.evaluation.summary import summarise
    from mmoe_rec.serving.ranker import Ranker

    ranker = Ranker.load(artifact)
    rows = EncodedRows(test_rows(settings, artifact, ranker.about.fingerprint), ranker.layout)
    scored = score_rows(
        ranker.model,
        ranker.layout,
        rows,
        settings.evaluation.batch_size,
        calibration=ranker.calibration,
        weighted=settings.training.sampling_correction == "weights",
    )
    sums = scored.measure()
    summary = summarise(sums, settings.evaluation.resamples)
    summary["sampling_correction"] = settings.training.sampling_correction
    evaluated = Evaluated(scored, sums, summary)
    sums.save(out / "sums")
    with atomic_file(out / "metrics.json") as file:
        file.write_text(json.dumps(summary, indent=1), encoding="utf-8")
    try:
        _log_evaluation(settings, address, evaluated, out)
    except tracking.UnreachableError as error:
        say(f"{error}: the evaluation is in '{out}', but not in MLflow")
    return evaluated


def test_rows(settings: Settings, artifact: Path, fingerprint: str) -> Path:
    """Encoded test rows: those at hand if the model's features made them, else freshly encoded with the model's."""
    prepared = at_hand(*_log_and_place(settings))
    if prepared is not None and prepared.manifest["fingerprint"] == fingerprint:
        return prepared.split("test")
    pipeline = FeaturePipeline.load(artifact / "features", memories=False)
    if set(pipeline.schema.tasks) != set(settings.tasks):
        raise UserError(
            f"the model predicts {', '.join(pipeline.schema.tasks)}; the settings have {', '.join(settings.tasks)}"
        )
    # The logs are the settings': the model's may have lain elsewhere.
    events = {name: settings.data.events.get(name, event) for name, event in pipeline.schema.events.items()}
    logs = Logs(settings.data.log, pipeline.schema.model_copy(update={"events": events}), build_options(settings))
    encoded = Path(settings.data.work) / "evaluation" / "encoded"
    encode_with(artifact / "features", logs, {"test": settings.split.windows()["test"]}, encoded)
    return encoded / "test"


def _log_evaluation(settings: Settings, address: str, evaluated: Evaluated, out: Path) -> None:
    from mmoe_rec.evaluation.plots import calibration_figure
    from mmoe_rec.evaluation.summary import flatten

    layout = evaluated.scored.layout
    run_id = tracking.run_of(address, settings.tracking.address)
    with tracking.open_run(settings.tracking.address, settings.experiment, run_name="evaluation", run_id=run_id) as run:
        run.log_metrics({f"test.{name}": value for name, value in flatten(evaluated.summary).items()})
        run.log_artifact(out / "metrics.json", "evaluation")
        for task in layout.tasks:
            if task.kind == "binary":
                figure = calibration_figure(evaluated.summary, task.name)
                figure.savefig(out / f"calibration_{task.name}.png")
                run.log_figure(figure, f"evaluation/calibration_{task.name}.png")
        _draw_gates(run, layout, evaluated.scored.experts, "evaluation/gate_weights.png")


def _draw_gates(run: tracking.Run, layout: Layout, experts: Utilisation, name: str) -> None:
    if run.run_id is None:
        return  # another rank than the first draws nothing
    from mmoe_rec.evaluation.plots import gate_weights_figure

    weights = {task.name: experts.weights[index].numpy() for index, task in enumerate(layout.tasks)}
    run.log_figure(gate_weights_figure(weights), name)
