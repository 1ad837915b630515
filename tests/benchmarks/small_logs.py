"""python -m tests.benchmarks.small_logs

Do unused experts and gates that settle on one matter on a small log? Trainings on a synthetic log and on the slice of
Complete Journey of `pipelines.quickstart --fast`, which differ in seed and in the settings of gates and experts: how
many experts are dead and gates have collapsed, how good the model is on the test rows, and what it loses in AUC, of the
task that loses most, without its least used expert and without its most used one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mmoe_rec.settings.sections import Settings

TOP = ["--model.gates.routing", "top_k", "--model.gates.top_k", "2"]
WAYS = {
    "as shipped": [],  # the slice's gates have dropout
    "gate dropout .1": ["--model.gates.dropout", "0.1"],
    "balance loss": ["--model.gates.balance", "loss"],
    "2 experts": ["--model.experts.count", "2"],
    "top 2": TOP,
    "top 2, balance loss": [*TOP, "--model.gates.balance", "loss"],
}


def train_and_score(prepared: Any, settings: Settings) -> dict[str, float]:
    """One training, and what its model does on the test rows."""
    import torch

    from mmoe_rec.batches.encoded_rows import EncodedRows
    from mmoe_rec.evaluation.scoring import score_rows
    from mmoe_rec.evaluation.summary import summarise
    from mmoe_rec.model.mmoe import build_model
    from mmoe_rec.model.tables import plain_tables
    from mmoe_rec.training.checkpoint import load_plain
    from mmoe_rec.training.loop import Trainer
    from mmoe_rec.training.ranks import process_group

    device, layout = torch.device("cpu"), prepared.layout
    with tempfile.TemporaryDirectory() as folder, process_group(device):
        trainer = Trainer(prepared, settings.model, settings.training, device, Path(folder), lambda *_: None)
        result = trainer.run()
        model = build_model(layout, settings.model, plain_tables(layout))
        load_plain(model, result.best_checkpoint)
    assert result.best is not None
    experts, test = result.best.experts, EncodedRows(prepared.split("test"), layout)

    def auc(usable: torch.Tensor | None = None) -> dict[str, float]:
        tasks = summarise(score_rows(model, layout, test, 16_384, usable=usable).measure(), 20)["tasks"]
        return {name: group["auc"]["value"] for name, group in tasks.items()}

    whole, loads = auc(), experts.total_loads
    lost = {}
    for name, expert in (("least", int(loads.argmin())), ("most", int(loads.argmax()))):
        without = auc(torch.arange(len(loads)) != expert)
        lost[f"lost without the {name} used"] = max(whole[task] - without[task] for task in whole)
    dead = int((loads < 0.05 * loads.mean()).sum())
    return {"dead": dead, "collapsed": sum(experts.polarised), **whole, **lost}


def logs(folder: Path, rows: int) -> Iterator[tuple[str, Callable[[Sequence[str]], Settings]]]:
    """Each log's name, and what makes its settings of overrides."""
    from mmoe_rec.settings.load import load_settings
    from pipelines import make_synthetic_log
    from pipelines.data_sets.complete_journey import packaged_folder
    from pipelines.ingest_complete_journey import Selection, ingest
    from pipelines.quickstart import FAST_HOUSEHOLDS, quickstart_settings

    make_synthetic_log.main(["--out", f"{folder}/log", "--rows", str(rows)])
    paths = ["--data.log", f"{folder}/log", "--data.work", f"{folder}/work", "--training.batch_size", "512"]
    yield "synthetic", lambda overrides: load_settings("configs/synthetic.yaml", [*paths, *overrides])
    ingest(packaged_folder(), folder / "slice", Selection(households=FAST_HOUSEHOLDS))
    yield "slice", lambda overrides: quickstart_settings(True, folder / "slice", overrides)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=40_000, help="of the synthetic log")
    parser.add_argument("--seeds", type=int, default=4)
    options = parser.parse_args()
    from mmoe_rec.jobs.features import build_features

    with tempfile.TemporaryDirectory() as folder:
        for log, settings in logs(Path(folder), options.rows):
            prepared = build_features(settings([]))
            for name, overrides in WAYS.items():
                seeds = [["--training.seed", str(seed)] for seed in range(options.seeds)]
                runs = [train_and_score(prepared, settings([*overrides, *seed])) for seed in seeds]
                means = {key: round(float(np.mean([run[key] for run in runs])), 4) for key in runs[0]}
                spread = {f"{key} +-": round(float(np.std([run[key] for run in runs], ddof=1)), 4) for key in runs[0]}
                print(json.dumps({"log": log, "way": name, **means, **spread}), flush=True)


if __name__ == "__main__":
    main()
