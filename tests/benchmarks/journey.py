"""python -m tests.benchmarks.journey [--fast] [--work FOLDER] [--epochs 2]

How much of the quickstart's result is features, and how much the model? torch-rechub's and DeepCTR-Torch's multi-gate
mixtures are trained by their own loops on Complete Journey, on the very rows and encoded features of the quickstart,
and once more on what a row itself says, without counters and histories. The test rows are predicted by all:

features    a peer with our features less the same peer without
model       ours less a peer with our features, or less gradient-boosted trees

as differences of AUC with 95% intervals from a paired bootstrap over households, in the report of an evaluation
(`--work`/report/report.html). The peers can't leave out labels that are not known, so a training of their own on the
rows that were bought predicts `rebought`. Their state after the best of --epochs epochs, by validation, counts; with
--epochs 0 there are trees alone. A run that was stopped goes on.

The last line is JSON: task -> comparison -> value, low and high.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmoe_rec.evaluation.comparison import Results
from mmoe_rec.evaluation.summary import MeasuredModel
from mmoe_rec.jobs.baselines import TREES, measure_baselines
from mmoe_rec.jobs.evaluate import evaluate_model
from mmoe_rec.jobs.train import train_model
from mmoe_rec.settings.sections import Settings
from pipelines.quickstart import ingest_log, quickstart_settings
from tests.benchmarks.peers.environment import PEERS, peers_environment, predict, write_rows_once

if TYPE_CHECKING:
    from mmoe_rec.evaluation.scoring import ScoredRows

OURS = "ours"
FEATURES = {"our features": True, "the row alone": False}
"""What a peer is given -> whether counters and histories are part of it."""


def predicted(work: Path, settings: Settings, epochs: int) -> dict[str, np.ndarray]:
    """What each peer predicts of the test rows with each choice of features, (N, T)."""
    found: dict[str, np.ndarray] = {}
    if not epochs:
        return found
    python = peers_environment()
    for given, remembered in FEATURES.items():
        rows = work / "peers" / given.replace(" ", "_")
        write_rows_once(settings, rows, remembered=remembered)
        for peer in PEERS:
            found[f"{peer}, {given}"] = predict(python, peer, rows, rows / f"{peer}.npy", epochs)
    return found


def measured(settings: Settings, scored: ScoredRows) -> MeasuredModel:
    """A peer's metrics, without slices and trade-offs."""
    from mmoe_rec.evaluation.summary import summarise

    sums = scored.measure()
    return MeasuredModel(sums, summarise(sums, settings.evaluation.resamples))


def parts(settings: Settings, models: Mapping[str, MeasuredModel]) -> dict[str, dict[str, dict[str, float]]]:
    """Task -> what is compared -> difference of AUC, `value`, `low` and `high`."""

    def apart(one: str, other: str) -> Results:
        both = {name: models[name] for name in (one, other)}
        return Results(both, tuple(settings.tasks), settings.evaluation, "", {})

    pairs = {"model, beside trees": apart(OURS, TREES)}
    for peer in PEERS:
        with_features, without = (f"{peer}, {given}" for given in FEATURES)
        if with_features in models:
            pairs[f"features, by {peer}"] = apart(with_features, without)
            pairs[f"model, beside {peer}"] = apart(OURS, with_features)
    found: dict[str, dict[str, dict[str, float]]] = {task: {} for task in settings.tasks}
    for name, results in pairs.items():
        (against,) = results.comparison.against.values()
        for task in settings.tasks:
            each = asdict(against.groups[task]["auc"])
            found[task][name] = {end: round(each[end], 5) for end in ("value", "low", "high")}
    return found


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="the quickstart's slice of households")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "mmoe_rec_journey"))
    parser.add_argument("--epochs", type=int, default=2, help="of the peers (%(default)s)")
    asked = parser.parse_args()
    work = asked.work / ("fast" if asked.fast else "whole")
    settings = quickstart_settings(asked.fast, work, ["--tracking.uri", f"sqlite:///{work / 'mlflow.db'}"])
    if not (work / "log").is_dir():
        ingest_log(work, asked.fast)
    if not (Path(settings.data.work) / "model").is_dir():
        train_model(settings)
    evaluated = evaluate_model(settings, str(Path(settings.data.work) / "model"), work / "evaluation")
    found = predicted(work, settings, asked.epochs)
    trees = measure_baselines(settings, work / "baselines", evaluated, OURS).models[TREES]
    models = {OURS: measured(settings, evaluated.scored), TREES: trees}
    models |= {n: measured(settings, evaluated.scored.with_predictions(each)) for n, each in found.items()}
    compared = parts(settings, models)
    facts = dict(evaluated.results.facts)
    for task, differences in compared.items():
        for name, each in differences.items():
            facts[f"{task}: {name}"] = f"{each['value']:+.4f} AUC ({each['low']:+.4f} to {each['high']:+.4f})"
    results = Results(
        models, tuple(settings.tasks), settings.evaluation, "Features and models on Complete Journey", facts
    )
    from rich.console import Console

    from mmoe_rec.report.evaluation import write_results
    from mmoe_rec.report.tables import show_results

    write_results(results, work / "report")

    for part in show_results(results):
        Console(width=160).print(part)
    print(f"report: {work / 'report' / 'report.html'}")
    print(json.dumps(compared))


if __name__ == "__main__":
    main()
