"""python -m pipelines.export --model models:/shop@champion --out small --int8

Makes another form of a trained model, and tells how near it is to the model itself.

--int8 writes a model folder with int8 tables, about .28 of their bytes, in memory too; it is loaded and served like any
other. With --config, both are measured on the test rows of these settings.

--onnx writes what comes after the features as an ONNX file for other servers, and the tables beside it; its README.md
says how to use them. It needs the extra `onnx`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mmoe_rec.errors import UserError, exit_with_message
from mmoe_rec.jobs.commands.command import parsed
from mmoe_rec.settings.load import load_settings


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="M", help="models:/NAME@ALIAS, runs:/..., or a model's folder"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder that is written; an export is replaced")
    parser.add_argument("--int8", action="store_true", help="a small model, with int8 tables")
    parser.add_argument("--onnx", action="store_true", help="the dense part as an ONNX file")
    parser.add_argument(
        "--dense",
        choices=("bfloat16", "int8", "float32"),
        help="how a small model stores its matrices (default: bfloat16); gates and biases stay float32",
    )


@exit_with_message()
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    arguments = parsed(__doc__ or "", argv, _add_arguments, config=False)
    if arguments.int8 == arguments.onnx:
        raise UserError("give one of --int8 and --onnx")
    if arguments.onnx and (arguments.dense or arguments.config):
        raise UserError(f"{'--dense' if arguments.dense else '--config'} is for --int8: ONNX takes the model as it is")
    settings = load_settings(arguments.config, arguments.overrides) if arguments.config else None
    from pathlib import Path

    from rich.console import Console

    from mmoe_rec.jobs.export import REPORT, export_int8, export_onnx, report_table

    out = Path(arguments.out)
    if arguments.int8:
        report = export_int8(arguments.model, out, arguments.dense or "bfloat16", settings)
    else:
        report = export_onnx(arguments.model, out, settings)
    Console().print(report_table(report))
    if arguments.int8:
        print(f"model: {out}, report: {out / REPORT}")
    else:
        print(f"model: {out / 'model.onnx'}, described in {out / 'README.md'}; report: {out / REPORT}")
