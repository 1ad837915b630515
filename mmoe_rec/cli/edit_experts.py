"""mmoe-rec edit-experts --config configs/shop.yaml --model models:/shop@champion --add 2

Changes the experts of a trained model, without training: --add N copies experts 0, 1, ... and changes no prediction
(under soft gates a copy shares its original's weight; where gates choose, further training phases it in); --remove E
takes one away, --mask E puts one out of use. Writes the edited model to `data.work_dir`/edited and registers it as
`challenger`.

Training goes on from it with `mmoe-rec train --from` and the new number in `model.experts.count`.
"""

from pathlib import Path

import click

from mmoe_rec.cli.main import COUNT, Configuration, model_option, out_option, settings_command
from mmoe_rec.errors import UserError


@settings_command(__doc__)
@model_option
@click.option("--add", type=COUNT, metavar="N", help="number of experts to add")
@click.option("--remove", type=int, metavar="E", help="number of the expert to take away")
@click.option("--mask", type=int, metavar="E", help="number of the expert to put out of use")
@out_option("data.work_dir/edited", "where the edited model goes")
def edit_experts(
    configuration: Configuration, model: str, add: int | None, remove: int | None, mask: int | None, out: Path | None
) -> None:
    settings = configuration.settings
    uri, name = settings.tracking.resolved_uri, settings.registered_model
    if sum(each is not None for each in (add, remove, mask)) != 1:
        raise UserError("give one of --add, --remove and --mask")
    out = out or Path(settings.data.work_dir) / "edited"
    if out.exists() and not (out / "model.json").exists():
        raise UserError(f"'{out}' exists and holds no model: name another folder with --out, or remove it")
    from mmoe_rec.inference.artifact import read_artifact, read_tensors
    from mmoe_rec.inference.artifact_writer import write_with_weights
    from mmoe_rec.locks import write_lock
    from mmoe_rec.model.tables import to_float32
    from mmoe_rec.model.warm_start import add_experts, mask_expert, remove_expert
    from mmoe_rec.settings.model import Model
    from mmoe_rec.tracking import registry, runs
    from mmoe_rec.tracking.registry import CHALLENGER_ALIAS
    from mmoe_rec.tracking.runs import code_block, command_line

    with write_lock(out, "an edit of experts", "name another folder with --out"):
        registry.check_registry_names(uri, name, CHALLENGER_ALIAS)
        found = registry.resolve_model(model, uri)
        about, state = read_artifact(found.folder), to_float32(read_tensors(found.folder / "weights.safetensors"))
        structure = Model.model_validate(about.model)
        if add is not None:
            chosen = [index % max(1, structure.experts.count) for index in range(add)]
            state, structure = add_experts(state, structure, chosen)
            done = f"added {add}, copied from {', '.join(map(str, chosen))}"
        elif remove is not None:
            state, structure = remove_expert(state, structure, remove)
            done = f"removed expert {remove}"
        else:
            assert mask is not None, "one of the three is given"
            state, done = mask_expert(state, structure, mask), f"put expert {mask} out of use"
        write_with_weights(found.folder, out, structure, state)
        with runs.open_run(uri, settings.experiment, run_name="edit_experts") as run:
            run.set_tags({"edited_from": model, "edited_from.run": found.run_id or "unknown", "edit": done})
            edited = registry.ModelVersion(name, registry.register_model(run, out, name, CHALLENGER_ALIAS), run.run_id)
            told = f"{model}: {done}, by\n\n{code_block(command_line())}"
            run.write_section("Experts", told)
            registry.describe_version(edited, told, {}, uri)
    shared = structure.experts.count
    print(f"{done}; the model has {shared + structure.experts.task_count * len(about.tasks)} experts")
    print(f"model: {out}, registered as {edited.uri}")
    changed = ["--model.experts.count", str(shared)] if shared != settings.model.experts.count else []
    print(f"next: mmoe-rec train {configuration.options('--from', edited.uri, *changed)}")
