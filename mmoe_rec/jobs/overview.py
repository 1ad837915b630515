"""What the jobs of one `data.work` have found, read from the files that each leaves there, for one report.

A job leaves a folder with a JSON file whose `sentences` say what it found, and a page. It may no longer hold: features
were built anew since, another model trained, or settings changed. Where a file names the features, the model or the
settings that it is of, that tells; else whether it is older than they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from mmoe_rec.errors import UserError
from mmoe_rec.inference.artifact import version_of
from mmoe_rec.preprocessing.logs import BuildInputs
from mmoe_rec.preprocessing.prepare import existing
from mmoe_rec.report.pages import embed, render
from mmoe_rec.settings.load import load_settings
from mmoe_rec.settings.sections import Settings, differences
from mmoe_rec.training.origin import fixed_settings

ADDRESS = "ADDRESS"
"""Stands for the address of the model in a job's words."""


@dataclass(frozen=True)
class Job:
    """A job of which a report tells. name: of its folder; title: of its part; words: of its command, none where nobody
    needs it; of_model: whether it is of the model in `data.work`, rather than of the features alone."""

    name: str
    title: str
    words: tuple[str, ...] = ()
    of_model: bool = False


@dataclass(frozen=True)
class Part:
    """What a job has found. name: tells it from others on the page; sentences: its verdicts; made: when; stale: why it
    may no longer hold; page: its page as it stands, None without one; command: finds it out, where it is missing."""

    name: str
    title: str
    sentences: Sequence[str] = ()
    made: str = ""
    stale: Sequence[str] = ()
    page: str | None = None
    command: str | None = None

    @property
    def body(self) -> str | None:
        """The inside of its page, for the middle of another one."""
        return None if self.page is None else embed(self.page, self.name)


def page(title: str, about: str, cautions: Sequence[str], parts: Sequence[Part]) -> str:
    """The page of all parts, the verdicts first, then each job's page, folded. about: a sentence on where it is from;
    cautions: what is to be known of all parts."""
    return render("overview.html.j2", {"title": title, "about": about, "cautions": cautions, "parts": parts})


TRAINING = Job("model", "The last training", ("train",))
JOBS = (
    Job("inspection", "The data", ("inspect",)),
    TRAINING,
    Job("evaluation", "The model on test rows", ("evaluate", "--model", ADDRESS), of_model=True),
    Job("evaluation_validation", "The model on validation rows", of_model=True),
    Job("promotion", "Promotion", of_model=True),
    Job("baselines", "Beside popularity and trees", ("baselines", "--model", ADDRESS), of_model=True),
    Job("comparison", "Comparison of variants", ("compare",)),
    Job("tuning", "Search for settings", ("tune", "--minutes", "30")),
)
"""In the order of a report."""


def read_parts(settings: Settings, command: Callable[..., str], commands: Collection[str]) -> Iterator[Part]:
    """What each job has found, or the command that finds it out.

    command: gives a command with the options of these settings; commands: those that there are.
    """
    work, address = Path(settings.data.work), f"models:/{settings.registered_model}@{settings.tracking.alias}"
    for job in JOBS:
        words = [address if word == ADDRESS else word for word in job.words]
        part = _read_training(job, work, settings) if job is TRAINING else _read_part(job, work, settings)
        if part is not None:
            yield part
        elif words and words[0] in commands:
            yield Part(job.name, job.title, command=command(*words))


def find_cautions(settings: Settings) -> Iterator[str]:
    """Why all that lies in `data.work` may be of other settings."""
    features = Path(settings.data.work) / "features"
    if not features.is_dir():
        return
    try:
        if existing(BuildInputs.of(settings)) is None:
            yield f"the features in '{features}' are of other settings, or files of the log, than these"
    except UserError as error:
        yield f"whether the features in '{features}' are of this log can't be told: {error}"


