"""python -m tests.benchmarks.judge [--comparisons 200] [--logs 40] [--only compared selected trained]

How often does the judge err?

`compared`: each comparison is of two models on the rows of 250 users of its own, some 3,000 of two tasks, in 20 slices
of a fifth of the users each, by the rule that promotes: of `equal` models; of those of which one is truly better by a
mean AUC of .03 (`gain`); and of models of which one is far better, but for a slice that it ranks at random, on 500
users, `broken`. What is true is measured on 48,000 other users.

`selected`: labels without signal and a network that has learned noise, on 500 validation users. Trees, blend and
calibration are selected on half of the users, and the other half compares "network + trees" with "network alone"
(`selected`). For contrast, all users do both (`selected_and_judged_alike`).

`trained`: the whole command `train` on small logs, for an earlier day and then for a later one. `later_day` has labels
without signal and promotes whatever it promotes in error. In `later_gain` the second model sees one more column, whose
strength is set so that these judging rows should show the true gain (`gain`, on 20,000 test rows a log) in nine of ten.

promoted_...         fraction of the comparisons in which the first model is better, and nothing holds it back
shown_...            the same without guardrails
by_slices_alone_...  fraction in which nothing but a slice holds it back
margin               of the guardrails

The last line is JSON.
"""

import argparse
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from mmoe_rec.batches.encoded_dataset import ValidationPart
from mmoe_rec.evaluation import promotion
from mmoe_rec.evaluation.calibration import fit_calibration
from mmoe_rec.evaluation.comparison import Outcome, Verdict, compare
from mmoe_rec.evaluation.evaluate import score_split
from mmoe_rec.evaluation.summary import MeasuredModel, summarize
from mmoe_rec.features.layout import TaskOutput
from mmoe_rec.inference.artifact import ResolvedModel
from mmoe_rec.model.trees import Blend, Forest, read_ensemble
from mmoe_rec.settings.load import load_settings
from mmoe_rec.settings.model import Trees
from mmoe_rec.settings.sections import Evaluation, Settings
from mmoe_rec.tracking.registry import resolve_model
from mmoe_rec.training.boosting import TreeInputs
from mmoe_rec.training.stacking import fit_task_trees
from mmoe_rec.training.train import train_model
from tests.evaluation.judged_models import NAMES, NOISE, TASKS, World, noise_of_gain, verdicts
from tests.evaluation.trees import measure
from tests.pipelines.learnable_log import settings_tree

USERS, RESAMPLES, COLUMNS = 250, 200, 12
GAIN = 0.03
"""Of the mean AUC, which nine of ten comparisons should show."""
START, DAYS = np.datetime64("2024-01-01", "us"), 24
FIRST = {"train_end": "2024-01-15", "validation_end": "2024-01-18", "test_end": "2024-01-21"}
SECOND = {"train_end": "2024-01-18", "validation_end": "2024-01-21"}
STRENGTH = 0.365
"""Of the column that the second model alone sees: the true gain is then about what the judging rows can detect."""


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=int, default=200)
    parser.add_argument("--logs", type=int, default=40)
    parts: dict[str, Callable[[argparse.Namespace], dict[str, float]]] = {
        "compared": lambda options: judge_compared(options.comparisons),
        "selected": lambda options: judge_selected(options.comparisons),
        "trained": lambda options: judge_trained(options.logs),
    }
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    options = parser.parse_args()
    actual: dict[str, float] = {"margin": Evaluation().max_metric_drop}
    for part in options.only:
        actual |= parts[part](options)
    print(json.dumps(actual))


def judge_compared(number: int) -> dict[str, float]:
    """Models whose true difference is known."""
    actual, counts = dict[str, float](), {"equal": verdicts(NOISE, number, USERS, RESAMPLES, slices=True)}
    counts["gain"] = verdicts(noise_of_gain(GAIN), number, USERS, RESAMPLES, slices=True)
    counts["broken"] = verdicts(0.0, number, 2 * USERS, RESAMPLES, slices=True, broken=True)
    for name, item in counts.items():
        print(f"{name}: {dict(item)}", flush=True)
        actual[f"promoted_{name}"] = item["better"] / number
        actual[f"shown_{name}"] = (item["better"] + item["blocked"]) / number
        actual[f"by_slices_alone_{name}"] = item["only slices"] / number
    return actual


