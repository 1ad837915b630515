"""mmoe-rec export --model models:/shop@champion --out small --int8

Convert a trained model to int8 or ONNX, and measure how much its predictions change.

--int8 writes a model folder with int8 tables, about 28% of the original size on disk and in memory. Load and serve the
folder like any other model. To compare both models on the test rows, run `mmoe-rec evaluate --model small --compare-to
models:/shop@champion`.

--onnx writes everything after the features, including tables and trees, as one ONNX file for other servers. A README.md
in the same folder explains how to use the file. The option needs the extra `onnx`.
"""

import json
from pathlib import Path
from typing import Any

import click

from mmoe_rec.cli.main import FOLDER, command, model_option, tracking_option
from mmoe_rec.errors import UserError, require_packages

REPORT = "export.json"


@command(__doc__)
@model_option
@tracking_option
@click.option("--out", required=True, type=FOLDER, metavar="DIR", help="folder to write; replaces an earlier export")
@click.option("--int8", is_flag=True, help="whether to write a model folder with int8 tables")
@click.option("--onnx", is_flag=True, help="whether to write an ONNX file of everything after the features")
def export(model: str, tracking_uri: str | None, out: Path, int8: bool, onnx: bool) -> None:
    if int8 == onnx:
        raise UserError("Give exactly one of --int8 and --onnx.")
    if onnx:
        require_packages("ONNX", "onnx", "onnx", "onnxscript", "onnxruntime")
    from mmoe_rec.atomic import atomic_folder
    from mmoe_rec.inference.export import write_int8, write_onnx
    from mmoe_rec.locks import write_lock
    from mmoe_rec.settings.sections import Tracking
    from mmoe_rec.tracking.registry import resolve_model

    resolved = resolve_model(model, Tracking(uri=tracking_uri).resolved_uri)
    with write_lock(out, "an export", "name another folder with --out"):
        if out.exists() and out.resolve() == resolved.folder.resolve():
            raise UserError(f"'{out}' contains the model to export. Name another folder with --out.")
        if out.is_dir() and any(out.iterdir()) and not (out / REPORT).exists():
            raise UserError(f"'{out}' contains other files. Name another folder with --out, or remove it.")
        with atomic_folder(out) as folder:
            report: dict[str, Any] = {"made": "onnx" if onnx else "int8", "of": resolved.uri}
            report |= (write_onnx if onnx else write_int8)(resolved.folder, folder)
            (folder / REPORT).write_text(json.dumps(report, indent=1), encoding="utf-8")
    for name, original_bytes in report.get("bytes", {}).get("model", {}).items():
        exported_bytes = report["bytes"]["int8"][name]
        print(f"{name}: {exported_bytes:,} bytes, {exported_bytes / max(1, original_bytes):.3f} of the original")
    for name, difference in report["max_difference"].items():
        print(f"{name}: maximum difference {difference:.2g} on the model's example request")
    print(f"model: {out / 'model.onnx'} (described in {out / 'README.md'})" if onnx else f"model: {out}")
    print(f"report: {out / REPORT}")
