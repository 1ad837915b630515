"""mmoe-rec train --config configs/complete_journey.yaml
torchrun --nproc-per-node 2 -m mmoe_rec train --config configs/complete_journey.yaml
mmoe-rec train --config configs/complete_journey.yaml --resume
mmoe-rec train --config configs/complete_journey.yaml --from models:/complete_journey@champion

Build features or reuse existing ones, train the model with sharded tables, keep the best model by validation, write it
to `data.work_dir`/model and register it in MLflow. The same code runs on one process or many, on CPU or GPUs.

--resume continues from the last checkpoint, in the same MLflow run. Without a checkpoint, a new run starts, so that a
cluster can always pass --resume. Settings, features and --from must match the checkpoint or the finished run. Features
of a later day start a new run. SIGTERM, SIGHUP and Ctrl-C write a checkpoint and exit with code 75. If MLflow's server
is unavailable, the command also exits with code 75, and --resume registers the model.

--from starts from the weights of a trained model instead of random weights. The features must extend the features of
that model (see `mmoe-rec features --extend`). Optimizers start from zero.

The model gets the alias if it is significantly better than the current model. The comparison uses the evaluation rows.
These are validation rows of users whose rows didn't select or calibrate the model. Otherwise the model is registered as
challenger. Only one command at a time can train in a `data.work_dir`.
"""

import click

from mmoe_rec.cli.main import Configuration, settings_command, show_report


@settings_command(__doc__)
@click.option("--resume", is_flag=True, help="whether to continue from the last checkpoint, if there is one")
@click.option("--from", "start", metavar="M", help="model to start from: a folder or models:/NAME@ALIAS")
def train(configuration: Configuration, resume: bool, start: str | None) -> None:
    from mmoe_rec.preprocessing.build_inputs import BuildInputs

    _ = BuildInputs.of(configuration.settings).logs  # Report a missing log before importing torch.
    from mmoe_rec.tracking.registry import CHALLENGER_ALIAS
    from mmoe_rec.training.train import train_model

    trained = train_model(configuration.settings, start, resume)
    if trained is None:
        return
    from mmoe_rec.training.training_report import make_report

    if trained.finished_earlier:
        print("The run has already finished. Its results follow. To start another run, leave out --resume.")
    show_report(make_report(trained, configuration.settings))
    print(f"model: {trained.artifact}, registered as {trained.model_uri}")
    if trained.model_uri.endswith(f"@{CHALLENGER_ALIAS}"):
        options = configuration.options("--challenger", CHALLENGER_ALIAS)
        print(f"to decide by the test rows: mmoe-rec promote {options}")
    print(f"next: mmoe-rec evaluate {configuration.options('--model', trained.model_uri)}")
