"""python -m tests.benchmarks.census [--seeds 10] [--peer-seeds 3] [--work FOLDER] [--source FOLDER] [--pairs income]

Census-Income by the protocol of the mixture-of-experts paper (Ma et al., KDD 2018): the first file trains, half of the
second one validates and half tests; `education`, `marital_status` and `instance_weight` are no inputs. Two pairs of
tasks, income or education (some college or more) beside never married. Six structures of this project's model, all by
`configs/census_income.yaml` and each with several seeds (`mmoe-rec train --seeds`):

single     one network for the task alone            omoe   experts, one gate for both tasks
shared     a shared bottom (one expert of all tasks)  mmoe   experts, a gate for each task
cgc        shared experts and some of each task       ple    the same, two levels of them

and beside them torch-rechub and DeepCTR-Torch (their own loops, on the same encoded rows, best of --epochs epochs by
validation; mean and range of their seeds), gradient-boosted trees (on the same rows), and what the paper says. The
state that is measured is chosen on validation rows; intervals join seeds and rows. The mixture is compared with the
other structures of both tasks over all seeds, on the same redrawn rows. A run that was stopped goes on.

The last line is JSON: pair -> model -> mean, low and high of the test AUC of income or education.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mmoe_rec.settings.load import load_settings
from mmoe_rec.settings.sections import Settings
from tests.benchmarks.peers.environment import PEERS, peers_environment, predict, write_rows_once

CONFIG = "configs/census_income.yaml"
RAW = os.environ.get("MMOE_REC_CENSUS", "../shared/data/census")
PAIRS = {"income": "income", "education": "college"}
"""Name of the first task of a pair, and its label."""

# As many expert units in the first layer as the others, but one expert.
_ONE = {"count": 1, "units": [512, 128]}
_OF_TASKS = {"count": 4, "task_count": 2}
STRUCTURES: dict[str, dict[str, Any]] = {
    "single": {"experts": _ONE},
    "shared": {"experts": _ONE},
    "omoe": {"gates": {"per_task": False}},
    "mmoe": {},
    "cgc": {"experts": _OF_TASKS},
    "ple": {"experts": _OF_TASKS | {"levels": 2}},
}
PAPER = {  # best / mean AUC of 400 trainings
    "income": {
        "single": (0.9398, 0.9337),
        "shared": (0.9361, 0.9295),
        "omoe": (0.9387, 0.9319),
        "mmoe": (0.9410, 0.9359),
    },
    "education": {
        "single": (0.8843, 0.8792),
        "shared": (0.8836, 0.8813),
        "omoe": (0.8852, 0.8813),
        "mmoe": (0.8860, 0.8826),
    },
}


def settings_of(work: Path, pair: str, structure: str) -> Settings:
    """Those of a structure, with a folder and a store of its own."""
    tree = load_settings(CONFIG).model_dump(mode="json")
    tree["tasks"]["income"]["label"] = PAIRS[pair]
    tasks = {pair: tree["tasks"]["income"], "never_married": tree["tasks"]["never_married"]}
    tree["tasks"] = {pair: tasks[pair]} if structure == "single" else tasks
    tree["model"]["trees"] = None  # structures of the network are compared
    for section, values in STRUCTURES[structure].items():
        tree["model"][section] |= values
    own = work / pair / structure
    tree["name"] = f"census_{pair}"
    tree["data"] |= {"log": str(work / "log"), "work": str(own), "workers": 1}
    tree["training"] |= {"threads": 1, "device": "cpu", "products": "blas", "tables": "fbgemm"}
    tree["tracking"]["uri"] = f"sqlite:///{own / 'mlflow.db'}"
    return Settings.model_validate(tree)


def train(work: Path, pair: str, structure: str, seeds: int) -> None:
    """Trains a structure with all seeds, or goes on with what is there; prints its metric as JSON."""
    from mmoe_rec.jobs.seeds import train_seeds

    settings = settings_of(work, pair, structure)
    Path(settings.data.work).mkdir(parents=True, exist_ok=True)
    found = train_seeds(settings, seeds, resume=True)
    print(json.dumps(asdict(found.summary[pair]["auc"])))


def differences(work: Path, pair: str, seeds: int) -> Iterator[str]:
    """How the mixture's mean AUC differs from that of each other structure of both tasks, as sentences."""
    from mmoe_rec.jobs.seeds import train_seeds

    others = [each for each in STRUCTURES if each not in ("mmoe", "single")]
    against = [settings_of(work, pair, each).data.work for each in others]
    found = train_seeds(settings_of(work, pair, "mmoe"), seeds, resume=True, against=against)
    for name, each in found.against.items():
        apart = asdict(each.groups[pair]["auc"])
        told = "no interval"
        if apart["low"] is not None:
            told = f"{apart['low']:+.5f} to {apart['high']:+.5f}; p {apart['p_corrected']:.2g}, corrected"
        yield f"{pair}: mmoe less {name} {apart['value']:+.5f} ({told})"


