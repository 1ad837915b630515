"""mmoe-rec edit-experts --config configs/shop.yaml --model models:/shop@champion --add 2

Add, remove or mask experts of a trained model without training. --add N copies experts 0, 1, ... and changes no
prediction. Under soft gates, a copy takes half of the weight of its original. If gates choose experts, further training
phases the copy in. --remove E removes an expert, and --mask E disables an expert. The command writes the edited model
to `data.work_dir`/edited and registers it as `challenger`.

To continue training, run `mmoe-rec train --from` with the new number in `model.experts.count`.
"""

from pathlib import Path

import click

from mmoe_rec.cli.main import COUNT, Configuration, model_option, out_option, settings_command
from mmoe_rec.errors import UserError


@settings_command(__doc__)
@model_option
@click.option("--add", type=COUNT, metavar="N", help="number of experts to add")
@click.option("--remove", type=int, metavar="E", help="index of the expert to remove")
@click.option("--mask", type=int, metavar="E", help="index of the expert to disable")
@out_option("data.work_dir/edited", "folder for the edited model")
def edit_experts(
    configuration: Configuration, model: str, add: int | None, remove: int | None, mask: int | None, out: Path | None
) -> None:
    settings = configuration.settings
    uri, name = settings.tracking.resolved_uri, settings.registered_model
    if sum(option is not None for option in (add, remove, mask)) != 1:
        raise UserError("Give exactly one of --add, --remove and --mask.")
    out = out or Path(settings.data.work_dir) / "edited"
    if out.exists() and not (out / "model.json").exists():
        raise UserError(f"'{out}' exists and contains no model. Name another folder with --out, or remove it.")
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
        resolved = registry.resolve_model(model, uri)
        info, state = read_artifact(resolved.folder), to_float32(read_tensors(resolved.folder / "weights.safetensors"))
        network = Model.model_validate(info.model)
        if add is not None:
            copied = [index % max(1, network.experts.count) for index in range(add)]
            state, network = add_experts(state, network, copied)
            summary = f"added {add}, copied from {', '.join(map(str, copied))}"
        elif remove is not None:
            state, network = remove_expert(state, network, remove)
            summary = f"removed expert {remove}"
        else:
            assert mask is not None, "exactly one option is given"
            state, summary = mask_expert(state, network, mask), f"disabled expert {mask}"
        write_with_weights(resolved.folder, out, network, state)
        with runs.open_run(uri, settings.experiment, run_name="edit_experts") as run:
            run.set_tags({"edited_from": model, "edited_from.run": resolved.run_id or "unknown", "edit": summary})
            edited = registry.ModelVersion(name, registry.register_model(run, out, name, CHALLENGER_ALIAS), run.run_id)
            section = f"{model}: {summary}, by\n\n{code_block(command_line())}"
            run.write_section("Experts", section)
            registry.describe_version(edited, section, {}, uri)
    shared = network.experts.count
    print(f"{summary}, so the model has {shared + network.experts.task_count * len(info.tasks)} experts")
    print(f"model: {out}, registered as {edited.uri}")
    count_override = ["--model.experts.count", str(shared)] if shared != settings.model.experts.count else []
    print(f"next: mmoe-rec train {configuration.options('--from', edited.uri, *count_override)}")
