"""mmoe-rec export --model models:/shop@champion --out small --int8

Makes another form of a trained model, and tells how near it is to the model itself.

--int8 writes a model folder with int8 tables, about .28 of their bytes, in memory too; it is loaded and served like any
other, and `mmoe-rec evaluate --model small --compare-to models:/shop@champion` measures both on the test rows.

--onnx writes all that comes after the features, tables and trees included, as one ONNX file for other servers; the
README.md beside it says how to use it. It needs the extra `onnx`.
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
@click.option("--out", required=True, type=FOLDER, metavar="DIR", help="what is written; an export is replaced")
@click.option("--int8", is_flag=True, help="a small model, with int8 tables")
@click.option("--onnx", is_flag=True, help="what comes after the features, as an ONNX file")
def export(model: str, tracking_uri: str | None, out: Path, int8: bool, onnx: bool) -> None:
    if int8 == onnx:
        raise UserError("give one of --int8 and --onnx")
    if onnx:
        require_packages("ONNX", "onnx", "onnx", "onnxscript", "onnxruntime")
    from mmoe_rec.atomic import atomic_folder
    from mmoe_rec.inference.export import write_int8, write_onnx
    from mmoe_rec.locks import write_lock
    from mmoe_rec.settings.sections import Tracking
    from mmoe_rec.tracking.registry import resolve_model

    found = resolve_model(model, Tracking(uri=tracking_uri).resolved_uri)
    with write_lock(out, "an export", "name another folder with --out"):
        if out.exists() and out.resolve() == found.folder.resolve():
            raise UserError(f"'{out}' holds the model that is exported: name another folder with --out")
        if out.is_dir() and any(out.iterdir()) and not (out / REPORT).exists():
            raise UserError(f"'{out}' holds files that are no export: name another folder with --out, or remove it")
        with atomic_folder(out) as made:
            report: dict[str, Any] = {"made": "onnx" if onnx else "int8", "of": found.uri}
            report |= (write_onnx if onnx else write_int8)(found.folder, made)
            (made / REPORT).write_text(json.dumps(report, indent=1), encoding="utf-8")
    for name, before in report.get("bytes", {}).get("model", {}).items():
        now = report["bytes"]["int8"][name]
        print(f"{name}: {now:,} bytes, {now / max(1, before):.3f} of the model's")
    for name, off in report["max_difference"].items():
        print(f"{name}: differs by at most {off:.2g} on the model's example request")
    files = f"{out / 'model.onnx'}, described in {out / 'README.md'};" if onnx else f"{out},"
    print(f"model: {files} report: {out / REPORT}")
