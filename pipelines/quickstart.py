"""python -m pipelines.quickstart

Run all steps on real data. The quickstart builds features from a log of grocery shopping (Complete Journey). It trains
a multi-gate mixture of experts, registers it in MLflow, evaluates it on later weeks and ranks one candidate list.
The log has 300 households, and the run takes about a minute. The commands of the guides continue from there.

`--full` uses all 2,469 households and a separate folder, and compares the model with baselines on the same rows, like
the results in the README.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmoe_rec.errors import exit_with_message
from pipelines.data_sets.ingest_common import command_parser

if TYPE_CHECKING:
    from mmoe_rec.evaluation.summary import Summary
    from mmoe_rec.settings.sections import Settings

CONFIG = "configs/complete_journey.yaml"
HOUSEHOLDS = 300
"""Number of households in the small log."""


def quickstart_settings(full: bool, out: Path, overrides: Sequence[str] = ()) -> Settings:
    """Return the settings of Complete Journey with paths below `out`.

    Args:
        full: Whether the log has all households. The model then has a different name.
        out: Folder of the log and of all outputs.
        overrides: Settings as on the command line, such as `["--training.epochs", "2"]`.
    """
    from mmoe_rec.settings.load import load_settings

    paths = [f"--data.log={out}/log", f"--data.events.purchases.path={out}/purchases", f"--data.work_dir={out}/work"]
    return load_settings(CONFIG, [*paths, *(["--name", "complete_journey_full"] if full else []), *overrides])


@exit_with_message()
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with the arguments `argv`. None stands for the arguments of the process."""
    parser = command_parser("python -m pipelines.quickstart", __doc__)
    parser.add_argument("--full", action="store_true", help="all households, and baselines on the same rows")
    parser.add_argument("--out", metavar="DIR", help="folder of the log and of all outputs")
    options, overrides = parser.parse_known_args(argv)
    out = Path(options.out or ("data/complete_journey_full" if options.full else "data/complete_journey"))
    settings = quickstart_settings(options.full, out, overrides)
    from mmoe_rec.cli.main import show, show_report
    from mmoe_rec.evaluation.evaluate import evaluate_model
    from mmoe_rec.evaluation.results_report import make_report
    from mmoe_rec.inference.artifact import EXAMPLE_FILE, read_example
    from mmoe_rec.inference.ranker import Ranker
    from mmoe_rec.locks import read_lock
    from mmoe_rec.progress import open_console
    from mmoe_rec.training import training_report
    from mmoe_rec.training.baselines import measure_baselines
    from mmoe_rec.training.train import train_model

    console = open_console()
    started = time.perf_counter()
    console.rule("Complete Journey as an interaction log")
    _ingest_log(out, options.full)
    console.rule("Features, training, registration")
    trained = train_model(settings)
    assert trained is not None, "the quickstart runs in one process"
    show_report(training_report.make_report(trained, settings))
    console.rule("Evaluation on later weeks")
    work = Path(settings.data.work_dir)
    with read_lock(work / "features", "a quickstart"):
        evaluated = evaluate_model(settings, trained.model_uri, work / "evaluation")
        if options.full:
            show_report(make_report(measure_baselines(settings, work / "baselines", evaluated, "MMoE")))
        else:
            show(_describe(evaluated.summary))
    console.rule("One candidate list")
    request, example = read_example(trained.artifact), trained.artifact / EXAMPLE_FILE
    ranking = Ranker.load(trained.artifact).rank(**request)
    console.print(f"household {request['user']}, {request['context']}")
    for position, (candidate, score) in enumerate(zip(ranking.candidates, ranking.scores, strict=True), start=1):
        console.print(f"  {position}. product {candidate}  score {score:.4f}")
    print(f"report: {work / ('baselines' if options.full else 'evaluation') / 'report.html'}")
    print(f"{time.perf_counter() - started:.0f} s in all")
    _next_commands(settings, trained.model_uri, example)


def _ingest_log(out: Path, full: bool) -> None:
    """Write the log of the quickstart with all households or with `HOUSEHOLDS`, unless the log exists."""
    from pipelines.data_sets.complete_journey import packaged_folder
    from pipelines.ingest_complete_journey import Selection, ingest

    if (out / "log").is_dir() and (out / "purchases").is_dir():
        print(f"{out / 'log'} already exists")
        return
    ingest(packaged_folder(), out, Selection(households=None if full else HOUSEHOLDS))


def _describe(summary: Summary) -> Iterator[str]:
    for name, metrics in summary.tasks.items():
        auc = metrics.get("auc")
        yield f"{name}: AUC {auc.value:.4f}, 95% interval {auc.low:.4f} to {auc.high:.4f} over households"


def _next_commands(settings: Settings, model: str, example: Path) -> None:
    print("\nnext:")
    uri = settings.tracking.resolved_uri
    print(f"  MLFLOW_TRACKING_URI={shlex.quote(uri)} mlflow models serve -m {model} --env-manager local -p 5001")
    print(f"  curl -s localhost:5001/invocations -H 'Content-Type: application/json' -d @{shlex.quote(str(example))}")
    is_server = uri.startswith(("http://", "https://"))
    print(f"  see the runs at {uri}" if is_server else f"  mlflow ui --backend-store-uri {shlex.quote(uri)}")


if __name__ == "__main__":
    main()