def trees(work: Path, pair: str) -> dict[str, float]:
    """Gradient-boosted trees on the same encoded rows."""
    from mmoe_rec.jobs.baselines import TREES, measure_baselines

    results = measure_baselines(settings_of(work, pair, "mmoe"), work / pair / "baselines")
    area = results.models[TREES].summary.tasks[pair].get("auc")
    return {"mean": area.value, "low": area.low, "high": area.high}


def peer(work: Path, pair: str, name: str, python: str, seeds: int, epochs: int) -> dict[str, Any]:
    """Mean and range of a peer's seeds on the same encoded rows."""
    from sklearn.metrics import roc_auc_score

    folder = work / pair / "rows"
    write_rows_once(settings_of(work, pair, "mmoe"), folder)
    labels = np.load(folder / "test.labels.npy")[:, 0]
    outs = [work / pair / f"{name}-{seed}.npy" for seed in range(seeds)]
    predicted = [predict(python, name, folder, out, epochs, seed, OMP_NUM_THREADS="1") for seed, out in enumerate(outs)]
    found = [float(roc_auc_score(labels, each[:, 0])) for each in predicted]
    return {"mean": float(np.mean(found)), "low": min(found), "high": max(found), "values": found}


def _stage(work: Path, pair: str, structure: str, seeds: int) -> dict[str, Any]:
    words = ["--stage", structure, "--pairs", pair, "--seeds", str(seeds), "--work", str(work)]
    log = work / f"{pair}-{structure}.log"
    with log.open("a", encoding="utf-8") as told:
        command = [sys.executable, "-m", "tests.benchmarks.census", *words]
        finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=told, text=True, check=False)
    if finished.returncode != 0:
        raise SystemExit(f"training {structure} for {pair} failed: see {log}")
    found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    print(f"{pair:10} {structure:8} {found['mean']:.5f} ({found['low']:.5f} to {found['high']:.5f})", flush=True)
    return found


def benchmark(work: Path, pairs: Sequence[str], seeds: int, peer_seeds: int, epochs: int) -> dict[str, dict[str, Any]]:
    """Runs what is not there yet; gives what was found, pair -> model -> AUC."""
    first = ("mmoe", *(each for each in STRUCTURES if each != "mmoe"))
    asked = [(pair, structure) for structure in first for pair in pairs]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        made = list(pool.map(lambda each: _stage(work, *each, seeds), asked))
    found: dict[str, dict[str, Any]] = {pair: {} for pair in pairs}
    for (pair, structure), each in zip(asked, made, strict=True):
        found[pair][structure] = each
    for pair in pairs:
        for sentence in differences(work, pair, seeds):
            print(sentence, flush=True)
        found[pair]["trees"] = trees(work, pair)
    if peer_seeds:
        python = peers_environment()
        for pair in pairs:
            for name in PEERS:
                found[pair][name] = peer(work, pair, name, python, peer_seeds, epochs)
    return found


def told(found: dict[str, dict[str, Any]]) -> Iterator[Any]:
    """Tables for the terminal."""
    from rich.table import Table

    for pair, models in found.items():
        table = Table(title=f"test AUC of {pair}", title_justify="left")
        for name in ("", "mean", "low", "high", "between trainings", "paper's best", "paper's mean"):
            table.add_column(name, justify="right" if name else "left")
        for name in (*STRUCTURES, *(each for each in models if each not in STRUCTURES)):
            if name not in models:
                continue
            each, paper = models[name], PAPER[pair].get(name)
            spread = each.get("between_trainings") or (np.std(each["values"], ddof=1) if "values" in each else None)
            cells = [each["mean"], each["low"], each["high"], spread, *(paper or (None, None))]
            table.add_row(name, *("-" if cell is None else f"{cell:.4f}" for cell in cells))
        yield table


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path(RAW), help="folder of the published files (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "mmoe_rec_census"))
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--peer-seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5, help="of the peers (%(default)s)")
    parser.add_argument("--stage", choices=STRUCTURES, help="train only this structure, in this process")
    asked = parser.parse_args()
    if asked.stage is not None:
        train(asked.work, asked.pairs[0], asked.stage, asked.seeds)
        return
    if not (asked.work / "log").is_dir():
        from pipelines.ingest_census_income import ingest

        ingest(asked.source, asked.work, seed=17)
    from rich.console import Console

    found = benchmark(asked.work, asked.pairs, asked.seeds, asked.peer_seeds, asked.epochs)
    for table in told(found):
        Console().print(table)
    kept = ("mean", "low", "high")
    print(json.dumps({p: {n: {k: round(e[k], 5) for k in kept} for n, e in m.items()} for p, m in found.items()}))


if __name__ == "__main__":
    main()
