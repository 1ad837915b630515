"""Combined report of all commands in one `data.work_dir`.

A report is stale if the features, the model or the settings have changed since it was made.
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
    "evaluation": ("The model on test rows", "evaluate --model MODEL"),
    "evaluation_validation": ("The model on validation rows", ""),
    "promotion": ("Promotion", ""),
    "baselines": ("Comparison with popularity and trees", "baselines --model MODEL"),
    "comparison": ("Comparison of variants", "compare"),
    "tuning": ("Search for settings", "tune --minutes 30"),
}
"""Folder of a report in `data.work_dir` -> title of the report, and the command to suggest if the report is missing. An
empty command suggests nothing."""


def combine_reports(settings: Settings, format_command: Callable[..., str]) -> Report:
    """Combine the reports in `data.work_dir`: the headlines first, then all figures and tables.

    Args:
        settings: Settings with the folder. Reports that were made with other settings get a warning.
        format_command: Function that takes words such as "compare" and returns the command line to show, with options
            that select the settings.
    """
    work, model_uri = Path(settings.data.work_dir), f"models:/{settings.registered_model}@{settings.tracking.alias}"
    sentences = [Sentence(caution, "warning") for caution in _find_cautions(settings)]
    figures, tables, titles = list[Figure](), list[Table](), list[str]()
    for folder, (title, words) in REPORT_FOLDERS.items():
        report = read_report(work / folder)
        if report is not None:
            titles.append(title)
            time = datetime.fromtimestamp((work / folder / REPORT_JSON).stat().st_mtime, UTC)
            sentences.append(Sentence(f"{title}, {time:%Y-%m-%d %H:%M} UTC: {report.headline}", label=folder))
            sentences += [Sentence(f"{title}: {reason}", "warning") for reason in _find_stale(report, work, settings)]
            for figure in report.figures:
                # Figures of two reports can have the same SVG IDs, so add the folder to each ID.
                svg = re.sub(r'( id="| href="#|url\(#)(?=\w)', rf"\g<1>{folder}-", figure.svg)
                figures.append(replace(figure, title=f"{title}: {figure.title}", svg=svg))
            tables += [replace(table, title=f"{title}: {table.title}", page_only=True) for table in report.tables]
        elif words:
            command = format_command(*words.replace("MODEL", model_uri).split())
            sentences.append(Sentence(f"{title}: missing. Run `{command}`", "note"))
    headline = f"reports: {', '.join(titles)}" if titles else "no reports yet"
    about = f"Reports in {work} about the log {settings.data.log}. Each folder contains the whole report."
    return Report(f"Report: {settings.name}", headline, figures, tables, sentences, about=about)


def _find_cautions(settings: Settings) -> Iterator[str]:
    """Yield a warning if the features in `data.work_dir` belong to other settings or another log, or may do so."""
    features = Path(settings.data.work_dir) / "features"
    try:
        if features.is_dir() and find_existing_features(BuildInputs.of(settings)) is None:
            yield f"the features in '{features}' were built with other settings or from other files of the log"
    except UserError as error:
        yield f"the features in '{features}' can't be compared with the log: {error}"


def _find_stale(report: Report, work: Path, settings: Settings) -> Iterator[str]:
    """Yield reasons why a report is stale, as sentences about "it"."""
    identity = report.identity
    with suppress(OSError, ValueError):
        features = json.loads((work / "features" / "manifest.json").read_text(encoding="utf-8"))["fingerprint"]
        if identity.get("features", features) != features:
            yield f"it was made with other features than the features in '{work / 'features'}'"
    with suppress(UserError, OSError):
        model = artifact_version(work / "model")
        if identity.get("model", model) != model:
            yield f"it was made with another model than '{work / 'model'}'"
    if "settings" in identity:
        for name, old, new in islice(diff_settings(identity["settings"], fixed_settings(settings)), 1):
            yield f"it was made with {name} {old}, and now it is {new}"
