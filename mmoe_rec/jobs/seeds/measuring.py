"""Models of several seeds on the test rows: those of these settings, and those that other settings have given."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.results import MeasuredModel
from mmoe_rec.jobs.evaluate import measured_on_test_rows
from mmoe_rec.jobs.places import check_names, short_names
from mmoe_rec.settings.sections import Settings
from mmoe_rec.tracking.registry import FoundModel

FILE = "seeds.json"


@dataclass(frozen=True)
class Trainings:
    """Models of one setting, by seed. folder: that they lie in; work: as it was given, None of one's own."""

    folder: Path
    models: list[Path]
    work: str | None = None


def checked(against: Sequence[str], settings: Settings, mine: Path) -> dict[str, Trainings]:
    """Name of each other setting -> its trainings.

    against: `data.work` of each; mine: folder of those of the settings. Raises UserError for one that has none which
    have ended, or that predicts other tasks.
    """
    from mmoe_rec.features.pipeline import FeaturePipeline
    from mmoe_rec.jobs.truth import check_tasks

    check_names(list(against), "--against")
    found = {}
    for name, work in zip(short_names(list(against)), against, strict=True):
        folder = Path(work) / "seeds"
        if folder.resolve() == mine.resolve():
            raise UserError(f"--against '{work}' is the folder of these trainings (data.work); give that of others")
        if not (folder / FILE).is_file():
            told = f"there is no '{folder / FILE}'"
            raise UserError(f"--against '{work}' holds no trainings of several seeds that have all ended: {told}")
        seeds = json.loads((folder / FILE).read_text(encoding="utf-8"))["seeds"]
        models = [folder / str(seed) / "model" for seed in seeds]
        if gone := next((each for each in models if not each.is_dir()), None):
            raise UserError(f"--against '{work}': there is no model '{gone}', although it was trained")
        try:
            check_tasks(settings, FeaturePipeline.load(models[0] / "features", memories=False).schema)
        except UserError as error:
            raise UserError(f"--against '{work}': {error}") from None
        found[name] = Trainings(folder, models, work)
    return found


def measured(settings: Settings, trainings: Trainings) -> list[MeasuredModel]:
    """What each model gives on the test rows. Raises UserError, which names other settings' folder."""
    found = [FoundModel(str(each), each, None) for each in trainings.models]
    try:
        return measured_on_test_rows(settings, found)
    except UserError as error:
        if trainings.work is None:
            raise
        raise UserError(f"--against '{trainings.work}': {error}") from None


def warnings_of(name: str, models: Sequence[MeasuredModel]) -> list[str]:
    """What is suspicious about the trainings of a setting, each but once. name: of the setting."""
    from mmoe_rec.report.findings import find_in_summary

    told: dict[str, str] = {}
    counts: dict[str, int] = {}
    for each in models:
        said = {
            sentence: f"models of {name} were trained by settings by which each {sentence}" for sentence in each.seen
        }
        said |= {f"{one.check} {one.task}": f"{name}: {one.message}" for one in find_in_summary(each.summary)}
        for which, sentence in said.items():
            told.setdefault(which, sentence)
            counts[which] = counts.get(which, 0) + 1
    return [
        f"{sentence} ({counts[which]} of {len(models)} trainings)" if counts[which] < len(models) else sentence
        for which, sentence in told.items()
    ]
