"""python -m pipelines.daily --config configs/shop.yaml --split.train_end 2024-06-01 --split.validation_end 2024-06-08

Run the daily steps of a scheduler. The command adds the new files of the log to the features and trains a challenger
from the current model. It evaluates both models on the test rows, gives the alias to the better model, and refreshes
that model's tables.

The split in the settings determines the training days. You can override settings on the command line. The command stops
at the first step that fails, with the message and exit code of that step. You can start it again at any time: an
interrupted training run resumes.
"""

from collections.abc import Sequence

from mmoe_rec.cli.main import main as run
from mmoe_rec.cli.results import REFUSED_EXIT_CODE
from mmoe_rec.errors import UserError, exit_with_message
from pipelines.data_sets.ingest_common import command_parser


@exit_with_message()
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with the arguments `argv`. None stands for the arguments of the process."""
    parser = command_parser("python -m pipelines.daily", __doc__)
    parser.add_argument("--config", required=True, metavar="C", help="settings file")
    options, overrides = parser.parse_known_args(argv)
    from mmoe_rec.settings.load import load_settings

    settings = load_settings(options.config, overrides)
    from mmoe_rec.tracking.registry import find_champion

    name, alias, uri = settings.registered_model, settings.tracking.alias, settings.tracking.resolved_uri
    champion = find_champion(name, alias, uri)
    if champion is None:
        raise UserError(f"no version of '{name}' has the alias '{alias}'. Train the first model with mmoe-rec train.")
    arguments = ["--config", options.config, *overrides]
    run(["features", *arguments, "--extend"])
    run(["train", *arguments, "--from", f"models:/{name}/{champion.number}", "--resume"])
    is_champion = find_champion(name, alias, uri) != champion
    trained = f"models:/{name}@{alias if is_champion else 'challenger'}"
    run(["evaluate", *arguments, "--model", trained, "--compare-to", f"models:/{name}/{champion.number}"])
    if not is_champion:
        try:
            run(["promote", *arguments, "--challenger", "challenger"])
        except SystemExit as end:
            if end.code != REFUSED_EXIT_CODE:  # A refusal is no failure: the challenger isn't better.
                raise
    run(["refresh", *arguments])


if __name__ == "__main__":
    main()
