"""python -m pipelines.quickstart

The whole way on real data: Complete Journey is turned into a log, features are fitted, a multi-gate mixture of experts
is trained, registered in MLflow, evaluated on later weeks beside two baselines trained on the same rows, and ranks one
candidate list. `--fast` does it on a slice of the households, as a smoke test.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmoe_rec.errors import exit_with_message
from pipelines.data_sets.sampled_log import command_parser

if TYPE_CHECKING:
    from mmoe_rec.settings.sections import Settings

CONFIG = "configs/complete_journey.yaml"
FAST_HOUSEHOLDS = 300


def quickstart_settings(fast: bool, out: Path, overrides: Sequence[str] = ()) -> Settings:
    """The settings of the quickstart: those of Complete Journey, in another folder, smaller for a slice."""
    from mmoe_rec.settings.load import load_settings

    paths = [f"--data.log={out}/log", f"--data.events.purchases.path={out}/purchases", f"--data.work={out}/work"]
    small = ["--evaluation.resamples", "200", "--name", "complete_journey_fast"]
    return load_settings(CONFIG, [*paths, *(small if fast else []), *overrides])


@exit_with_message()
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = command_parser("python -m pipelines.quickstart", __doc__)
    parser.add_argument("--fast", action="store_true", help=f"a slice of {FAST_HOUSEHOLDS} households, under 2 minutes")
    parser.add_argument("--out", metavar="DIR", help="folder of the log and all that is made from it")
    options, overrides = parser.parse_known_args(argv)
    out = Path(options.out or ("data/complete_journey_fast" if options.fast else "data/complete_journey"))
    settings = quickstart_settings(options.fast, out, overrides)
    from mmoe_rec.cli.main import show
    from mmoe_rec.inference.artifact import EXAMPLE, read_example
    from mmoe_rec.inference.ranker import Ranker
    from mmoe_rec.jobs.baselines import measure_baselines
    from mmoe_rec.jobs.evaluate import evaluate_model
    from mmoe_rec.jobs.train import train_model
    from mmoe_rec.locks import reading
    from mmoe_rec.progress import open_console
    from mmoe_rec.report.tables import describe_training, show_results

    console = open_console()
    started = time.perf_counter()
    console.rule("1/5  Complete Journey as an interaction log")
    ingest_log(out, options.fast)
    console.rule("2/5  features, training, registration")
    trained = train_model(settings)
    assert trained is not None, "the quickstart runs in one process"
    show(describe_training(trained, settings))
    console.rule("3/5  evaluation on later weeks")
    with reading(Path(settings.data.work) / "features", "a quickstart"):
        evaluated = evaluate_model(settings, trained.address, Path(settings.data.work) / "evaluation")
        console.rule("4/5  two baselines on the same rows and features")
        results = measure_baselines(settings, Path(settings.data.work) / "baselines", evaluated, "MMoE")
    console.rule("5/5  one candidate list")
    request, example = read_example(trained.artifact), trained.artifact / EXAMPLE
    ranking = Ranker.load(trained.artifact).rank(**request)
    console.print(f"household {request['user']}, {request['context']}")
    for position, (candidate, score) in enumerate(zip(ranking.candidates, ranking.scores, strict=True), start=1):
        console.print(f"  {position}. product {candidate}  score {score:.4f}")
    show(show_results(results))
    print(f"report: {Path(settings.data.work) / 'baselines' / 'report.html'}")
    print(f"{time.perf_counter() - started:.0f} s in all")
    _next_commands(settings, trained.address, example)


def ingest_log(out: Path, fast: bool) -> None:
    from pipelines.data_sets.complete_journey import packaged_folder
    from pipelines.ingest_complete_journey import Selection, ingest

    if (out / "log").is_dir() and (out / "purchases").is_dir():
        print(f"{out / 'log'} is there already")
        return
    ingest(packaged_folder(), out, Selection(households=FAST_HOUSEHOLDS if fast else None))


def _next_commands(settings: Settings, address: str, example: Path) -> None:
    print("\nnext:")
    uri = settings.tracking.address
    print(f"  MLFLOW_TRACKING_URI={shlex.quote(uri)} mlflow models serve -m {address} --env-manager local -p 5001")
    print(f"  curl -s localhost:5001/invocations -H 'Content-Type: application/json' -d @{shlex.quote(str(example))}")
    served = uri.startswith(("http://", "https://"))
    print(f"  see the runs at {uri}" if served else f"  mlflow ui --backend-store-uri {shlex.quote(uri)}")


if __name__ == "__main__":
    main()
