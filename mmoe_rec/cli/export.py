"""mmoe-rec export --model models:/shop@champion --out small --int8

Makes another form of a trained model, and tells how near it is to the model itself.

--int8 writes a model folder with int8 tables, about .28 of their bytes, in memory too; it is loaded and served like any
other, and `mmoe-rec evaluate --model small --against models:/shop@champion` measures both on the test rows.

--onnx writes all that comes after the features, tables and trees included, as one ONNX file for other servers; the
README.md beside it says how to use it. It needs the extra `onnx`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from mmoe_rec.cli.main import FOLDER, command, model_option, show, tracking_option
from mmoe_rec.errors import UserError, require_packages

if TYPE_CHECKING:
    from rich.table import Table

REPORT = "export.json"


@command(__doc__)
@model_option
@tracking_option
@click.option("--out", required=True, type=FOLDER, metavar="DIR", help="what is written; an export is replaced")
@click.option("--int8", is_flag=True, help="a small model, with int8 tables")
@click.option("--onnx", is_flag=True, help="what comes after the features, as an ONNX file")
@click.option("--dense", type=click.Choice(["bfloat16", "int8", "float32"]), help="of --int8's matrices (bfloat16)")
def export(
    model: str,
    tracking_uri: str | None,
    out: Path,
    int8: bool,
    onnx: bool,
    dense: Literal["bfloat16", "int8", "float32"] | None,
) -> None:
    if int8 == onnx:
        raise UserError("give one of --int8 and --onnx")
    if onnx and dense:
        raise UserError("--dense is for --int8: ONNX takes the model as it is")
    from mmoe_rec.atomic import atomic_folder
    from mmoe_rec.locks import writing
    from mmoe_rec.settings.sections import Tracking
    from mmoe_rec.tracking.registry import find_model

    found = find_model(model, Tracking(uri=tracking_uri).address)
    with writing(out, "an export", "name another folder with --out"):
        if out.exists() and out.resolve() == found.folder.resolve():
            raise UserError(f"'{out}' holds the model that is exported: name another folder with --out")
        if out.is_dir() and any(out.iterdir()) and not (out / REPORT).exists():
            raise UserError(f"'{out}' holds files that are no export: name another folder with --out, or remove it")
        with atomic_folder(out) as made:
            report = _write_onnx(found.folder, made) if onnx else _write_int8(found.folder, made, dense or "bfloat16")
            report = {"made": "onnx" if onnx else "int8", "of": found.address, **report}
            (made / REPORT).write_text(json.dumps(report, indent=1), encoding="utf-8")
    show([_make_table(report)])
    files = f"{out / 'model.onnx'}, described in {out / 'README.md'};" if onnx else f"{out},"
    print(f"model: {files} report: {out / REPORT}")


def _write_int8(folder: Path, made: Path, dense: Any) -> dict[str, Any]:
    """Writes an artifact with int8 tables; gives how large and how near it is."""
    from mmoe_rec.inference import export as forms
    from mmoe_rec.inference.artifact import read_example
    from mmoe_rec.inference.ranker import Ranker

    forms.write_int8(folder, made, dense)
    model, small = (forms.answers_of(Ranker.load(each).rank(**read_example(folder))) for each in (folder, made))
    sizes = {"model": forms.count_bytes(folder), "int8": forms.count_bytes(made)}
    return {"dense": dense, "bytes": sizes, "max_difference": forms.find_differences(model, small)}


def _write_onnx(folder: Path, made: Path) -> dict[str, Any]:
    """Writes the ONNX file, see `inference.export`. Raises UserError where a package is missing, or results differ."""
    require_packages("ONNX", "onnx", "onnx", "onnxscript", "onnxruntime")
    from mmoe_rec.inference.export import write_onnx
    from mmoe_rec.inference.ranker import Ranker

    return {"max_difference": write_onnx(folder, Ranker.load(folder), made)}


def _make_table(report: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table(caption="differences on the model's example request")
    for name in ("", "model", report["made"]):
        table.add_column(name, justify="left" if not name else "right")
    for name, before in report.get("bytes", {}).get("model", {}).items():
        now = report["bytes"]["int8"][name]
        table.add_row(f"{name}, bytes", f"{before:,}", f"{now:,} ({now / max(1, before):.3f})")
    for name, off in report["max_difference"].items():
        table.add_row(f"{name}, largest difference", "", f"{off:.2g}")
    return table
