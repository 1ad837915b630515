"""python -m tests.benchmarks.plan --encoded WORK/features/encoded

Does `mmoe-rec plan --measure` say what then is? Trainings on the rows of `tests.benchmarks.training`, each foretold
from fifty steps in a process of its own, and then run, in turns: rows a second and seconds (the best of `--repeats`
counts, of either), bytes of tables and optimizer that each rank holds, and the most memory of the first process.
`--processor-time` counts the processor's seconds, which say more where other programs come and go.

`--encoded` reads the encoded training rows of a folder besides, as `plan` does: rows a second of a core (the processor
time of all threads counts), by ranks and rows of a batch, and the cores that 1.2 million rows a second would keep busy.
"""

import argparse
import itertools
import json
import os
import resource
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.benchmarks.peers.environment import run

ROWS = 60 * 4096
STEPS = 50
NODE = 1_200_000
"""Rows a second of eight GPUs that train TorchRec's DLRM in batches of 131,072."""


@dataclass(frozen=True)
class Case:
    """A training of five. model, training: settings other than those of `tests.benchmarks.training_ours`."""

    table_rows: int = 50_000
    ranks: int = 1
    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


CASES = {
    "as in `training`": Case(),
    "batches of 512": Case(training={"batch_size": 512}),
    "tables of 500,000 rows": Case(500_000),
    "16 experts, two of them a row": Case(
        model={"experts": {"count": 16, "units": [128, 64]}, "gates": {"routing": "top_k", "top_k": 2}}
    ),
    "two ranks": Case(ranks=2),
}


def stage(kind: str, name: str, folder: Path, clock: str) -> dict[str, Any] | None:
    """What is foretold of a case, or what it took, on the first rank."""
    import torch
    import torch.distributed as dist

    from mmoe_rec.model.layout import ModelLayout
    from mmoe_rec.model.mmoe import build_model
    from mmoe_rec.model.tables import torchrec_tables
    from mmoe_rec.preprocessing.prepare import FeatureFolder
    from mmoe_rec.training import loop
    from mmoe_rec.training.planning import Machines, Planning
    from mmoe_rec.training.ranks import process_group
    from tests.benchmarks.training_ours import MODEL, TRAINING
    from tests.training.ranks import held_bytes

    seconds_now = getattr(time, clock)
    loop.time = SimpleNamespace(perf_counter=seconds_now)  # type: ignore[attr-defined]
    case, device, layout = CASES[name], torch.device("cpu"), ModelLayout.read(folder)
    model = MODEL.model_validate(MODEL.model_dump() | case.model)
    training = TRAINING.model_validate(TRAINING.model_dump() | case.training)
    with tempfile.TemporaryDirectory() as scratch, process_group(device) as ranks:
        trainer = loop.Trainer(FeatureFolder(folder), layout, model, training, device, Path(scratch), lambda *_: None)
        if kind == "foretell":
            forecast = trainer.measure(STEPS)
            rows_per_s, seconds = forecast.rows_per_s, forecast.seconds
            machines = Machines(
                case.ranks, case.ranks, "cpu", 0, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            )
            paper = build_model(layout, model, torchrec_tables(layout, torch.device("meta")))
            planning = Planning(layout, machines, trainer.reader.rank_rows)
            tables = [each.tables for each in planning.on_paper(paper)[1]]
        else:
            start = seconds_now()
            rows_per_s, seconds = trainer.run().rows_per_s, seconds_now() - start
            tables = [0] * case.ranks
            dist.all_gather_object(tables, held_bytes(trainer.sharded))
        memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"rows_per_s": rows_per_s, "seconds": seconds, "tables": tables, "memory": memory}
    return found if ranks.first else None


def compare(name: str, folder: Path, repeats: int, clock: str) -> dict[str, Any]:
    """What was foretold of a case / what then was, and the latter."""
    case = CASES[name]
    start = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"] if case.ranks > 1 else []
    words = [sys.executable, "-m", *start, "tests.benchmarks.plan", "--stage"]
    turns = [[run([*words, kind, name, str(folder), clock]) for kind in ("foretell", "train")] for _ in range(repeats)]
    told, then = (min(each, key=lambda one: one["seconds"]) for each in zip(*turns, strict=True))
    ratios = {each: round(told[each] / then[each], 3) for each in ("rows_per_s", "seconds", "memory")}
    ratios |= {"tables": [round(each / other, 3) for each, other in zip(told["tables"], then["tables"], strict=True)]}
    print(f"{name:30} {ratios}", flush=True)
    return {"predicted_over_observed": ratios, "observed": then}


def read(encoded: Path) -> dict[str, Any]:
    """Rows a second of a core, and the cores of a node, by ranks of a machine and rows of a batch of all."""
    from mmoe_rec.cli.plan import measure_reading
    from mmoe_rec.features.layout import Layout
    from mmoe_rec.training.planning import Machines

    rates = {}
    for ranks, rows in itertools.product((1, 2, 4, 8), (4096, 131_072)):
        machines = Machines(ranks, ranks, "cpu", 0, 0)
        rate = measure_reading(encoded / "train", Layout.read(encoded), rows // ranks, 2**18, machines)
        rates[f"{ranks} ranks, {rows:,} rows"] = rate
    return {name: {"rows_per_s": round(rate), "cores_of_a_node": round(NODE / rate, 2)} for name, rate in rates.items()}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoded", type=Path, help="encoded rows of built features")
    parser.add_argument("--processor-time", action="store_true", help="count the processor's seconds")
    parser.add_argument("--repeats", type=int, default=2, help="turns of each case (default: %(default)s)")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES), help="default: all")
    parser.add_argument("--stage", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        if found := stage(*options.stage[:2], Path(options.stage[2]), options.stage[3]):
            print(json.dumps(found))
        return
    clock = "process_time" if options.processor_time else "perf_counter"
    found = {} if options.encoded is None else {"reading": read(options.encoded)}
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.cases:
            folder = Path(scratch, str(CASES[name].table_rows))
            if not folder.exists():
                from tests.benchmarks.training import write_rows

                write_rows(ROWS, CASES[name].table_rows, folder)
            found[name] = compare(name, folder, options.repeats, clock)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