def judge_selected(number: int) -> dict[str, float]:
    """Trees of labels without signal, selected on some users and judged on others, or on the same."""
    actual = {}
    for name, divided in (("selected", True), ("selected_and_judged_alike", False)):
        promoted = sum(select(seed, divided).kind == Outcome.BETTER for seed in range(number))
        print(f"{name}: {promoted} of {number} promoted", flush=True)
        actual[f"promoted_{name}"] = promoted / number
    return actual


def select(seed: int, divided: bool) -> Verdict:
    """Compare a network that has learned noise with the same beside trees that were grown on noise.

    Args:
        seed: Of all that is drawn.
        divided: Whether the users who judge select nothing.
    """
    random = np.random.default_rng([13, seed])
    train, validation = World(random, 2 * USERS), World(random, 2 * USERS)
    judging = ValidationPart.EVALUATION.contains(pa.array(validation.user))
    judges, selects = (judging, ~judging) if divided else (np.ones(len(judging), bool),) * 2
    x = [random.normal(size=(len(world.user), COLUMNS)).astype(np.float32) for world in (train, validation)]
    labels = [(random.random(world.labels.shape) < 0.25).astype(float) for world in (train, validation)]
    network = np.log(0.25 / 0.75) + 0.3 * random.normal(size=labels[1].shape)
    both = np.empty_like(network)
    for place, name in enumerate(NAMES):
        rows = (
            TreeInputs(x[0], COLUMNS, labels[0][place]),
            TreeInputs(x[1][selects], COLUMNS, labels[1][place][selects]),
        )
        own = network[place][selects], validation.user[selects]
        grown, _ = fit_task_trees(TaskOutput(name, "binary"), Trees(max_trees=200), 17, *rows, *own)
        text, blend = grown or ("", Blend(1.0, 0.0, 0.0))
        trees = Forest([read_ensemble(text)]).sums(x[1])[:, 0] if text else np.zeros(len(judging))
        both[place] = blend.apply(network[place], trees)
    models = {}
    for model, logits in (("new", both), ("old", network)):
        tasks = [TaskOutput(name, "binary") for name in NAMES]
        fitted, _ = fit_calibration("temperature", tasks, logits[:, selects].T, labels[1][:, selects].T)
        tensor = fitted.apply(torch.from_numpy(logits[:, judges].T.copy()), NAMES)
        given = [dict(zip(NAMES, item, strict=True)) for item in (expit(tensor.numpy().T), labels[1][:, judges])]
        sums = measure(TASKS, validation.user[judges], validation.request[judges], *given, score=sum(given[0].values()))
        models[model] = MeasuredModel(sums, summarize(sums, 20))
    return compare(models, "new", NAMES, Evaluation(resamples=RESAMPLES)).verdicts["old"]


def judge_trained(number: int) -> dict[str, float]:
    """The command `train` for a later day, beside the champion of an earlier one."""
    actual: dict[str, float] = {}
    for name, strength in (("later_day", 0.0), ("later_gain", STRENGTH)):
        results = []
        for seed in range(number):
            with tempfile.TemporaryDirectory() as folder:
                results.append(train_twice(seed, strength, Path(folder)))
            is_promoted, verdict, gain = results[-1]
            kind = "not compared" if verdict is None else verdict.kind
            print(f"{name} {seed}: promoted {is_promoted}, {kind}, gain {gain:.4f}", flush=True)
        promoted, judged, gains = zip(*results, strict=True)
        shown = sum(item is not None and item.kind in ("better", "blocked") for item in judged)
        print(f"{name}: {sum(promoted)} of {number} promoted, {shown} shown better", flush=True)
        actual |= {f"promoted_{name}": sum(promoted) / number, f"gain_{name}": float(np.mean(gains))}
    return actual


