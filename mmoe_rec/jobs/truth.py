"""What models are measured against: the test rows of the settings, and what their labels mean."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mmoe_rec.errors import UserError
from mmoe_rec.jobs.places import build_options, log_and_place, logs_for
from mmoe_rec.locks import reading, writing
from mmoe_rec.preprocessing.logs import Logs
from mmoe_rec.preprocessing.prepare import Prepared, encode_with, existing, fingerprint_of
from mmoe_rec.progress import say
from mmoe_rec.settings.schema import Schema
from mmoe_rec.settings.sections import Settings, differences

if TYPE_CHECKING:
    from mmoe_rec.evaluation.scoring import ScoredRows
    from mmoe_rec.inference.ranker import Ranker
    from mmoe_rec.model.layout import ModelLayout
    from mmoe_rec.model.mmoe import RankingModel
    from mmoe_rec.model.score import Calibration


@contextmanager
def rows_to_measure(settings: Settings, artifact: Path, ranker: Ranker, split: str = "test") -> Iterator[Path]:
    """Encoded test rows, which nobody replaces meanwhile: the existing ones if the model's features made them, else
    rows freshly encoded by those.

    artifact: the folder that the ranker was loaded from; split: of the rows. Raises UserError where its tasks mean
    something else than those of the settings.
    """
    check_tasks(settings, ranker.pipeline.schema)
    work, what = Path(settings.data.work), "an evaluation"
    with reading(work / "features", what):
        prepared = existing(*log_and_place(settings))
        if prepared is not None and prepared.manifest["fingerprint"] == ranker.about.fingerprint:
            prepared.require_rows(split)
            yield prepared.split(split)
            return
    logs, encoded = logs_for(settings, ranker.pipeline), work / "evaluation" / "encoded"
    if gone := Prepared(work / "features").gone(logs):
        told = f"1 is gone, '{gone[0]}'" if len(gone) == 1 else f"{len(gone):,} are gone, such as '{gone[0]}'"
        say(
            "the features that the model was trained on are not there, so counters and histories are rebuilt from the "
            f"files that are left in the log: {told}"
        )
    with writing(encoded, what, "set `data.work` to another folder", queue=True):
        encode_with(artifact / "features", logs, {split: settings.split.windows()[split]}, encoded)
        yield encoded / split


def are_its_own(settings: Settings, artifact: Path) -> bool:
    """Whether the settings have the very log and split that a model was trained with, so that their test rows are those
    of its training."""
    from mmoe_rec.inference.artifact import read_artifact

    fingerprint = read_artifact(artifact, verify=False).fingerprint
    prepared = existing(*log_and_place(settings))
    if prepared is not None and prepared.manifest["fingerprint"] == fingerprint:
        return True
    logs = Logs(settings.data.log, settings.schema_, build_options(settings))
    return fingerprint_of(logs, settings.split.windows()) == fingerprint


def score_by(
    settings: Settings, model: RankingModel, layout: ModelLayout, rows: Path, calibration: Calibration
) -> ScoredRows:
    """Encoded rows as a model scores them, to be measured against what the settings say that labels are worth.

    layout: the model's. Raises NotFiniteError.
    """
    from mmoe_rec.batches.encoded_rows import EncodedRows
    from mmoe_rec.evaluation.scoring import score_rows

    scored = score_rows(
        model,
        layout,
        EncodedRows(rows, layout),
        settings.evaluation.batch_size,
        calibration=calibration,
        relevance={name: task.score_weight for name, task in settings.tasks.items()},
        weighted=settings.training.sampling_correction == "weights",
    )
    return scored if settings.columns.has_candidate else replace(scored, candidates=None, row=scored.candidates)


def check_tasks(settings: Settings, schema: Schema) -> None:
    """Raises UserError where a model's schema has other tasks than the settings, or ones that mean something else."""
    if set(schema.tasks) != set(settings.tasks):
        raise UserError(f"the model predicts {', '.join(schema.tasks)}; the settings have {', '.join(settings.tasks)}")
    its, ours = ({"tasks": each.identity()["tasks"]} for each in (schema, settings.schema_))
    for where, before, now in differences(its, ours):
        raise UserError(
            f"the model was trained with '{where}' {before}, and it is {now} in the settings, so it predicts something "
            "else than these labels: set it back, or train a model with it"
        )