def _read_part(job: Job, work: Path, settings: Settings) -> Part | None:
    """None where the job has left nothing."""
    folder = work / job.name
    files = [file for file in sorted(folder.glob("*.json")) if not file.name.startswith(".")]
    trees = {file: tree for file in files if isinstance((tree := _read_json(file) or {}).get("sentences"), list)}
    pages = [file for name in ("report.html", "health.html") if (file := folder / name).is_file()]
    if not trees:
        return None if not pages else Part(job.name, job.title, stale=(_OLD,), page=_read_text(pages[0]))
    sentences = tuple(str(each) for tree in trees.values() for each in tree["sentences"])
    made = max(file.stat().st_mtime for file in trees)
    features, model = _identities(trees)
    stale = [*_find_stale(job, work, made, features, model)]
    stale += [
        told for tree in trees.values() if "settings" in tree for told in _name_change(tree["settings"], settings)
    ]
    if not pages:
        stale.append("its page is missing: it is being written, or was stopped")
    return Part(job.name, job.title, sentences, _moment(made), tuple(stale), _read_text(pages[0]) if pages else None)


_OLD = "an earlier version of this package made it, without sentences: run it again"


def _name_change(before: dict[str, Any], settings: Settings) -> Iterator[str]:
    """The first of the settings that are others now than before."""
    for name, was, now in islice(differences(before, fixed_settings(settings)), 1):
        yield f"it was made with {name} {was}, and now it is {now}"


def _read_training(job: Job, work: Path, settings: Settings) -> Part | None:
    """The last training that has ended, by what lies beside its checkpoints and in its model."""
    file = work / "checkpoints" / "finished.json"
    ended, about = _read_json(file), _read_json(work / "model" / "model.json")
    if ended is None or about is None:
        return None
    try:
        areas = [f"{name} {auc:.4f}" for name, auc in ended["best"]["auc"].items() if auc is not None]
        sentences = [f"validation AUC, at step {ended['best_step']:,}: {', '.join(areas)}"] if areas else []
        sentences += ended["compared"]
    except (KeyError, TypeError, ValueError, AttributeError):
        return Part(job.name, job.title, stale=(_OLD,))
    if about.get("early_end"):
        sentences.append(f"the model {about['early_end']}")
    made = file.stat().st_mtime
    stale = [*_find_stale(job, work, made, about.get("fingerprint"), None)]
    with suppress(UserError):  # of a model that another version wrote
        stale += _name_change(fixed_settings(load_settings(work / "model" / "settings.yaml")), settings)
    return Part(job.name, job.title, tuple(sentences), _moment(made), tuple(stale))


def _identities(trees: Mapping[Path, Mapping[str, Any]]) -> tuple[str | None, str | None]:
    """The fingerprint of the features, and the version of the model, as far as the job has noted them."""
    features = next((tree["fingerprint"] for tree in trees.values() if tree.get("fingerprint")), None)
    model = next((tree["facts"]["artifact"] for tree in trees.values() if "artifact" in tree.get("facts", {})), None)
    return features, model


def _find_stale(job: Job, work: Path, made: float, features: str | None, model: str | None) -> Iterator[str]:
    manifest = work / "features" / "manifest.json"
    now = _read_json(manifest)
    if now is not None and features is not None and now.get("fingerprint") != features:
        yield f"it is of other features than those in '{manifest.parent}'"
    elif now is not None and features is None and manifest.stat().st_mtime > made:
        yield f"it is older than the features in '{manifest.parent}'"
    if not job.of_model:
        return
    try:
        current, since = version_of(work / "model"), (work / "model" / "manifest.json").stat().st_mtime
    except (UserError, OSError):  # a model that is missing or damaged is told where it is used
        return
    if model is not None and model != current:
        yield f"it is of another model than that in '{work / 'model'}'"
    elif model is None and since > made:
        yield f"it is older than the model in '{work / 'model'}'"


def _read_json(file: Path) -> dict[str, Any] | None:
    """An object in a file; None where there is none that can be read."""
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return tree if isinstance(tree, dict) else None


def _read_text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