def train_twice(seed: int, strength: float, folder: Path) -> tuple[bool, Verdict | None, float]:
    """Train for an earlier day and then for a later one, each time from the settings of that day.

    Args:
        strength: How much the labels follow a column that the second model alone sees. 0 leaves labels without signal.

    Returns:
        Whether the second model became the champion, the verdict on it, and its true gain in the mean AUC.
    """
    write_log(seed, strength, folder)
    first, second = (settings_of(folder, seed, day, strength) for day in ("first", "second"))
    with recorded_verdicts() as verdicts:
        champion, challenger = train_model(first), train_model(second)
    assert champion is not None
    assert challenger is not None
    areas = []
    for trained, settings in ((champion, first), (challenger, second)):
        model = resolve_model(str(trained.artifact), settings.tracking.resolved_uri)
        scored = score_split(second, ResolvedModel(trained.artifact, model.uri, None), "model", "test")
        columns = [(scored.labels[name], scored.predictions[name]) for name in NAMES]
        areas.append(np.mean([roc_auc_score(label, predicted) for label, predicted in columns]))
    promoted = challenger.model_uri.endswith("@champion")
    return promoted, verdicts[-1] if verdicts else None, float(areas[1] - areas[0])


@contextmanager
def recorded_verdicts() -> Iterator[list[Verdict]]:
    """The verdicts that trainings come to."""
    read, actual = promotion._read_verdict, list[Verdict]()

    def record(results: Any) -> tuple[bool, str]:
        actual.extend(results.comparison.verdicts.values())
        return read(results)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(promotion, "_read_verdict", record)
        yield actual


def write_log(seed: int, strength: float, folder: Path) -> None:
    """Write a log of 40,000 rows, half of them on the last days, which test."""
    random = np.random.default_rng([17, seed])
    users, items, requests = 400, 60, 8000
    days = np.concatenate([random.uniform(0, 20, requests // 2), random.uniform(20, DAYS, requests // 2)])
    times = np.sort(days * 86_400e6).astype(np.int64).repeat(5)
    rows = len(times)
    numbers, extra, quality = random.normal(size=(6, rows)), random.normal(size=rows), random.normal(size=items)
    item = random.random((requests, items)).argsort(1)[:, :5].ravel()
    signal = strength * extra + (0.5 * numbers[0] + 0.5 * quality[item] if strength else 0.0)
    labels = random.random((2, rows)) < expit(signal - 1)
    columns: dict[str, Any] = {f"number_{place}": number for place, number in enumerate(numbers)}
    columns |= {"request": np.arange(requests).repeat(5), "user": random.integers(0, users, requests).repeat(5)}
    columns |= {"item": item, "extra": extra, **dict(zip(NAMES, labels.astype(np.int8), strict=True))}
    columns["time"] = pa.array(START + times.astype("timedelta64[us]"), pa.timestamp("us", tz="UTC"))
    (folder / "log").mkdir()
    pq.write_table(pa.table(columns), folder / "log" / "part.parquet")


def settings_of(folder: Path, seed: int, day: str, strength: float) -> Settings:
    """Settings for the first or the second day. With a strength, only the second day's model sees column `extra`."""
    numbers = [f"number_{place}" for place in range(6)] + (["extra"] if strength and day == "second" else [])
    features: dict[str, Any] = {name: {"kind": "numeric", "column": name} for name in numbers}
    features |= {"item": {"kind": "id", "column": "item", "dim": 4}}
    features |= {f"item_{task}": {"kind": "counter", "task": task, "by": ["item"]} for task in NAMES}
    tree = settings_tree(
        folder,
        data={"log": str(folder / "log"), "work_dir": str(folder / day)},
        roles={"user": ["user"], "candidate": ["item", *numbers]},
        tasks={
            name: {"label": name, "objective": objective}
            for name, objective in zip(NAMES, ("engagement", "satisfaction"), strict=True)
        },
        features=features,
        split=FIRST if day == "first" else SECOND,
        model={
            "bottom": {"units": [16]},
            "experts": {"count": 2, "units": [8]},
            "towers": {"units": [4]},
            "trees": {"max_trees": 60, "leaves": 15, "learning_rate": 0.1},
        },
        training={
            **{"device": "cpu", "precision": "fp32", "matmul_backend": "blas", "table_backend": "fbgemm", "threads": 1},
            **{"batch_size": 256, "epochs": 2, "learning_rate": 0.01, "calibration": "temperature", "seed": seed},
        },
        evaluation={"resamples": RESAMPLES, "max_metric_drop": 0.05},
    )
    path = folder / f"{day}.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return load_settings(str(path))


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main()
