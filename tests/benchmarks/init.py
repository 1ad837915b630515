"""python -m tests.benchmarks.init [--table journey slice deskdrop income synthetic rows] [--seeds 5] [--work F]
python -m tests.benchmarks.init --tune small [--minutes M]

Is what `mmoe-rec init` writes as good as settings that people wrote? On each table `init` is given the log, its further
logs of events, and nothing else; what it writes is trained with several seeds, unchanged but for the split, which is
that of the shipped settings, as are the trainings that it is compared with. Each task is measured on the same test rows
and labels; the difference is that of the mean AUC over tasks, over trainings and users. A run that was stopped goes on,
and trainings of `tests.benchmarks.accuracy` in the same --work are taken. With --tune, what `init` wrote goes through
`mmoe-rec tune --preset` first, and what that says stands in `tuned`.

Of `synthetic`, the columns that hold the truth are taken away. `rows` is 2 million rows of it, `init` alone.

The last line is JSON: table -> `init` and `shipped` (AUC of each task), `difference` with `low` and `high`, `seconds`
and `gib` of `init` (time and most memory of its process), `missing` (shipped tasks that `init` has not found) and
`tasks` (what it says of those that it has).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from mmoe_rec.evaluation.scoring import ScoredRows
from mmoe_rec.evaluation.summary import Objective
from mmoe_rec.evaluation.sums import EvaluationSums
from mmoe_rec.evaluation.trainings import compare_trainings
from mmoe_rec.inference.artifact import Source
from mmoe_rec.jobs.alternatives import Preset
from mmoe_rec.jobs.evaluate import scored_rows
from mmoe_rec.jobs.presets import tune_preset
from mmoe_rec.jobs.seeds import train_seeds
from mmoe_rec.settings.load import load_settings
from mmoe_rec.settings.sections import Settings
from pipelines.data_sets.synthetic_rows import Plan
from pipelines.make_synthetic_log import generate
from tests.benchmarks import accuracy

SYNTHETIC, ROWS = "synthetic", "rows"
TABLES = ("journey", "slice", "deskdrop", "income", SYNTHETIC, ROWS)
SYNTHETIC_ROWS, MANY_ROWS = 300_000, 2_000_000


def write_synthetic(folder: Path, rows: int) -> None:
    """A log of `pipelines.make_synthetic_log` without its truth, where there is none yet."""
    if folder.is_dir():
        return
    folder.mkdir(parents=True)
    for number, (_, made) in enumerate(generate(Plan(rows=rows))):
        table = made.drop_columns([name for name in made.column_names if name.startswith("true_")])
        pq.write_table(table, folder / f"{number:03d}.parquet")


def shipped_settings(table: str, work: Path) -> Settings:
    """Those that people wrote."""
    if table != SYNTHETIC:
        return accuracy.settings_of(table, work)
    write_synthetic(work / "log", SYNTHETIC_ROWS)
    places = {"data.log": work / "log", "data.work": work / "work", "tracking.uri": f"sqlite:///{work / 'mlflow.db'}"}
    trees = ["--model.trees={}"]
    return load_settings("configs/synthetic.yaml", [*trees, *(f"--{name}={each}" for name, each in places.items())])


def run_init(log: str, events: list[str], out: Path) -> dict[str, Any]:
    """Runs the command in a process of its own; its seconds, and the most memory that it held."""
    out.unlink(missing_ok=True)
    words = [sys.executable, "-m", "mmoe_rec", "init", log, "--out", str(out)]
    words += ["--events", *events] if events else []
    start = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(words)} ended with {os.waitstatus_to_exitcode(status)}")
    return {"seconds": round(time.perf_counter() - start, 1), "gib": round(usage.ru_maxrss / 2**20, 2)}


def written_settings(out: Path, shipped: Settings, work: Path) -> Settings:
    """What `init` wrote, with the split of the shipped settings and folders of its own."""
    tree = load_settings(out).model_dump(mode="json")
    tree["split"] = shipped.model_dump(mode="json")["split"]
    tree["data"]["work"], tree["tracking"]["uri"] = str(work), f"sqlite:///{work}.db"
    return Settings.model_validate(tree)


def tune(settings: Settings, preset: Preset, minutes: float | None) -> tuple[Settings, list[str]]:
    """What `tune --preset` makes of settings, with a folder of its own, and what it says of it."""
    file = Path(f"{settings.data.work}.yaml")
    file.write_text(settings.to_yaml(), encoding="utf-8")
    report = tune_preset(settings, str(file), {}, preset, minutes)
    work = f"{settings.data.work}_tuned"
    return load_settings(report.best, ["--data.work", work, "--tracking.uri", f"sqlite:///{work}.db"]), report.sentences


def score_all(settings: Settings, seeds: int) -> list[ScoredRows]:
    """The test rows as scored by the trainings of all seeds."""
    train_seeds(settings, seeds, resume=True)
    first, folder = settings.training.seed, Path(settings.data.work) / "seeds"
    models = [folder / str(first + number) / "model" for number in range(seeds)]
    return [scored_rows(settings, Source(each, str(each)), each.parent.name) for each in models]


def measure(rows: ScoredRows, other: ScoredRows, columns: list[int | None]) -> EvaluationSums:
    """Another model's predictions, by their columns, on the rows and labels of the shipped settings; a task that the
    other has not is .5."""
    if not (rows.users.equals(other.users) and (rows.candidates is None or rows.candidates.equals(other.candidates))):
        raise RuntimeError("what `init` wrote has other users or candidates, so rows can't be compared")
    values = [np.full(len(rows.users), 0.5) if each is None else other.predictions[:, each] for each in columns]
    return rows.with_predictions(np.stack(values, axis=1)).measure()


def compare(shipped: Settings, own: Settings, seeds: int) -> dict[str, Any]:
    """A table's part of the result, trained with seeds."""
    theirs, ours = score_all(shipped, seeds), score_all(own, seeds)
    labels = {task.label: name for name, task in own.tasks.items()}
    found = {name: labels.get(task.label) for name, task in shipped.tasks.items()}
    names = [task.name for task in ours[0].layout.tasks]
    columns = [None if each is None else names.index(each) for each in found.values()]
    sums, others = [measure(theirs[0], each, columns) for each in ours], [each.measure() for each in theirs]
    objective = Objective.of("auc", others[0], list(shipped.tasks))
    apart = compare_trainings(sums, {"shipped": others}, objective, shipped.evaluation.resamples)["shipped"].objective
    told = {label: own.tasks[name].model_dump(mode="json", exclude_defaults=True) for label, name in labels.items()}
    return {
        "init": accuracy.areas(shipped, sums),
        "shipped": accuracy.areas(shipped, others),
        "difference": apart.value,
        "low": apart.low,
        "high": apart.high,
        "missing": [name for name, each in found.items() if each is None],
        "tasks": told,
    }


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tune", choices=["small", "medium", "large"], help="tune what init wrote")
    parser.add_argument("--minutes", type=float, help="of --tune")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "mmoe_rec_accuracy"))
    asked, result = parser.parse_args(), dict[str, Any]()
    for table in asked.table:
        work = (asked.work / table).resolve()
        work.mkdir(parents=True, exist_ok=True)
        out = work / "init.yaml"
        if table == ROWS:
            write_synthetic(work / "log", MANY_ROWS)
            result[table] = run_init(str(work / "log"), [], out)
        else:
            shipped = shipped_settings(table, work)
            events = [each.path for each in shipped.data.events.values()]
            result[table] = run_init(shipped.data.log, events, out)
            own = written_settings(out, shipped, work / "init")
            if asked.tune is not None:
                own, result[table]["tuned"] = tune(own, asked.tune, asked.minutes)
            result[table] |= compare(shipped, own, asked.seeds)
        print(json.dumps({table: result[table]}, indent=1), flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
