"""The results of all commands in one `data.work`, on one page.

Each command leaves a folder with a report. The report says which features, model and settings it depends on, so this
module can tell whether it still holds.
"""

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

from mmoe_rec.errors import UserError
from mmoe_rec.inference.artifact import version_of
from mmoe_rec.preprocessing.logs import BuildInputs
from mmoe_rec.preprocessing.prepare import existing
from mmoe_rec.report.parts import Report
from mmoe_rec.report.report_files import JSON, read_report, render
from mmoe_rec.settings.sections import Settings, differences
from mmoe_rec.training.origin import fixed_settings

ADDRESS = "ADDRESS"
"""Stands for the address of the model in the words of a command."""


@dataclass(frozen=True)
class Job:
    """A command that leaves a report.

    Attributes:
        folder: Folder of the report in `data.work`.
        title: Title of the part.
        words: Words of the command. Without words, the report is optional.
    """

    folder: str
    title: str
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """The report of a command, or the command that makes it.

    Attributes:
        name: Name of the folder.
        title: Title of the part.
        report: The report, None if it is missing.
        made: Time of the report.
        stale: Reasons why the report may no longer hold.
        command: The command that makes a missing report.
    """

    name: str
    title: str
    report: Report | None = None
    made: str = ""
    stale: Sequence[str] = ()
    command: str | None = None


JOBS = (
    Job("inspection", "The data", ("inspect",)),
    Job("training", "The last training", ("train",)),
    Job("evaluation", "The model on test rows", ("evaluate", "--model", ADDRESS)),
    Job("evaluation_validation", "The model on validation rows"),
    Job("promotion", "Promotion"),
    Job("baselines", "Beside popularity and trees", ("baselines", "--model", ADDRESS)),
    Job("comparison", "Comparison of variants", ("compare",)),
    Job("tuning", "Search for settings", ("tune", "--minutes", "30")),
)
"""In the order of the page."""


def to_page(title: str, about: str, cautions: Sequence[str], parts: Sequence[Part]) -> str:
    """Return the page of all parts: the headlines, then each report, folded.

    Args:
        title: Title of the page.
        about: A sentence on the origin of the reports.
        cautions: Sentences about all parts.
        parts: The reports, and the missing ones.
    """
    return render("overview.html.j2", {"title": title, "about": about, "cautions": cautions, "parts": parts})


def read_parts(settings: Settings, command: Callable[..., str], commands: Collection[str]) -> Iterator[Part]:
    """Yield the report of each command, or the command that makes it.

    Args:
        settings: The settings.
        command: Returns a command with the options of these settings.
        commands: Names of the available commands.
    """
    work, address = Path(settings.data.work), f"models:/{settings.registered_model}@{settings.tracking.alias}"
    for job in JOBS:
        words = [address if word == ADDRESS else word for word in job.words]
        report = read_report(work / job.folder)
        if report is not None:
            made = datetime.fromtimestamp((work / job.folder / JSON).stat().st_mtime, UTC)
            stale = tuple(_find_stale(report, work, settings))
            yield Part(job.folder, job.title, report, f"{made:%Y-%m-%d %H:%M} UTC", stale)
        elif words and words[0] in commands:
            yield Part(job.folder, job.title, command=command(*words))


def find_cautions(settings: Settings) -> Iterator[str]:
    """Yield why everything in `data.work` may belong to other settings."""
    features = Path(settings.data.work) / "features"
    if not features.is_dir():
        return
    try:
        if existing(BuildInputs.of(settings)) is None:
            yield f"the features in '{features}' are of other settings, or files of the log, than these"
    except UserError as error:
        yield f"whether the features in '{features}' are of this log can't be told: {error}"


def _find_stale(report: Report, work: Path, settings: Settings) -> Iterator[str]:
    identity = report.identity
    with suppress(OSError, ValueError):
        features = json.loads((work / "features" / "manifest.json").read_text(encoding="utf-8"))["fingerprint"]
        if identity.get("features", features) != features:
            yield f"it is of other features than those in '{work / 'features'}'"
    with suppress(UserError, OSError):
        model = version_of(work / "model")
        if identity.get("model", model) != model:
            yield f"it is of another model than that in '{work / 'model'}'"
    if "settings" in identity:
        for name, was, now in islice(differences(identity["settings"], fixed_settings(settings)), 1):
            yield f"it was made with {name} {was}, and now it is {now}"
