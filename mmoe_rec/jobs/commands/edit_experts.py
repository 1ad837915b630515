"""python -m pipelines.edit_experts --config configs/shop.yaml --model models:/shop@champion --add 2

Changes the experts of a trained model, without training: --add N copies experts, those that --copy names, and changes
no prediction (under soft gates a copy shares its original's weight; where gates choose, further training phases it in);
--remove E takes one away, --mask E puts one out of use. Writes the edited model to `data.work`/edited and registers it
as `challenger`.

Training goes on from it with `python -m pipelines.train --from` and the new number in `model.experts.count`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mmoe_rec.errors import UserError, exit_with_message
from mmoe_rec.jobs.commands.command import count, read_command
from mmoe_rec.program import spelled


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="M", help="models:/NAME@ALIAS, runs:/..., or a model's folder"
    )
    parser.add_argument("--add", type=count, metavar="N", help="number of experts to add")
    parser.add_argument(
        "--copy", type=int, nargs="+", metavar="E", help="experts that are copied (default: 0, 1, ... in turn)"
    )
    parser.add_argument("--remove", type=int, metavar="E", help="number of the expert to take away")
    parser.add_argument("--mask", type=int, metavar="E", help="number of the expert to put out of use")
    parser.add_argument("--out", metavar="DIR", help="where the edited model goes (default: data.work/edited)")


@exit_with_message()
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    arguments, settings = read_command(__doc__ or "", argv, _add_arguments)
    if sum(each is not None for each in (arguments.add, arguments.remove, arguments.mask)) != 1:
        raise UserError("give one of --add, --remove and --mask")
    if arguments.copy and (arguments.add is None or len(arguments.copy) != arguments.add):
        raise UserError("--copy names as many experts as --add adds")
    import shlex
    from pathlib import Path

    from mmoe_rec.jobs.experts.edit import edit_model
    from mmoe_rec.locks import writing

    out = Path(arguments.out or Path(settings.data.work) / "edited")
    what = (arguments.add, arguments.copy, arguments.remove, arguments.mask)
    with writing(out, "an edit of experts", "name another folder with --out"):
        edited = edit_model(settings, arguments.model, out, *what)
    print(f"{edited.done}; the model has {edited.experts} experts")
    print(f"model: {out}, registered as {edited.address}")
    changed = ["--model.experts.count", str(edited.shared)] if edited.shared != settings.model.experts.count else []
    command = ["python", "-m", "pipelines.train", "--config", arguments.config, "--from", edited.address]
    print(spelled(f"next: {shlex.join([*command, *arguments.overrides, *changed])}"))
