"""mmoe-rec edit-experts --config configs/shop.yaml --model models:/shop@champion --add 2

Changes the experts of a trained model, without training: --add N copies experts, those that --copy names, and changes
no prediction (under soft gates a copy shares its original's weight; where gates choose, further training phases it in);
--remove E takes one away, --mask E puts one out of use. Writes the edited model to `data.work`/edited and registers it
as `challenger`.

Training goes on from it with `mmoe-rec train --from` and the new number in `model.experts.count`.
"""

from __future__ import annotations

from pathlib import Path

import click

from mmoe_rec.cli.command import COUNT, Configuration, model_option, out_option, settings_command
from mmoe_rec.errors import UserError


@settings_command(__doc__)
@model_option
@click.option("--add", type=COUNT, metavar="N", help="number of experts to add")
@click.option("--copy", type=int, multiple=True, metavar="E...", help="experts that are copied (default: 0, 1, ...)")
@click.option("--remove", type=int, metavar="E", help="number of the expert to take away")
@click.option("--mask", type=int, metavar="E", help="number of the expert to put out of use")
@out_option("data.work/edited", "where the edited model goes")
def edit_experts(
    configuration: Configuration,
    model: str,
    add: int | None,
    copy: tuple[int, ...],
    remove: int | None,
    mask: int | None,
    out: Path | None,
) -> None:
    """Runs the command."""
    settings = configuration.settings
    if sum(each is not None for each in (add, remove, mask)) != 1:
        raise UserError("give one of --add, --remove and --mask")
    if copy and len(copy) != add:
        raise UserError("--copy names as many experts as --add adds")
    from mmoe_rec.jobs.experts import edit_model
    from mmoe_rec.locks import writing

    out = out or Path(settings.data.work) / "edited"
    what = (add, list(copy) or None, remove, mask)
    with writing(out, "an edit of experts", "name another folder with --out"):
        edited = edit_model(settings, model, out, *what)
    print(f"{edited.done}; the model has {edited.experts} experts")
    print(f"model: {out}, registered as {edited.address}")
    changed = ["--model.experts.count", str(edited.shared)] if edited.shared != settings.model.experts.count else []
    print(f"next: mmoe-rec train {configuration.options('--from', edited.address, *changed)}")
