"""Experts of a model added, masked or removed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmoe_rec.errors import UserError
from mmoe_rec.jobs.run_page import as_code, command
from mmoe_rec.jobs.workspace import CHALLENGER
from mmoe_rec.settings.model import Model
from mmoe_rec.settings.sections import Settings
from mmoe_rec.tracking import registry, runs
from mmoe_rec.tracking.registry import Version, describe_version, find_model


@dataclass(frozen=True)
class EditedModel:
    """done: what was done, in words; experts: number of all experts; shared: number of those that all tasks share;
    address: in the registry."""

    done: str
    experts: int
    shared: int
    address: str


def edit_model(
    settings: Settings,
    address: str,
    out: Path,
    add: int | None,
    copied: Sequence[int] | None,
    remove: int | None,
    mask: int | None,
) -> EditedModel:
    """Edits the model at an address, writes it to a folder and registers it as challenger; one of the three is given.

    Raises UserError for an expert that can't be edited that way.
    """
    if out.exists() and not (out / "model.json").exists():
        raise UserError(f"'{out}' exists and holds no model: name another folder with --out, or remove it")
    registry.check_names(settings.tracking.address, settings.registered_model, CHALLENGER)
    found = find_model(address, settings.tracking.address)
    folder = found.folder
    from mmoe_rec.inference.artifact import read_artifact, read_weights
    from mmoe_rec.inference.writing import rewrite_artifact
    from mmoe_rec.model.surgery import add_experts, mask_expert, remove_expert

    about = read_artifact(folder)
    model = Model.model_validate(about.model)
    state = read_weights(folder / "weights.safetensors")
    if add is not None:
        chosen = list(copied or (index % max(1, model.experts.count) for index in range(add)))
        state, model = add_experts(state, model, chosen)
        done = f"added {add}, copied from {', '.join(map(str, chosen))}"
    elif remove is not None:
        state, model = remove_expert(state, model, remove)
        done = f"removed expert {remove}"
    else:
        assert mask is not None, "one of the three is given"
        state, done = mask_expert(state, model, mask), f"put expert {mask} out of use"
    rewrite_artifact(folder, out, model, state)
    with runs.open_run(settings.tracking.address, settings.experiment, run_name="edit_experts") as run:
        run.set_tags({"edited_from": address, "edited_from.run": found.run_id or "unknown", "edit": done})
        version = registry.register_model(run, out, settings.registered_model, CHALLENGER)
        made = Version(settings.registered_model, version, run.run_id)
        told = f"{address}: {done}, by\n\n{as_code(command())}"
        run.describe("Experts", told)
        describe_version(made, told, {}, settings.tracking.address)
    own = model.experts.task_count * len(about.tasks)
    registered = f"models:/{settings.registered_model}/{version}"
    return EditedModel(done, model.experts.count + own, model.experts.count, registered)
