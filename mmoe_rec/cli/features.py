"""mmoe-rec features --config configs/complete_journey.yaml
mmoe-rec features --config configs/complete_journey.yaml --extend

Fit the features to the log. Encode the training, validation and test rows into `data.work_dir`/features. `train` and
`evaluate` do this too if the features are missing, or if the log, the features or the split have changed.

--extend adds new log files with later requests to existing features. It keeps statistics and the table rows of seen
IDs, adds table rows for frequent new IDs, and encodes only the new rows, into the splits of the settings. To continue
from the previous model, run `mmoe-rec train --config C --from MODEL`.
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
@click.option("--extend", is_flag=True, help="whether to add new log files to existing features")
def features(configuration: Configuration, extend: bool) -> None:
    settings = configuration.settings
    inputs = BuildInputs.of(settings)
    extended = add_days(inputs) if extend else None
    if extend and extended is None:
        print(f"no new files in '{settings.data.log}', so the features are unchanged")
        return
    features = prepare(inputs) if extended is None else extended.features
    _print(features, settings)
    if extended is not None:
        counts = ((extended.rows, "row"), (extended.files, "new file"))
        print("added " + " of ".join(f"{count:,} {noun}{'s' * (count != 1)}" for count, noun in counts))
        if extended.new_ids:
            print("new IDs: " + ", ".join(f"{name} {count:,}" for name, count in extended.new_ids.items()))
        if missing := extended.missing:
            print(f"removed files that remain in the features: {len(missing):,}, such as '{missing[0]}'")
    if empty := [name for name in ("train", "validation") if not features.manifest["splits"][name]["rows"]]:
        print(f"these features can't train a model: {empty_split_message(empty[0], features.folder)}")
    elif extend:
        champion = f"models:/{settings.registered_model}@{settings.tracking.alias}"
        print(f"next: mmoe-rec train {configuration.options('--from', champion)}")
    else:
        print(f"next: mmoe-rec inspect {configuration.options()}")


def _print(features: FeatureFolder, settings: Settings) -> None:
    print(f"features: {features.folder}")
    requests, kinds = features.manifest["requests"], {name: task.kind for name, task in settings.tasks.items()}
    for name, split in features.manifest["splits"].items():
        labels = "; ".join(  # Names that aren't in `kinds` are combined outcomes of two tasks.
            f"{task} {kinds.get(task, DEFAULT_KIND).describe_labels(split['label_sum'][task], observed)}"
            for task, observed in split["observed"].items()
        )
        print(f"  {name}: {split['rows']:,} rows; {labels}" if split["rows"] else f"  {name}: no rows")
        for task, count in split["pending_labels"].items():
            if count:
                print(f"    {describe_pending_labels(task, count, format_time(split['label_cutoff']))}")
    if sentence := describe_conflicting_times(requests):
        print(sentence)
    if requests and requests["continued_rows"]:
        rows, request_count = requests["continued_rows"], requests["continued"]
        print(
            f"{rows:,} new row{' belongs' if rows == 1 else 's belong'} to {request_count:,} "
            f"request{'s' * (request_count != 1)} of earlier files. Counters and histories include these labels, but "
            "the rows aren't encoded."
        )
    for file in features.manifest["skipped"]:
        print(f"skipped: {file['reason']}")
