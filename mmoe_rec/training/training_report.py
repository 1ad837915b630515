"""Report of a finished run."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mmoe_rec.inference.artifact import artifact_version, read_artifact
from mmoe_rec.report.formatting import NO_VALUE
from mmoe_rec.report.parts import Cell, Mark, Report, Row, Sentence, Table
from mmoe_rec.report.report_files import write_report
from mmoe_rec.settings.sections import Settings
from mmoe_rec.training.checkpoint import FinishedRun, latest_checkpoint
from mmoe_rec.training.provenance import fixed_settings
from mmoe_rec.training.validation import Validation, explain_choice, find_warnings

FOLDER = "training"
"""Folder of the report in `data.work_dir`."""
_METRICS = {"loss ↓": "loss", "auc ↑": "auc", "calibration → 1": "calibration"}


def validations_table(
    history: Sequence[tuple[int, Validation]], best_step: int, served: Validation, network: Validation | None = None
) -> Table:
    """Build a table with a row for each validation and task, ending with the served model.

    Args:
        history: Step and result of each validation of the network (without trees) on the selection rows, by step.
        best_step: Step whose weights were selected.
        served: Validation of the served model on the evaluation rows.
        network: Validation of the network without trees on the evaluation rows. None if the model has no trees.
    """
    note = (
        "Rows with a step show the network alone on the selection rows. The last rows show the network alone and the "
        "served model on the evaluation rows, which belong to other users. Calibration is predicted / observed."
    )
    steps = {f"{step:,}{' chosen' if step == best_step else ''}": validation for step, validation in history}
    final = {"served": served} if network is None else {"network": network, "served": served}
    rows = list[Row]()
    for label, validation in {**steps, **final}.items():
        for index, name in enumerate(dict.fromkeys([*validation.loss, *validation.auc])):
            values = [getattr(validation, metric).get(name) for metric in _METRICS.values()]
            texts = [NO_VALUE if value is None else f"{value:.4f}" for value in values]
            mark: Mark = "best" if label == "served" else ""
            rows.append(("" if index else label, name, *(Cell(text, "", mark) for text in texts)))
    return Table("Validations", ("step", "task", *_METRICS), rows, note, text_columns=2)


def make_report(trained: FinishedRun, settings: Settings) -> Report:
    """Build the report with validations, the reason for the selected step, warnings, and the speed.

    Args:
        trained: The finished run.
        settings: Settings of the run.
    """
    about = read_artifact(trained.artifact, verify=False)
    sentences, tables = list[Sentence](), list[Table]()
    if trained.start_validation is not None:
        values = trained.start_validation.to_metrics().items()
        text = ", ".join(f"{name.removeprefix('validation/')} {value:.4f}" for name, value in values)
        sentences.append(Sentence(f"validation of the starting model's network on the selection rows: {text}"))
    if (checkpoint := latest_checkpoint(trained.artifact.parent / "checkpoints")) is not None:
        history = checkpoint.state.history
        tables.append(validations_table(history, trained.best_step, trained.best, trained.network_validation))
        reasons = explain_choice(dict(history)[trained.best_step], trained.best_step, settings.training.monitor)
        sentences += map(Sentence, reasons)
    warnings = find_warnings(trained.best, settings.training.calibration)
    sentences += [Sentence(warning, "warning") for warning in warnings]
    if not settings.model.gates.rule.selects_all:  # No expert can be unused if gates select all of them.
        findings = trained.best.experts.findings([task.name for task in about.tasks])
        sentences += [Sentence(finding, "note") for finding in findings]
    if trained.rows_per_s:  # The speed is unknown (0) if a resumed run had no step left.
        waiting = f"{trained.data_wait_fraction:.1%} of the time spent waiting for data"
        sentences.append(Sentence(f"{trained.rows_per_s:,.0f} rows/s in training, {waiting}"))
    sentences += map(Sentence, trained.promotion_messages)
    return Report(
        title=f"Training of {settings.name}",
        headline=_headline(trained.best.auc, trained.best_step),
        mark="warning" if warnings else "good",
        about=f"registered as {trained.model_uri}",
        tables=tables,
        sentences=sentences,
        identity={
            "features": about.fingerprint,
            "model": artifact_version(trained.artifact),
            "settings": fixed_settings(settings),
        },
    )


def _headline(areas: Mapping[str, float | None], step: int) -> str:
    values = ", ".join(f"{name} {auc:.4f}" for name, auc in areas.items() if auc is not None)
    return f"validation AUC of the model at step {step:,}: {values}" if values else f"the model of step {step:,}"


def write_training_report(trained: FinishedRun, settings: Settings) -> Report:
    """Write the report to `data.work_dir`/training and return it.

    Args:
        trained: The finished run.
        settings: Settings of the run.
    """
    report = make_report(trained, settings)
    write_report(report, Path(settings.data.work_dir) / FOLDER)
    return report
