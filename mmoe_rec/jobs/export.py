"""A model made smaller, or put into ONNX, with a report of how near it is to the model itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmoe_rec.atomic import atomic_folder
from mmoe_rec.errors import UserError, require_packages
from mmoe_rec.locks import writing
from mmoe_rec.settings.sections import Settings, Tracking
from mmoe_rec.tracking.registry import FoundModel, find_model

if TYPE_CHECKING:
    from rich.table import Table

    from mmoe_rec.inference.export import Dense
    from mmoe_rec.inference.ranker import Ranker

REPORT = "export.json"


def export_int8(address: str, out: Path, dense: Dense, settings: Settings | None = None) -> dict[str, Any]:
    """Writes the model at an address with int8 tables to an artifact folder, and what `export.json` there says.

    dense: how matrices are stored; settings: of the log whose test rows both are measured on, None for no log.
    Raises UserError for a model that can't be made so, or a folder that holds something else.
    """
    with _place(address, out, settings) as (model, made):
        from mmoe_rec.inference import export
        from mmoe_rec.inference.ranker import Ranker

        ranker = Ranker.load(model.folder)
        export.write_int8(model.folder, made, dense)
        small = Ranker.load(made)
        pairs = export.answer_both(model.folder, ranker, lambda each: export.answers_of(small.rank(**each)))
        report = {
            "made": "int8",
            "of": model.address,
            "dense": dense,
            "bytes": {"model": _bytes(model.folder), "int8": _bytes(made)},
            "requests": export.agreement(pairs),
        }
        if settings is not None:
            report["test_rows"] = _measure_test_rows(settings, model.folder, ranker, small)
        _write_report(made, report)
    return report


def export_onnx(address: str, out: Path, settings: Settings | None = None) -> dict[str, Any]:
    """Writes the model at an address to a folder as `mmoe_rec.inference.export` says, and `export.json`.

    Raises UserError where a package is missing, the file does not compute what the model does, or the folder holds
    something else.
    """
    with _place(address, out, settings) as (model, made):
        require_packages("ONNX", "onnx", "onnx", "onnxscript", "onnxruntime")
        from mmoe_rec.inference import export
        from mmoe_rec.inference.ranker import Ranker

        ranker = Ranker.load(model.folder)
        export.write_onnx(model.folder, ranker, made)
        onnx = export.OnnxModel(made)
        pairs = export.answer_both(model.folder, ranker, lambda each: onnx.answers(export.inputs_of(ranker, each)))
        export.check_equal(pairs, any(gates.experts_a_row() is not None for gates in ranker.model.mixture.gates))
        report = {"made": "onnx", "of": model.address, "requests": export.agreement(pairs)}
        _write_report(made, report)
    return report


def table_of(report: dict[str, Any]) -> Table:
    """The figures of a report."""
    from rich.table import Table

    requests, test = report["requests"], report.get("test_rows")
    drawn = f"{requests['requests']} requests of {requests['candidates']} known candidates"
    table = Table(caption=f"predictions and order: {drawn}" + (f"; test: {test['rows']:,} rows" if test else ""))
    for name in ("", "model", report["made"]):
        table.add_column(name, justify="left" if not name else "right")
    for name, before in report.get("bytes", {}).get("model", {}).items():
        now = report["bytes"]["int8"][name]
        table.add_row(f"{name}, bytes", f"{before:,}", f"{now:,} ({now / max(1, before):.3f})")
    for name, off in requests["max_difference"].items():
        table.add_row(f"{name}, largest difference", "", f"{off:.2g}")
    table.add_row("shared among the best 10", "", f"{requests['top_10_shared']:.4f}")
    for name, measured in (test or {}).get("tasks", {}).items():
        table.add_row(f"{name}, test, largest difference", "", f"{measured['max_difference']:.2g}")
        metric, before, now = measured["metric"], measured["model"], measured["int8"]
        if before is not None:
            table.add_row(f"{name}, test, {metric}", f"{before:.5f}", f"{now:.5f} ({now - before:+.6f})")
    return table


@contextmanager
def _place(address: str, out: Path, settings: Settings | None) -> Iterator[tuple[FoundModel, Path]]:
    """The model, and an empty folder that takes the place of `out` at the end."""
    model = find_model(address, (Tracking() if settings is None else settings.tracking).address)
    with writing(out, "an export", "name another folder with --out"):
        if out.exists() and out.resolve() == model.folder.resolve():
            raise UserError(f"'{out}' holds the model that is exported: name another folder with --out")
        if out.is_dir() and any(out.iterdir()) and not (out / REPORT).exists():
            raise UserError(
                f"'{out}' holds something else than an export: name another folder with --out, or remove it"
            )
        with atomic_folder(out) as made:
            yield model, made


def _write_report(made: Path, report: dict[str, Any]) -> None:
    (made / REPORT).write_text(json.dumps(report, indent=1), encoding="utf-8")


def _bytes(folder: Path) -> dict[str, int]:
    """Bytes of the tables' weights and of all others, of their file, and of all files of a model: its features too."""
    from mmoe_rec.inference.artifact import read_manifest, read_stored
    from mmoe_rec.inference.export import WEIGHTS

    sizes = {"tables": 0, "dense": 0}
    for name, weight in read_stored(folder / WEIGHTS).items():
        sizes["tables" if name.startswith("tables.") else "dense"] += weight.nbytes
    files = {name: file.bytes for name, file in read_manifest(folder).items()}
    return {**sizes, WEIGHTS: files[WEIGHTS], "all files": sum(files.values())}


def _measure_test_rows(settings: Settings, folder: Path, ranker: Ranker, small: Ranker) -> dict[str, Any]:
    """Both models on the test rows: differences, and AUC, or the root of the mean squared error of a regression."""
    import numpy as np

    from mmoe_rec.batches.encoded_rows import EncodedRows
    from mmoe_rec.evaluation.scoring import score_rows
    from mmoe_rec.jobs.metrics import rows_to_measure

    size, tasks = settings.evaluation.batch_size, {}
    with rows_to_measure(settings, folder, ranker) as rows:
        before, now = (
            score_rows(each.model, each.layout, EncodedRows(rows, each.layout), size, calibration=each.calibration)
            for each in (ranker, small)
        )
    for place, task in enumerate(ranker.layout.tasks):
        off = float(np.abs(before.predictions[:, place] - now.predictions[:, place]).max())
        metric = "AUC" if task.kind == "binary" else "RMSE"
        one, other = (
            _metric(metric, each.labels[:, place], each.predictions[:, place], each.weights) for each in (before, now)
        )
        tasks[task.name] = {"max_difference": off, "metric": metric, "model": one, "int8": other}
    return {"rows": len(before.score), "tasks": tasks}


def _metric(metric: str, labels: Any, predicted: Any, weights: Any) -> float | None:
    """Over the observed labels, rows by their weights; None where the metric means nothing."""
    import numpy as np
    from sklearn.metrics import roc_auc_score, root_mean_squared_error

    seen = ~np.isnan(labels)
    labels, predicted, weights = labels[seen], predicted[seen].astype(float), None if weights is None else weights[seen]
    if metric == "AUC":
        return float(roc_auc_score(labels, predicted, sample_weight=weights)) if len(np.unique(labels)) == 2 else None
    return float(root_mean_squared_error(labels, predicted, sample_weight=weights)) if len(labels) else None
