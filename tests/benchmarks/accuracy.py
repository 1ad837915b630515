"""python -m tests.benchmarks.accuracy [--table journey slice deskdrop income education] [--seeds 5] [--work FOLDER]

Does the model rank above what a user would take instead? On each table it is trained with several seeds, by the
settings that are shipped for it (`ours`) and by the template's model and training (`defaults`); beside it the boosted
trees of each library that is installed (extra `baselines`) on our encoded rows, with the same seeds. A difference is
one of the mean AUC over tasks, over trainings and users (`mmoe_rec.evaluation.trainings`); the best other one is that
of the highest mean on the test rows, which favours it.

DeskDrop is read from ../shared/data/deskdrop, Census-Income as by `tests.benchmarks.census`. A run that was stopped
goes on. The last line is JSON: table -> `ours`, `defaults` (AUC of each task), `others`, `best_other`, and
`ours_minus_best` with `ours_low` and `ours_high`; `defaults_minus_best` alike.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmoe_rec.evaluation.comparison import Objective
from mmoe_rec.evaluation.sums import EvaluationSums
from mmoe_rec.evaluation.trainings import average_trainings, compare_trainings
from mmoe_rec.inference.artifact import Source
from mmoe_rec.jobs.baselines import POPULARITY, measure_baselines
from mmoe_rec.jobs.evaluate import measured_on_test_rows
from mmoe_rec.jobs.seeds import train_seeds
from mmoe_rec.jobs.trees import Library, find_libraries
from mmoe_rec.settings.load import load_settings
from mmoe_rec.settings.sections import Settings
from pipelines.ingest_census_income import ingest
from pipelines.quickstart import ingest_log, quickstart_settings
from tests.benchmarks import census

DESKDROP = Path("../shared/data/deskdrop/deskdrop.yaml")
TABLES = ("journey", "slice", "deskdrop", *census.PAIRS)
TEMPLATE = Path("configs/template.yaml")


def settings_of(table: str, work: Path) -> Settings:
    """Those that are shipped for a table, with a folder and a store of its own; the log is made where there is none."""
    store = ["--tracking.uri", f"sqlite:///{work / 'mlflow.db'}"]
    if table in census.PAIRS:
        if not (work.parent / "log").is_dir():
            ingest(Path(census.RAW), work.parent, seed=17)
        return census.settings_of(work.parent, table, "mmoe")
    if table == "deskdrop":
        return load_settings(DESKDROP, ["--data.work", str(work / "work"), "--model.trees", "{}", *store])
    settings = quickstart_settings(table == "slice", work, store)
    ingest_log(work, table == "slice")
    return settings


def with_defaults(settings: Settings, work: Path) -> Settings:
    """The template's model and training, on the same columns and features."""
    tree, template = (each.model_dump(mode="json") for each in (settings, load_settings(TEMPLATE)))
    tree |= {name: template[name] for name in ("model", "training")}
    tree["data"]["work"] = str(work / "defaults")
    return Settings.model_validate(tree)


def trained(settings: Settings, seeds: int) -> list[EvaluationSums]:
    """The test rows as measured by the models of all seeds."""
    train_seeds(settings, seeds, resume=True)
    first, folder = settings.training.seed, Path(settings.data.work) / "seeds"
    models = [folder / str(first + number) / "model" for number in range(seeds)]
    return [each.sums for each in measured_on_test_rows(settings, [Source(each, str(each)) for each in models])]


def boosted(
    settings: Settings, work: Path, seeds: int, libraries: Sequence[Library]
) -> dict[str, list[EvaluationSums]]:
    """Library -> the same of its trees."""
    found: dict[str, list[EvaluationSums]] = {each.name: [] for each in libraries}
    for number in range(seeds):
        training = settings.training.model_copy(update={"seed": settings.training.seed + number})
        own = settings.model_copy(update={"training": training})
        models = measure_baselines(own, work / "baselines" / str(number), libraries=libraries).models
        for name, model in models.items():
            if name != POPULARITY:
                found[name].append(model.sums)
    return found


def areas(settings: Settings, sums: Sequence[EvaluationSums]) -> dict[str, float | None]:
    """The mean AUC of each task over trainings."""
    found = average_trainings(sums, settings.evaluation.resamples)
    return {task: found[task]["auc"].mean for task in settings.tasks}


def compare(
    settings: Settings, models: Mapping[str, list[EvaluationSums]], others: Mapping[str, list[EvaluationSums]]
) -> dict[str, Any]:
    """A table's part of the result. models: `ours` and `defaults`."""
    objective = Objective.of("auc", models["ours"][0], list(settings.tasks))
    means = {name: areas(settings, sums) for name, sums in {**models, **others}.items()}
    best = max(others, key=lambda name: sum(each or 0.0 for each in means[name].values()))
    found: dict[str, Any] = {name: means[name] for name in models}
    found |= {"others": {name: means[name] for name in others}, "best_other": {"name": best, **(means[best])}}
    for name, sums in models.items():
        apart = compare_trainings(sums, {best: others[best]}, objective, settings.evaluation.resamples)[best].objective
        found |= {f"{name}_minus_best": apart.value, f"{name}_low": apart.low, f"{name}_high": apart.high}
    return found


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "mmoe_rec_accuracy"))
    asked, libraries, result = parser.parse_args(), find_libraries(), dict[str, Any]()
    for table in asked.table:
        work = asked.work / table
        work.mkdir(parents=True, exist_ok=True)
        settings = settings_of(table, work)
        others = boosted(settings, work, asked.seeds, libraries)
        models = {"ours": trained(settings, asked.seeds)}
        models["defaults"] = trained(with_defaults(settings, work), asked.seeds)
        result[table] = compare(settings, models, others)
        print(json.dumps({table: result[table]}, indent=1), flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
