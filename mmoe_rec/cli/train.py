"""mmoe-rec train --config configs/complete_journey.yaml
torchrun --nproc-per-node 2 -m mmoe_rec train --config configs/complete_journey.yaml
mmoe-rec train --config configs/complete_journey.yaml --resume
mmoe-rec train --config configs/complete_journey.yaml --from models:/complete_journey@champion

Fits features (or takes existing ones), trains the model over sharded tables, keeps the best one by validation, writes
it to `data.work_dir`/model and registers it in MLflow. One process or many, CPU or GPUs: the same code.

--resume goes on from the last checkpoint, in the same MLflow run, and begins where there is none, so that it may stand
in every command that a cluster repeats. Settings, features and start must be those of the checkpoint, or of the
training that has ended; features of a later day begin a new one. SIGTERM, SIGHUP and Ctrl-C write a
checkpoint and end with exit code 75. So does a training whose model could not be registered because MLflow's server was
away: --resume registers it.

--from starts from the weights of a trained model instead of random ones, on features that were extended since (see
`mmoe-rec features --extend`); optimizers start afresh.

The model takes over the alias if it is shown to be better than the one that holds it, on validation rows of users that
chose nothing about it; otherwise it is registered as challenger. One process trains in a `data.work_dir` at a time.
"""

import click

from mmoe_rec.cli.main import Configuration, settings_command, show_report


@settings_command(__doc__)
@click.option("--resume", is_flag=True, help="go on from the last checkpoint, if there is one")
@click.option("--from", "start", metavar="M", help="start from a model: an artifact folder or models:/NAME@ALIAS")
def train(configuration: Configuration, resume: bool, start: str | None) -> None:
    from mmoe_rec.preprocessing.build_inputs import BuildInputs

    _ = BuildInputs.of(configuration.settings).logs  # a log that is missing is reported before torch is loaded
    from mmoe_rec.tracking.registry import CHALLENGER_ALIAS
    from mmoe_rec.training.train import train_model

    trained = train_model(configuration.settings, start, resume)
    if trained is None:
        return
    from mmoe_rec.training.training_report import make_report

    if trained.finished_earlier:
        print("this training has already ended, with the results below; without --resume a new one begins")
    show_report(make_report(trained, configuration.settings))
    print(f"model: {trained.artifact}, registered as {trained.model_uri}")
    if trained.model_uri.endswith(f"@{CHALLENGER_ALIAS}"):
        options = configuration.options("--challenger", CHALLENGER_ALIAS)
        print(f"to ask again, by the test rows: mmoe-rec promote {options}")
    print(f"next: mmoe-rec evaluate {configuration.options('--model', trained.model_uri)}")
