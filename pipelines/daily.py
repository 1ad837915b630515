"""python -m pipelines.daily --config configs/shop.yaml --split.train_end 2024-06-01 --split.validation_end 2024-06-08

What a scheduler runs each day: adds the new files of the log to the features, trains from the model that holds the
alias, evaluates both on the test rows, gives the alias to the better one, and refreshes its tables. The settings' split
says which days train; overrides of settings may follow. It stops at the first step that fails, with its sentence and
exit code, and may be started again at any time: a training that was stopped goes on.
"""

from collections.abc import Sequence

from mmoe_rec.cli.main import main as run
from mmoe_rec.cli.results import REFUSED_EXIT_CODE
from mmoe_rec.errors import UserError, exit_with_message
from pipelines.data_sets.ingest_common import command_parser


@exit_with_message()
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the steps."""
    parser = command_parser("python -m pipelines.daily", __doc__)
    parser.add_argument("--config", required=True, metavar="C", help="settings file")
    options, overrides = parser.parse_known_args(argv)
    from mmoe_rec.settings.load import load_settings

    settings = load_settings(options.config, overrides)
    from mmoe_rec.tracking.registry import find_champion

    name, alias, uri = settings.registered_model, settings.tracking.alias, settings.tracking.resolved_uri
    before = find_champion(name, alias, uri)
    if before is None:
        raise UserError(f"no version of '{name}' holds '{alias}': train the first model by mmoe-rec train")
    words = ["--config", options.config, *overrides]
    run(["features", *words, "--extend"])
    run(["train", *words, "--from", f"models:/{name}/{before.number}", "--resume"])
    is_champion = find_champion(name, alias, uri) != before
    trained = f"models:/{name}@{alias if is_champion else 'challenger'}"
    run(["evaluate", *words, "--model", trained, "--compare-to", f"models:/{name}/{before.number}"])
    if not is_champion:
        try:
            run(["promote", *words, "--challenger", "challenger"])
        except SystemExit as end:
            if end.code != REFUSED_EXIT_CODE:  # where it is refused, the alias stays where it was
                raise
    run(["refresh", *words])


if __name__ == "__main__":
    main()
