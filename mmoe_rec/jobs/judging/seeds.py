"""One setting trained with several seeds: what it is worth on average, and how far one training is from another.

    <data.work>/seeds/SEED/     checkpoints and model of each, with the features of `data.work`
    <data.work>/seeds/seeds.json    and report.html, which shows it

The trainings are runs within one of MLflow's; none of their models is registered.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmoe_rec import tracking
from mmoe_rec.atomic import atomic_file
from mmoe_rec.devices import usable_cores
from mmoe_rec.errors import UserError
from mmoe_rec.jobs.evaluate import measured_on_test_rows
from mmoe_rec.jobs.judging.results import Measured, check_names, short_names
from mmoe_rec.jobs.judging.side_by_side import side_by_side
from mmoe_rec.jobs.places import features_in_use
from mmoe_rec.jobs.run_page import as_code, command
from mmoe_rec.jobs.train import train_model
from mmoe_rec.locks import writing
from mmoe_rec.progress import bar, say
from mmoe_rec.registry import FoundModel
from mmoe_rec.settings import Settings

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Seeds:
    """What was found. seeds: of the trainings; rows: measured; summary: of `over_trainings`; against: of
    `apart_over_trainings`; file: that holds it."""

    seeds: tuple[int, ...]
    rows: int
    summary: dict[str, dict[str, dict[str, Any]]]
    against: dict[str, dict[str, dict[str, Any]]]
    file: Path

    @property
    def report(self) -> Path:
        """The page."""
        return self.file.with_name("report.html")


def train_seeds(
    settings: Settings, number: int, resume: bool = False, at_once: int = 1, against: Sequence[str] = ()
) -> Seeds:
    """Trains with `training.seed` and those after it, measures all on the test rows, and writes `seeds.json`.

    resume: go on with what an earlier run has left; trainings that have ended stay; at_once: how many run at a time;
    against: `data.work` of other settings, whose trainings of several seeds these are compared with. Raises UserError
    where several processes train, where there are no test rows, or no such trainings.
    """
    from mmoe_rec.evaluation.judging.trainings import apart_over_trainings, larger, over_trainings

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--seeds trains in one process: start it without torchrun")
    folder, uri = Path(settings.data.work) / "seeds", settings.tracking.address
    others = _models_of(against, folder)
    seeds = tuple(range(settings.training.seed, settings.training.seed + number))
    with (
        features_in_use(settings, "trainings with several seeds") as prepared,
        writing(folder, "trainings with several seeds", "set `data.work` to another folder"),
    ):
        prepared.require_rows("train", "validation", "test")
        key = _key(settings, seeds, prepared.manifest["fingerprint"])
        with tracking.open_run(uri, settings.experiment, run_name=f"{number} seeds", key=key) as run:
            own = [_with_seed(settings, seed, folder, prepared.folder) for seed in seeds]
            if at_once > 1:
                models = _side_by_side(own, at_once, resume, run.run_id)
            else:
                models = list(_one_by_one(own, resume, run.run_id))
            measured = [_measured(settings, each) for each in models]
            sums, resamples = [each.closed for each in measured], settings.evaluation.resamples
            summary = over_trainings(sums, resamples)
            theirs = {name: [_measured(settings, each).closed for each in its] for name, its in others.items()}
            apart = apart_over_trainings(sums, theirs, resamples)
            found = Seeds(seeds, measured[0].summary["rows"], summary, apart, folder / "seeds.json")
            _write(found, settings)
            run.log_artifact(found.file)
            run.log_artifact(found.report)
            run.log_metrics(dict(_flat(summary)))
            run.describe("Trainings", "\n\n".join([as_code(command()), *larger(summary)]))
    return found


def _write(found: Seeds, settings: Settings) -> None:
    from mmoe_rec.report.trainings import page

    title = f"{len(found.seeds)} trainings of {settings.name}"
    facts = {"log": settings.data.log, "rows": f"{found.rows:,} test rows"}
    facts |= {"resamples of users": f"{settings.evaluation.resamples:,}", "command": command()}
    found.report.unlink(missing_ok=True)  # it would tell of other numbers than lie beside it
    tree = {"seeds": found.seeds, "rows": found.rows, **found.summary}
    tree |= {"against": found.against} if found.against else {}
    with atomic_file(found.file) as path:
        path.write_text(json.dumps(tree, indent=1), encoding="utf-8")
    with atomic_file(found.report) as path:
        path.write_text(page(title, found, facts), encoding="utf-8")


def _models_of(against: Sequence[str], mine: Path) -> dict[str, list[Path]]:
    """Name of each other setting -> its models. Raises UserError where it has none of several seeds."""
    check_names(list(against), "--against")
    found = {}
    for name, work in zip(short_names(list(against)), against, strict=True):
        folder = Path(work) / "seeds"
        if not (folder / "seeds.json").is_file():
            raise UserError(
                f"--against '{work}' holds no trainings that have ended, of --seeds (no '{folder}/seeds.json')"
            )
        if folder.resolve() == mine.resolve():
            raise UserError(f"--against '{work}' is the folder of these trainings (data.work); give that of others")
        seeds = json.loads((folder / "seeds.json").read_text(encoding="utf-8"))["seeds"]
        found[name] = [folder / str(seed) / "model" for seed in seeds]
        if gone := next((each for each in found[name] if not each.is_dir()), None):
            raise UserError(f"--against '{work}': there is no model '{gone}', although it has been trained")
    return found


def _measured(settings: Settings, model: Path) -> Measured:
    return measured_on_test_rows(settings, FoundModel(str(model), model, None), str(model))


def _trained(settings: Settings, resume: bool, parent: str | None) -> Path:
    trained = train_model(settings, resume=resume, parent=parent, register=False)
    assert trained is not None, "one process trains"
    return trained.artifact


def _one_by_one(own: Sequence[Settings], resume: bool, parent: str | None) -> Iterator[Path]:
    for number, settings in enumerate(own, 1):
        say(f"training {number} of {len(own)}, with seed {settings.training.seed}")
        yield _trained(settings, resume, parent)


def _side_by_side(own: Sequence[Settings], at_once: int, resume: bool, parent: str | None) -> list[Path]:
    logs = [Path(each.data.work) / "training.log" for each in own]
    asked, models = [_sharing(each, at_once) for each in own], dict[int, Path]()
    with bar() as progress:
        task = progress.add_task(f"trainings, {at_once} at a time", total=len(own))
        train = partial(_train_apart, resume=resume, parent=parent)
        for number, text in side_by_side(train, asked, logs, at_once):
            models[number] = Path(text)
            say(f"trained with seed {own[number].training.seed}")
            progress.advance(task)
    return [models[number] for number in range(len(own))]


def _train_apart(settings: Settings, resume: bool, parent: str | None) -> str:
    """In a process of its own."""
    return str(_trained(settings, resume, parent))


def _sharing(settings: Settings, at_once: int) -> Settings:
    """Settings by which so many trainings at a time do not ask for more threads than there are cores."""
    if settings.training.threads is not None:
        return settings
    training = settings.training.model_copy(update={"threads": max(1, usable_cores() // at_once)})
    return settings.model_copy(update={"training": training})


def told(found: Seeds) -> Iterator[Table | str]:
    """For the terminal."""
    from rich.table import Table
    from rich.text import Text

    from mmoe_rec.evaluation.judging.trainings import larger, told_apart
    from mmoe_rec.evaluation.metrics import registered

    table = Table(title=f"{len(found.seeds)} trainings, {found.rows:,} test rows", title_justify="left")
    table.add_column("", no_wrap=True)
    for name in ("mean", "95% interval", "between trainings", "between users"):
        table.add_column(name, justify="right", no_wrap=True)
    for group, metrics in found.summary.items():
        shown = [
            each
            for each in registered.METRICS
            if each.is_shown(group == "score") and metrics.get(each.name, {}).get("mean") is not None
        ]
        if not shown:
            continue
        table.add_row(Text(group, style="bold"))
        for metric in shown:
            each = metrics[metric.name]
            table.add_row(f"  {metric.label}", *_cells(metric, each), end_section=metric == shown[-1])
    table.caption = "between trainings: their standard deviation; between users: the standard error of the mean"
    yield table
    yield from larger(found.summary)
    yield from told_apart(found.against)


def _cells(metric: Any, each: Mapping[str, Any]) -> list[str]:
    values = [None if each[name] is None else metric.shown(each[name]) for name in ("mean", "low", "high")]
    interval = "-" if values[1] is None else f"{values[1]} to {values[2]}"
    spreads = [
        "-" if each[name] is None else metric.shown(each[name]) for name in ("between_trainings", "between_users")
    ]
    return [values[0] or "-", interval, *spreads]


def _with_seed(settings: Settings, seed: int, folder: Path, features: Path) -> Settings:
    """The settings with a seed and a folder of its own, which has the features of all."""
    own = folder / str(seed)
    own.mkdir(parents=True, exist_ok=True)
    link = own / "features"
    if not (link.is_symlink() and link.resolve() == features.resolve()):
        with suppress(FileNotFoundError):
            link.unlink()
        link.symlink_to(features.resolve(), target_is_directory=True)
    return settings.model_copy(
        update={
            "training": settings.training.model_copy(update={"seed": seed}),
            "data": settings.data.model_copy(update={"work": str(own)}),
        }
    )


def _key(settings: Settings, seeds: Sequence[int], fingerprint: str) -> str:
    depends = settings.model_dump(mode="json", include={"model", "training"})
    text = json.dumps([depends, settings.choices, list(seeds), fingerprint], sort_keys=True)
    return f"seeds-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _flat(summary: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[tuple[str, float]]:
    for group, metrics in summary.items():
        for metric, each in metrics.items():
            for name in ("mean", "low", "high", "between_trainings", "between_users"):
                if each[name] is not None:
                    yield f"test/{group}.{metric}.{name}", each[name]
