"""python -m pipelines.tune --config configs/complete_journey.yaml --trials 20

Tries values for the settings under `tuning.search`, keeps those with the best validation result, and writes them, with
all other settings, to `data.work`/tuning/best.yaml, which `python -m pipelines.train --config` takes. The next values
follow from what was found so far (Optuna's tree-structured Parzen estimator); a trial that falls behind the median of
those before it is cut short.

Each trial is a run in MLflow, within one of the whole search. The search is kept in `data.work`/tuning/study.db: the
same command, also after a kill, goes on until there are --trials of them. Test rows play no part.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence

from mmoe_rec.errors import UserError, exit_with_message
from mmoe_rec.settings import Settings, load_settings
from pipelines.command import count, read_command


@exit_with_message()
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    arguments, settings = read_command(__doc__ or "", argv, _add_arguments)
    search = settings.tuning.search
    if not search:
        raise UserError(f"'{arguments.config}' has nothing to search: list settings under tuning.search")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("pipelines.tune is one process: start it without torchrun")

    def with_values(values: dict[str, object]) -> Settings:
        chosen = [f"--{name}={json.dumps(value)}" for name, value in values.items()]
        return load_settings(arguments.config, [*arguments.overrides, *chosen])

    for name, each in search.items():  # a value that is no valid one is told of at once
        for value in each.choices or (each.low, each.high):
            with_values({name: value})
    from pathlib import Path

    from mmoe_rec.locks import writing
    from pipelines.places import features_in_use
    from pipelines.tuning import Study

    what, advice = "a search for settings", "set `data.work` to another folder"
    with features_in_use(settings, what) as prepared, writing(Path(settings.data.work) / "tuning", what, advice):
        prepared.require_rows("train", "validation")
        tuned = Study(settings, prepared, with_values).run(arguments.trials)
    print(f"{tuned.trials} trials, of which {tuned.pruned} were cut short and {tuned.failed} failed")
    print(f"best: {tuned.value:.4f} with " + ", ".join(f"{name} {value}" for name, value in tuned.best.items()))
    print(f"next: python -m pipelines.train --config {tuned.file}")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trials", type=count, default=20, metavar="N", help="trials in all (default: %(default)s)")


if __name__ == "__main__":
    main()
