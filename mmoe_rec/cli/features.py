"""mmoe-rec features --config configs/complete_journey.yaml
mmoe-rec features --config configs/complete_journey.yaml --extend

Fits the features to the log and encodes the training, validation and test rows into `data.work_dir`/features. Training
and evaluation do this themselves when it has not been done or when log, features or split have changed.

--extend adds new files of the log, with later requests, to existing features and reads nothing else: statistics and
the table rows of known ids stay, frequent new ids get further rows, and only the new rows are encoded, into the splits
of the settings. Then `mmoe-rec train --config C --from MODEL` goes on from the previous model.
"""

import click

from mmoe_rec.cli.main import Configuration, settings_command
from mmoe_rec.log.checks import format_time
from mmoe_rec.preprocessing.build_inputs import BuildInputs
from mmoe_rec.preprocessing.extend import extend as add_days
from mmoe_rec.preprocessing.prepare import FeatureFolder, empty_split_message, prepare
from mmoe_rec.report.formatting import describe_conflicting_times, describe_pending_labels
from mmoe_rec.settings.sections import Settings
from mmoe_rec.task_kinds import DEFAULT_KIND


@settings_command(__doc__)
@click.option("--extend", is_flag=True, help="add new files of the log to existing features")
def features(configuration: Configuration, extend: bool) -> None:
    settings = configuration.settings
    inputs = BuildInputs.of(settings)
    extended = add_days(inputs) if extend else None
    if extend and extended is None:
        print(f"no new files in '{settings.data.log}': the features stay as they are")
        return
    features = prepare(inputs) if extended is None else extended.features
    _print(features, settings)
    if extended is not None:
        counts = ((extended.rows, "row"), (extended.files, "new file"))
        print("added " + " of ".join(f"{many:,} {noun}{'s' * (many != 1)}" for many, noun in counts))
        if extended.new_ids:
            print("new ids: " + ", ".join(f"{name} {count:,}" for name, count in extended.new_ids.items()))
        if missing := extended.missing:
            print(f"files that are gone from the log stay counted: {len(missing):,}, such as '{missing[0]}'")
    if empty := [name for name in ("train", "validation") if not features.manifest["splits"][name]["rows"]]:
        print(f"no model can be trained on these: {empty_split_message(empty[0], features.folder)}")
    elif extend:
        champion = f"models:/{settings.registered_model}@{settings.tracking.alias}"
        print(f"next: mmoe-rec train {configuration.options('--from', champion)}")
    else:
        print(f"next: mmoe-rec inspect {configuration.options()}")


def _print(features: FeatureFolder, settings: Settings) -> None:
    print(f"features: {features.folder}")
    requests, kinds = features.manifest["requests"], {name: task.kind for name, task in settings.tasks.items()}
    for name, split in features.manifest["splits"].items():
        labels = "; ".join(  # a name that is not a task's is the outcome of two
            f"{task} {kinds.get(task, DEFAULT_KIND).describe_labels(split['label_sum'][task], observed)}"
            for task, observed in split["observed"].items()
        )
        print(f"  {name}: {split['rows']:,} rows; {labels}" if split["rows"] else f"  {name}: no rows")
        for task, number in split["pending_labels"].items():
            if number:
                print(f"    {describe_pending_labels(task, number, format_time(split['label_cutoff']))}")
    if sentence := describe_conflicting_times(requests):
        print(sentence)
    if requests and requests["continued_rows"]:
        rows, begun = requests["continued_rows"], requests["continued"]
        print(
            f"{rows:,} new row{' belongs' if rows == 1 else 's belong'} to {begun:,} request{'s' * (begun != 1)} of "
            "the files before: counters and histories take such labels, but the rows are not encoded"
        )
    for each in features.manifest["skipped"]:
        print(f"left out: {each['reason']}")
