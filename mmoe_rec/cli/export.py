"""mmoe-rec export --model models:/shop@champion --out small --int8

Makes another form of a trained model, and tells how near it is to the model itself.

--int8 writes a model folder with int8 tables, about .28 of their bytes, in memory too; it is loaded and served like any
other. With --config, both are measured on the test rows of these settings.

--onnx writes what comes after the features as an ONNX file for other servers, and the tables beside it; its README.md
says how to use them. It needs the extra `onnx`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from mmoe_rec.cli.command import FOLDER, Configuration, model_option, settings_command
from mmoe_rec.errors import UserError


@settings_command(__doc__, required=False)
@model_option
@click.option(
    "--out", required=True, type=FOLDER, metavar="DIR", help="the folder that is written; an export is replaced"
)
@click.option("--int8", is_flag=True, help="a small model, with int8 tables")
@click.option("--onnx", is_flag=True, help="the dense part as an ONNX file")
@click.option(
    "--dense",
    type=click.Choice(["bfloat16", "int8", "float32"]),
    help="how a small model stores its matrices (default: bfloat16); gates and biases stay float32",
)
def export(
    configuration: Configuration | None,
    model: str,
    out: Path,
    int8: bool,
    onnx: bool,
    dense: Literal["bfloat16", "int8", "float32"] | None,
) -> None:
    """Runs the command."""
    if int8 == onnx:
        raise UserError("give one of --int8 and --onnx")
    if onnx and (dense or configuration):
        raise UserError(f"{'--dense' if dense else '--config'} is for --int8: ONNX takes the model as it is")
    settings = None if configuration is None else configuration.settings
    from rich.console import Console

    from mmoe_rec.jobs.export import REPORT, export_int8, export_onnx, table_of

    if int8:
        report = export_int8(model, out, dense or "bfloat16", settings)
        Console().print(table_of(report))
        print(f"model: {out}, report: {out / REPORT}")
    else:
        report = export_onnx(model, out, settings)
        Console().print(table_of(report))
        print(f"model: {out / 'model.onnx'}, described in {out / 'README.md'}; report: {out / REPORT}")
