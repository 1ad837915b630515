"""python -m tests.benchmarks.gates

What gates do on Complete Journey (`configs/complete_journey.yaml`, whose log has to be there), in trainings that differ
in seed and in one setting:

polarisation  soft gates without and with gate dropout of 0.1, ten seeds: the share of gates that give one expert more
              than 0.8 of their weight, and the accuracy;
lost_experts  what three of each of these models lose in AUC within users when one expert is left out;
balance       top-2 gates without balance, with the balance loss, with the selection bias and a z-loss, and soft gates
              with the loss, three seeds: entropy of the loads over log E, and the largest load over the mean;
random_k      top-4 gates, and gates of 1 to 4 experts drawn at each step, three seeds, both served with 4 ... 1.

Accuracy: on the first 50,000 or so rows of the test weeks, after one pass, at whose end the only validation is. Two
trainings of one thread run at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

CONFIG = "configs/complete_journey.yaml"
TEST_ROWS = 50_000
SOFT = {"dropout_0": ["--model.gates.dropout", "0"], "dropout_0.1": ["--model.gates.dropout", "0.1"]}
TOP = ["--model.gates.dropout", "0", "--model.gates.routing", "top_k", "--model.gates.top_k"]
BALANCE = {
    "top_2": [*TOP, "2"],
    "top_2_loss": [*TOP, "2", "--model.gates.balance", "loss"],
    "top_2_bias": [*TOP, "2", "--model.gates.balance", "bias", "--model.gates.z_loss", "0.001"],
    "soft_loss": ["--model.gates.dropout", "0", "--model.gates.balance", "loss"],
}
RANDOM = {"fixed_4": [*TOP, "4"], "random_1_to_4": [*TOP, "4", "--model.gates.random_top_k", "true"]}

Found = dict[str, Any]


def train_and_score(overrides: Sequence[str], ks: Sequence[int], masks: bool) -> Found:
    """One training: what its gates do on validation rows, and how well it ranks test rows in each way of scoring."""
    import torch

    from mmoe_rec.jobs.features import build_features
    from mmoe_rec.model.layout import ModelLayout
    from mmoe_rec.model.mmoe import build_model
    from mmoe_rec.model.tables import plain_tables
    from mmoe_rec.settings.load import load_settings
    from mmoe_rec.training.checkpoint import load_plain
    from mmoe_rec.training.loop import Trainer
    from mmoe_rec.training.ranks import process_group

    settings = load_settings(CONFIG, list(overrides))
    prepared, device = build_features(settings), torch.device("cpu")
    layout = ModelLayout.of(prepared.layout, settings)
    with tempfile.TemporaryDirectory() as folder, process_group(device):
        result = Trainer(
            prepared, layout, settings.model, settings.training, device, Path(folder), lambda metrics, step: None
        ).run()
        model = build_model(layout, settings.model, plain_tables(layout))
        load_plain(model, result.best_checkpoint)
    assert result.best is not None
    experts = result.best.experts
    found: Found = {
        "polarised": experts.polarised,
        "entropy": experts.entropy,
        "max_over_mean": experts.max_over_mean,
        "whole": gauc(model, layout, prepared.split("test")),
        "by_k": {k: gauc(model, layout, prepared.split("test"), top_k=k) for k in ks},
    }
    if masks:
        usable = ~torch.eye(settings.model.experts.count, dtype=torch.bool)
        found["without"] = [gauc(model, layout, prepared.split("test"), usable=each) for each in usable]
    return found


def gauc(model: Any, layout: Any, folder: Path, **options: Any) -> dict[str, float]:
    """AUC within users of each task, and its calibration."""
    from mmoe_rec.batches.encoded_rows import EncodedRows
    from mmoe_rec.evaluation.scoring import score_rows
    from mmoe_rec.evaluation.summary import summarise

    scored = score_rows(model, layout, EncodedRows(folder, layout), 16_384, first=TEST_ROWS, **options)
    tasks = summarise(scored.measure(), resamples=20)["tasks"]
    return {name: group["gauc_user"]["value"] for name, group in tasks.items()} | {
        f"{name}_calibration": group["calibration"]["value"] for name, group in tasks.items()
    }


def run(name: str, overrides: Sequence[str], seed: int, ks: Sequence[int] = (), masks: bool = False) -> Found:
    """One training in a process of its own."""
    always = ["--training.validations_per_epoch", "1", "--training.seed", str(seed)]
    stage = json.dumps([[*overrides, *always], list(ks), masks])
    command = [sys.executable, "-m", "tests.benchmarks.gates", "--stage", stage]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if finished.returncode != 0:
        raise SystemExit(f"{name}, seed {seed}: {finished.stderr[-2000:]}")
    found: Found = json.loads(finished.stdout.splitlines()[-1])
    print(f"{name} seed {seed}: polarised {found['polarised']}, {found['whole']}", flush=True)
    return found


def benchmark(seeds: int) -> Found:
    """All trainings, two at a time."""
    from mmoe_rec.jobs.features import build_features
    from mmoe_rec.settings.load import load_settings

    build_features(load_settings(CONFIG, []))
    several = range(3)
    with ThreadPoolExecutor(2) as pool:
        soft = {
            name: [pool.submit(run, name, overrides, seed, (), seed in several) for seed in range(seeds)]
            for name, overrides in SOFT.items()
        }
        balance = {
            name: [pool.submit(run, name, overrides, seed) for seed in several] for name, overrides in BALANCE.items()
        }
        random = {
            name: [pool.submit(run, name, overrides, seed, (4, 3, 2, 1)) for seed in several]
            for name, overrides in RANDOM.items()
        }
    return {
        "polarisation": {name: _polarisation([each.result() for each in found]) for name, found in soft.items()},
        "lost_experts": {name: _lost(each.result() for each in found[:3]) for name, found in soft.items()},
        "balance": {name: _balance([each.result() for each in found]) for name, found in balance.items()},
        "random_k": {name: _by_k([each.result() for each in found]) for name, found in random.items()},
    }


def _polarisation(found: Sequence[Found]) -> Found:
    flags = np.array([each["polarised"] for each in found])
    return {
        "trainings": len(found),
        "share_of_gates": float(flags.mean()),
        "share_of_trainings": float(flags.any(1).mean()),
        "gauc": _mean(each["whole"] for each in found),
    }


def _lost(found: Iterable[Found]) -> list[dict[str, list[float]]]:
    """Of each model, task -> the loss in AUC within users without each expert."""
    return [
        {
            task: [round(each["whole"][task] - without[task], 5) for without in each["without"]]
            for task in each["whole"]
            if not task.endswith("_calibration")
        }
        for each in found
    ]


def _balance(found: Sequence[Found]) -> Found:
    return {name: [round(each[name], 4) for each in found] for name in ("entropy", "max_over_mean")} | {
        "gauc": _mean(each["whole"] for each in found)
    }


def _by_k(found: Sequence[Found]) -> Found:
    return {k: _mean(each["by_k"][k] for each in found) for k in found[0]["by_k"]} | {
        "seeds_at_1": [each["by_k"]["1"] for each in found]
    }


def _mean(found: Iterable[Mapping[str, float]]) -> dict[str, float]:
    rows = list(found)
    return {name: round(float(np.mean([row[name] for row in rows])), 5) for name in rows[0]}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="trainings with and without dropout (default: 10)")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        print(json.dumps(train_and_score(*json.loads(options.stage))))
    else:
        print(json.dumps(benchmark(options.seeds)))


if __name__ == "__main__":
    main()
