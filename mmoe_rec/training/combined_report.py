"""The reports of all commands in one `data.work_dir`, as one report.

Each report says which features, model and settings it depends on, so this module can tell whether it still holds.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

from mmoe_rec.errors import UserError
from mmoe_rec.inference.artifact import artifact_version
from mmoe_rec.preprocessing.build_inputs import BuildInputs
from mmoe_rec.preprocessing.prepare import find_existing_features
from mmoe_rec.report.parts import Figure, Report, Sentence, Table
from mmoe_rec.report.report_files import REPORT_JSON, read_report
from mmoe_rec.settings.sections import Settings, diff_settings
from mmoe_rec.training.provenance import fixed_settings

REPORT_FOLDERS = {
    "inspection": ("The data", "inspect"),
    "training": ("The last training", "train"),
    "evaluation": ("The model on test rows", "evaluate --model ADDRESS"),
    "evaluation_validation": ("The model on validation rows", ""),
    "promotion": ("Promotion", ""),
    "baselines": ("Beside popularity and trees", "baselines --model ADDRESS"),
    "comparison": ("Comparison of variants", "compare"),
    "tuning": ("Search for settings", "tune --minutes 30"),
}
"""Folder in `data.work_dir` -> its title, and the command that makes its report. Without one, the report is
optional."""


def combine_reports(settings: Settings, format_command: Callable[..., str]) -> Report:
    """Join the reports in `data.work_dir`: the headlines first, then all figures and tables.

    Args:
        settings: The settings.
        format_command: Returns a command, given in words, with the options of these settings.
    """
    work, address = Path(settings.data.work_dir), f"models:/{settings.registered_model}@{settings.tracking.alias}"
    sentences = [Sentence(each, "warning") for each in _find_cautions(settings)]
    figures, tables, found = list[Figure](), list[Table](), list[str]()
    for folder, (title, words) in REPORT_FOLDERS.items():
        report = read_report(work / folder)
        if report is not None:
            found.append(title)
            made = datetime.fromtimestamp((work / folder / REPORT_JSON).stat().st_mtime, UTC)
            sentences.append(Sentence(f"{title}, {made:%Y-%m-%d %H:%M} UTC: {report.headline}", label=folder))
            sentences += [Sentence(f"{title}: {each}", "warning") for each in _find_stale(report, work, settings)]
            # Figures of two parts may have the same ids.
            unique = rf"\g<1>{folder}-"
            figures += [
                replace(
                    figure,
                    title=f"{title}: {figure.title}",
                    svg=re.sub(r'( id="| href="#|url\(#)(?=\w)', unique, figure.svg),
                )
                for figure in report.figures
            ]
            tables += [replace(table, title=f"{title}: {table.title}", page_only=True) for table in report.tables]
        elif words:
            command = format_command(*words.replace("ADDRESS", address).split())
            sentences.append(Sentence(f"{title}: not there yet. Run `{command}`", "note"))
    headline = f"what is known: {', '.join(found)}" if found else "nothing is known yet"
    about = f"What lies in {work}, of the log {settings.data.log}. Each folder there holds its whole report."
    return Report(f"Report: {settings.name}", headline, figures, tables, sentences, about=about)


def _find_cautions(settings: Settings) -> Iterator[str]:
    """Yield why everything in `data.work_dir` may belong to other settings."""
    features = Path(settings.data.work_dir) / "features"
    try:
        if features.is_dir() and find_existing_features(BuildInputs.of(settings)) is None:
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
        model = artifact_version(work / "model")
        if identity.get("model", model) != model:
            yield f"it is of another model than that in '{work / 'model'}'"
    if "settings" in identity:
        for name, was, now in islice(diff_settings(identity["settings"], fixed_settings(settings)), 1):
            yield f"it was made with {name} {was}, and now it is {now}"
