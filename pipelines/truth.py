"""What models are measured against: the test rows of the settings, and what their labels mean."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mmoe_rec.errors import UserError
from mmoe_rec.features.build import at_hand, encode_with
from mmoe_rec.features.steps import Logs
from mmoe_rec.schema import Schema
from mmoe_rec.settings import Settings
from mmoe_rec.settings.differences import differences
from pipelines.steps import build_options, log_and_place

if TYPE_CHECKING:
    from mmoe_rec.serving.ranker import Ranker


def test_rows(settings: Settings, artifact: Path, ranker: Ranker) -> Path:
    """Encoded test rows: those at hand if the model's features made them, else freshly encoded with the model's.

    artifact: the folder that the ranker was loaded from. Raises UserError where its tasks mean something else than
    those of the settings.
    """
    schema = ranker.pipeline.schema
    _check_tasks(settings, schema)
    prepared = at_hand(*log_and_place(settings))
    if prepared is not None and prepared.manifest["fingerprint"] == ranker.about.fingerprint:
        return prepared.split("test")
    # The logs are the settings': the model's may have lain elsewhere, and not have been sampled.
    events = {name: settings.data.events.get(name, event) for name, event in schema.events.items()}
    columns = schema.columns.model_copy(update={"sampling_rate": settings.columns.sampling_rate})
    schema = schema.model_copy(update={"events": events, "columns": columns})
    logs = Logs(settings.data.log, schema, build_options(settings))
    encoded = Path(settings.data.work) / "evaluation" / "encoded"
    encode_with(artifact / "features", logs, {"test": settings.split.windows()["test"]}, encoded)
    return encoded / "test"


def _check_tasks(settings: Settings, schema: Schema) -> None:
    if set(schema.tasks) != set(settings.tasks):
        raise UserError(f"the model predicts {', '.join(schema.tasks)}; the settings have {', '.join(settings.tasks)}")
    its, ours = ({"tasks": each.identity()["tasks"]} for each in (schema, settings.schema_))
    for where, before, now in differences(its, ours):
        raise UserError(
            f"the model was trained with '{where}' {before}, and it is {now} in the settings, so it predicts something "
            "else than these labels: set it back, or train a model with it"
        )
