"""mmoe-rec tune --config configs/complete_journey.yaml --trials 20

Tries values for the settings under `tuning.search`, keeps those with the best validation result, and writes them, with
all other settings, to `data.work`/tuning/best.yaml, which `mmoe-rec train --config` takes. The next values
follow from what was found so far (Optuna's tree-structured Parzen estimator); a trial that falls behind the median of
those before it is cut short, and a combination that is not valid is left out, with the reason.

Each trial is a run in MLflow, within one of the whole search. The search is kept in `data.work`/tuning/study.db: the
same command, also after a stop or a kill, goes on until there are --trials trials. Test rows play no part.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import click

from mmoe_rec.cli.command import COUNT, Configuration, settings_command
from mmoe_rec.errors import UserError, require_packages
from mmoe_rec.settings.load import load_settings
from mmoe_rec.settings.sections import Search, Settings

COMBINATIONS = 30  # with values of other settings, to try for a value that is not valid by itself


@settings_command(__doc__)
@click.option("--trials", type=COUNT, default=20, metavar="N", help="trials in all (default: 20)")
def tune(configuration: Configuration, trials: int) -> None:
    """Runs the command."""
    settings = configuration.settings
    search = settings.tuning.search
    if not search:
        raise UserError(f"'{configuration.file}' has nothing to search: list settings under tuning.search")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a search is one process: start it without torchrun")

    def with_values(values: dict[str, object]) -> Settings:
        chosen = [f"--{name}={json.dumps(value)}" for name, value in values.items()]
        return load_settings(configuration.file, [*configuration.overrides, *chosen])

    _check_values(search, with_values)
    require_packages("mmoe-rec tune", "tune", "optuna")
    from mmoe_rec.jobs.places import features_in_use, log_and_place
    from mmoe_rec.locks import writing
    from mmoe_rec.preprocessing.prepare import existing
    from mmoe_rec.tracking import runs

    existing(*log_and_place(settings))  # a wrong log is reported before MLflow and optuna are loaded
    from mmoe_rec.jobs.tune import Study

    runs.check_server(settings.tracking.address, settings.experiment, unsent=Path(settings.data.work) / "unsent")
    what, advice = "a search for settings", "set `data.work` to another folder"
    with features_in_use(settings, what) as prepared, writing(Path(settings.data.work) / "tuning", what, advice):
        prepared.require_rows("train", "validation")
        tuned = Study(settings, prepared, with_values).run(trials)
    not_valid = f", {_were(tuned.not_valid)} not valid" if tuned.not_valid else ""
    ended = f"{_were(tuned.cut_short)} cut short{not_valid} and {tuned.failed} failed"
    print(f"{tuned.trials} trial{'s' * (tuned.trials != 1)}, of which {ended}")
    print(f"best: {tuned.value:.4f} with " + ", ".join(f"{name} {value}" for name, value in tuned.best.items()))
    print(f"next: mmoe-rec train --config {tuned.file}")


def _were(trials: int) -> str:
    return f"{trials} {'was' if trials == 1 else 'were'}"


def _check_values(search: dict[str, Search], with_values: Callable[[dict[str, object]], Settings]) -> None:
    """Raises UserError, at once, for a value that is valid neither alone nor in some combinations with the others."""
    chance = random.Random(17)
    for name, each in search.items():
        for value in each.choices or (each.low, each.high):
            try:
                with_values({name: value})
            except UserError as error:
                others = {other: space for other, space in search.items() if other != name}
                combinations = ({k: _one_of(v, chance) for k, v in others.items()} for _ in range(COMBINATIONS))
                if not others or not any(_valid({**rest, name: value}, with_values) for rest in combinations):
                    raise UserError(f"'tuning.search' has {json.dumps(value)} for '{name}': {error}") from None


def _one_of(space: Search, chance: random.Random) -> object:
    return chance.choice(space.choices or (space.low, space.high))


def _valid(values: dict[str, object], with_values: Callable[[dict[str, object]], Settings]) -> bool:
    try:
        with_values(values)
    except UserError:
        return False
    return True
