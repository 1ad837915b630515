"""python -m pipelines.train --config configs/complete_journey.yaml
torchrun --nproc-per-node 2 -m pipelines.train --config configs/complete_journey.yaml
python -m pipelines.train --config configs/complete_journey.yaml --resume
python -m pipelines.train --config configs/complete_journey.yaml --from models:/complete_journey@champion
python -m pipelines.train --config configs/complete_journey.yaml --seeds 5

Fits features (or takes existing ones), trains the model over sharded tables, keeps the best one by validation, writes
it to `data.work`/model and registers it in MLflow. One process or many, CPU or GPUs: the same code.

--resume goes on from the last checkpoint, in the same MLflow run, and begins where there is none, so that it may stand
in every command that a cluster repeats. Settings, features and start must be those of the checkpoint, or of the
training that has ended; features of a later day begin a new one. SIGTERM and Ctrl-C write a checkpoint and
end with exit code 75. So does a training whose model could not be registered because MLflow's server was away:
--resume registers it.

--from starts from the weights of a trained model instead of random ones, on features that were extended since (see
`python -m pipelines.features --extend`); optimizers start afresh.

--seeds trains with `training.seed` and those after it, in data.work/seeds, and prints the mean of all metrics on the
test rows, with an interval over trainings and users, and how far trainings are apart. None of these models is
registered. --at-once runs several of them at a time: on cores that one leaves idle, or a GPU each. --against compares
them with those that other settings have given in their `data.work`, on the same test rows.

The model takes over the alias if it is shown to be better on the validation rows than the one that holds it; otherwise
it is registered as challenger. One process trains in a `data.work` at a time.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmoe_rec.errors import UserError, exit_with_message
from mmoe_rec.jobs.commands.command import at_least, read_command, show
from mmoe_rec.program import spelled

if TYPE_CHECKING:
    from mmoe_rec.training.validation import Validation


@exit_with_message()
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    arguments, settings = read_command(__doc__ or "", argv, _add_arguments)
    if arguments.seeds is not None:
        from mmoe_rec.jobs.seeds.train import train_seeds

        if arguments.start is not None:
            raise UserError("--seeds trains from random weights; leave --from out")
        found = train_seeds(settings, arguments.seeds, arguments.resume, arguments.at_once or 1, arguments.against)
        show(found.told())
        print(f"all values: {found.file}")
        print(f"report: {found.report}")
        return
    if arguments.at_once is not None:
        raise UserError("--at-once says how many trainings of --seeds run at a time; give --seeds as well")
    if arguments.against:
        raise UserError("--against compares trainings of --seeds; models are compared by evaluate --against")
    from rich.console import Console

    from mmoe_rec.jobs.train import train_model
    from mmoe_rec.jobs.validations import told_of
    from mmoe_rec.jobs.workspace import CHALLENGER

    trained = train_model(settings, arguments.start, arguments.resume)
    if trained is None:
        return
    if trained.before:
        print("this training has already ended, and what follows was so then; without --resume a new one begins")
    if trained.started_from is not None:
        print(f"validation of the model that it was started from: {_text(trained.started_from)}")
    for part in told_of(trained, settings):
        Console().print(part, highlight=False, soft_wrap=isinstance(part, str))
    if note := trained.best.experts.note(settings.model.gates.rule):
        print(f"note: {note}")
    if trained.rows_per_s:  # else all steps were done before, and the rest was left
        print(f"{trained.rows_per_s:,.0f} rows/s in training, {trained.waiting:.1%} of the time spent waiting for data")
    for sentence in trained.compared:
        print(sentence)
    print(f"model: {trained.artifact}, registered as {trained.address}")
    if trained.address.endswith(f"@{CHALLENGER}"):
        again = shlex.join(["--config", arguments.config, "--challenger", CHALLENGER, *arguments.overrides])
        print(spelled(f"to ask again, by the test rows: python -m pipelines.evaluation.promote {again}"))
    options = shlex.join(["--config", arguments.config, "--model", trained.address, *arguments.overrides])
    print(spelled(f"next: python -m pipelines.evaluate {options}"))


def _text(validation: Validation) -> str:
    return ", ".join(f"{name.removeprefix('validation/')} {value:.4f}" for name, value in validation.flat().items())


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint, if there is one")
    parser.add_argument(
        "--from", dest="start", metavar="M", help="start from a model: an artifact folder or models:/NAME@ALIAS"
    )
    parser.add_argument(
        "--seeds", type=at_least(2), metavar="N", help="train N times, and tell what the settings are worth on average"
    )
    parser.add_argument("--at-once", type=at_least(1), metavar="N", help="of --seeds, how many run at a time (1)")
    parser.add_argument(
        "--against", nargs="+", default=[], metavar="W", help="of --seeds: data.work of other settings to compare with"
    )
