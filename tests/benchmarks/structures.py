"""python -m tests.benchmarks.structures [--logs 40] [--seeds 5] [--out FILE]

How often are the verdicts of `mmoe-rec compare` on tasks alone right? Each log is a plain table of 12 numbers and two
tasks, `many` with a label in every row, and `few`; what each follows is drawn anew for each log, a small random network
of the numbers, and how much both have in common is planted:

same         `few` follows what `many` follows, and a twentieth of the training rows have its label: `many` helps it
related      nine tenths in common (correlation .9), a tenth of its labels
apart        nothing in common, a twentieth of its labels
both_separately   nothing in common, all labels

5,000 training rows, 1,000 validation rows, 5,000 test rows. The truth of a task in such logs is its mean difference
over all of them, with its standard error. A call is wrong where it is `helps` or `harms` and the truth is not shown to
be that (by two standard errors), and where it is `not shown` although the truth is larger than four times half of the
interval. A run goes on from what --out holds. The last line is JSON: calls by kind of log and task, and how many are
right.
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mmoe_rec.experiments.compare import MetricVerdict, compare_variants
from mmoe_rec.experiments.runner import BASE_VARIANT, Variant
from mmoe_rec.settings.sections import Settings
from tests.log.plain_tables import plain_settings

NUMBERS, ROWS = 12, {"train": 5_000, "validation": 1_000, "test": 5_000}
KINDS = {"same": (1.0, 0.05), "related": (0.9, 0.1), "apart": (0.0, 0.05), "both_separately": (0.0, 1.0)}
"""Kind of log -> correlation of what tasks follow, and share of the training rows with a label of `few`."""


def draw_log(kind: str, seed: int) -> pa.Table:
    """The rows of all splits."""
    correlation, share = KINDS[kind]
    random, rows = np.random.default_rng(seed), sum(ROWS.values())
    x = random.normal(size=(rows, NUMBERS))

    def draw_cause() -> np.ndarray:
        hidden = np.maximum(x @ random.normal(size=(NUMBERS, 8)) / np.sqrt(NUMBERS), 0)
        cause = hidden @ random.normal(size=8)
        return (cause - cause.mean()) / cause.std()

    first, second = draw_cause(), draw_cause()
    causes = {"many": first, "few": correlation * first + np.sqrt(1 - correlation**2) * second}
    labels = {name: (2 * cause + random.logistic(size=rows) > 0).astype(float) for name, cause in causes.items()}
    split = np.repeat(list(ROWS), list(ROWS.values()))
    labels["few"][(split == "train") & (random.random(rows) >= share)] = np.nan
    return pa.table(
        {f"x{index}": item for index, item in enumerate(x.T)}
        | {"split": split}
        | {name: pa.array(item, from_pandas=True) for name, item in labels.items()}
    )


def settings_of(folder: Path, log: pa.Table) -> Settings:
    """A small mixture, with its log in a folder."""
    columns = [f"x{index}" for index in range(NUMBERS)]
    training = {"batch_size": 128, "epochs": 5, "learning_rate": 0.005, "threads": 1, "device": "cpu"}
    return plain_settings(
        folder,
        log,
        split={"column": "split"},
        roles={"candidate": columns},
        tasks={name: {"label": name, "objective": "engagement"} for name in ("many", "few")},
        features={name: {"kind": "numeric", "column": name} for name in columns},
        model={
            "bottom": {"units": [32], "piecewise": False, "cross_layers": 0},
            "experts": {"count": 4, "units": [16]},
            "towers": {"units": [8]},
        },
        training=training | {"precision": "fp32", "matmul_backend": "blas", "table_backend": "torch"},
        evaluation={"resamples": 200},
        tracking={"uri": f"sqlite:///{folder / 'mlflow.db'}"},
    )


def judge_log(kind: str, seed: int, seeds: int) -> list[dict[str, Any]]:
    """What is said about each task beside the other one, and by which difference."""
    with tempfile.TemporaryDirectory() as scratch:
        settings = settings_of(Path(scratch), draw_log(kind, seed))
        tasks = {"many": "few", "few": "many"}
        variants = [Variant(f"only {task}", without_tasks=(second,)) for task, second in tasks.items()]
        report = compare_variants(settings, [BASE_VARIANT, *variants], seeds)
    actual = []
    for task, result in zip(tasks, report.variants[1:], strict=True):
        cell = result.metric_means[result.verdict_metrics[0]]
        assert cell.difference is not None
        verdict = {MetricVerdict.WORSE: "helps", MetricVerdict.BETTER: "harms"}.get(cell.verdict, "not shown")
        half = (cell.difference.high - cell.difference.low) / 2
        actual.append(
            {"kind": kind, "seed": seed, "task": task, "call": verdict, "value": -cell.difference.value, "half": half}
        )
    return actual


def judge_calls(actual: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Kind of log and task -> calls, the truth, and how many calls are right."""
    groups = defaultdict(list)
    for item in actual:
        groups[f"{item['kind']}.{item['task']}"].append(item)
    for name, calls in groups.items():
        values = np.array([item["value"] for item in calls])
        truth, error = values.mean(), values.std(ddof=1) / np.sqrt(len(values))
        shown = {"helps": truth > 2 * error, "harms": truth < -2 * error}
        right = [shown.get(item["call"], abs(truth) <= 4 * item["half"]) for item in calls]
        counts = {call: sum(item["call"] == call for item in calls) for call in ("helps", "not shown", "harms")}
        half = float(np.median([item["half"] for item in calls]))
        yield name, {"truth": truth, "error": error, "half": half, **counts, "right": int(np.sum(right))}


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=60, help="after which no further log is begun")
    parser.add_argument("--out", type=Path, default=Path("structures.jsonl"))
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    actual = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    known = {item["seed"] for item in actual}
    for seed in range(options.logs):
        if seed not in known and time.monotonic() < end:
            new = judge_log([*KINDS][seed % len(KINDS)], seed, options.seeds)
            with options.out.open("a") as file:
                file.writelines(f"{json.dumps(item)}\n" for item in new)
            actual += new
    judged = dict(judge_calls(actual))
    for name, item in judged.items():
        print(f"{name}: {item}", flush=True)
    right, number = sum(value["right"] for value in judged.values()), len(actual)
    print(json.dumps({"logs": len({item["seed"] for item in actual}), "right": right / number, **judged}))


if __name__ == "__main__":
    main()
