"""One setting trained with several seeds: what it is worth on average, and how far one training is from another.

    <data.work>/seeds/SEED/     checkpoints and model of each, with the features of `data.work`
    <data.work>/seeds/seeds.json

The trainings are runs within one of MLflow's; none of their models is registered.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmoe_rec import tracking
from mmoe_rec.atomic import atomic_file
from mmoe_rec.errors import UserError
from mmoe_rec.jobs.evaluate import measured_on_test_rows
from mmoe_rec.jobs.places import features_in_use
from mmoe_rec.jobs.train import train_model
from mmoe_rec.locks import writing
from mmoe_rec.progress import say
from mmoe_rec.registry import FoundModel
from mmoe_rec.settings import Settings

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Seeds:
    """What was found. seeds: of the trainings; rows: measured; summary: of `over_trainings`; file: that holds it."""

    seeds: tuple[int, ...]
    rows: int
    summary: dict[str, dict[str, dict[str, Any]]]
    file: Path


def train_seeds(settings: Settings, number: int, resume: bool = False) -> Seeds:
    """Trains with `training.seed` and those after it, measures all on the test rows, and writes `seeds.json`.

    resume: go on with what an earlier run has left; trainings that have ended stay. Raises UserError where several
    processes train, or where there are no test rows.
    """
    from mmoe_rec.evaluation.judging.trainings import over_trainings

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--seeds trains in one process: start it without torchrun")
    folder, uri = Path(settings.data.work) / "seeds", settings.tracking.address
    seeds = tuple(range(settings.training.seed, settings.training.seed + number))
    with (
        features_in_use(settings, "trainings with several seeds") as prepared,
        writing(folder, "trainings with several seeds", "set `data.work` to another folder"),
    ):
        prepared.require_rows("train", "validation", "test")
        key = _key(settings, seeds, prepared.manifest["fingerprint"])
        with tracking.open_run(uri, settings.experiment, run_name=f"{number} seeds", key=key) as run:
            sums, rows = [], 0
            for seed in seeds:
                say(f"seed {seed}, {seeds.index(seed) + 1} of {number}")
                mine = _with_seed(settings, seed, folder, prepared.folder)
                trained = train_model(mine, resume=resume, parent=run.run_id, register=False)
                assert trained is not None, "one process trains"
                found = FoundModel(str(trained.artifact), trained.artifact, None)
                measured = measured_on_test_rows(settings, found, f"seed {seed}")
                sums.append(measured.closed)
                rows = measured.summary["rows"]
            summary = over_trainings(sums, settings.evaluation.resamples)
            file = folder / "seeds.json"
            with atomic_file(file) as path:
                path.write_text(json.dumps({"seeds": seeds, "rows": rows, **summary}, indent=1), encoding="utf-8")
            run.log_artifact(file)
            run.log_metrics(dict(_flat(summary)))
    return Seeds(seeds, rows, summary, file)


def told(found: Seeds) -> Iterator[Table | str]:
    """For the terminal."""
    from rich.table import Table
    from rich.text import Text

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
    yield from _larger(found)


def _cells(metric: Any, each: Mapping[str, Any]) -> list[str]:
    values = [None if each[name] is None else metric.shown(each[name]) for name in ("mean", "low", "high")]
    interval = "-" if values[1] is None else f"{values[1]} to {values[2]}"
    spreads = [
        "-" if each[name] is None else metric.shown(each[name]) for name in ("between_trainings", "between_users")
    ]
    return [values[0] or "-", interval, *spreads]


def _larger(found: Seeds) -> Iterator[str]:
    """Which of the two is the larger uncertainty of one training."""
    for group, metrics in found.summary.items():
        each = metrics.get("auc") or metrics.get("r2")
        if each is None or each["between_users"] is None:
            continue
        seeds, users = each["between_trainings"], each["between_users"]
        which = (
            "another seed would change it more than other users"
            if seeds > users
            else "other users would change it more"
        )
        metric = "auc" if "auc" in metrics else "r2"
        yield (
            f"{group}: one training's {metric} differs by {seeds:.2g} from seed to seed, and by {users:.2g} from users "
            f"to users: {which}"
        )


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
