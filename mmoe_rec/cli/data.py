"""Commands that read a log: `init`, `features` and `inspect`."""

import re
import shlex
import tempfile
from pathlib import Path
from typing import Any

import click

from mmoe_rec.atomic import write_text
from mmoe_rec.cli.main import Configuration, command, out_option, settings_command, show, show_report
from mmoe_rec.errors import UserError
from mmoe_rec.locks import writing
from mmoe_rec.log.checks import format_time
from mmoe_rec.preprocessing.extend import extend as add_days
from mmoe_rec.preprocessing.logs import BuildInputs, check_apart, check_out
from mmoe_rec.preprocessing.prepare import FeatureFolder, features_in_use, prepare
from mmoe_rec.preprocessing.splits import empty_split
from mmoe_rec.profiling.data_health import inspect as inspect_features
from mmoe_rec.profiling.meaning import PURPOSES
from mmoe_rec.profiling.settings_file import CHECK, check_replaceable, describe_guesses, draft_settings, name_of
from mmoe_rec.report.formatting import describe_request_times, describe_unmatured
from mmoe_rec.settings.load import load_settings
from mmoe_rec.settings.sections import Settings
from mmoe_rec.task_kinds import DEFAULT


@command()
@click.argument("log")
@click.option("--events", multiple=True, metavar="DIR...", help="further logs of what happened, such as all purchases")
@click.option("--out", metavar="YAML", help="the settings file (default: NAME.yaml)")
@click.option("--work", metavar="DIR", help="where features and models go (default: NAME_work, beside the file)")
@click.option("--user", metavar="C", help="column of the user")
@click.option("--candidate", metavar="C", help="column of the candidate")
@click.option("--request", metavar="C", help="column of the request")
@click.option("--time", metavar="C", help="column of the request's time")
@click.option("--task", multiple=True, metavar="C...", help="columns of labels, the only tasks then")
@click.option("--placement", multiple=True, metavar="C...", help="columns of where a candidate was shown")
@click.option("--leave-out", multiple=True, metavar="C...", help="columns that are no inputs")
@click.option("--timezone", metavar="Z", help="in which users live, such as Europe/Berlin")
def init(log: str, out: str | None, work: str | None, **given: Any) -> None:
    """mmoe-rec init data/shop/log --events data/shop/purchases --out shop.yaml
    mmoe-rec init data/shop/log --out shop.yaml --user customer --task bought kept

    Reads a log of Parquet files, one row for each candidate that was shown, and writes settings for it: who, what,
    when, in which list; what describes what; tasks; features, above all counters and histories; a split by time. It
    asks nothing: what a person should check is marked "# check" in the file, with the reason. Columns that come after
    the request, or tell a label too well to be known before it, are left out.

    Correct a wrong guess with a further option, or edit the file. A file that was edited by hand is never replaced.
    """
    path = Path(out or f"{name_of(log)}.yaml")
    if path.is_dir() or path.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out '{path}' is to be a YAML file, such as {name_of(log)}.yaml")
    check_replaceable(path)
    name = name_of(str(path.with_suffix("")))
    work = work or str(path.parent / f"{name}_work")
    said = {each: (given[each],) for each in PURPOSES if given[each]}
    said |= {each: given[each.replace("-", "_")] for each in ("task", "leave-out", "placement")}
    text, meaning = draft_settings(name, log, work, given["events"], said, given["timezone"])
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / path.name
        draft.write_text(text, encoding="utf-8")
        try:
            settings = load_settings(draft)  # before anything is written, as it would be refused
        except UserError as error:
            raise UserError(str(error).replace(str(draft), str(path))) from None
    check_apart(log, settings.schema_, Path(work))
    write_text(path, text)
    show(describe_guesses(meaning))
    marks = len(re.findall(rf"{CHECK}\b", text)) - 1  # one is in the header, beside a checksum
    guesses = f", with {marks} guess{'es' if marks > 1 else ''} to check" if marks else ""
    print(f"settings: {path}{guesses}")
    print(f"next: mmoe-rec train --config {shlex.quote(str(path))}")


@settings_command()
@click.option("--extend", is_flag=True, help="add new files of the log to existing features")
def features(configuration: Configuration, extend: bool) -> None:
    """mmoe-rec features --config configs/complete_journey.yaml
    mmoe-rec features --config configs/complete_journey.yaml --extend

    Fits the features to the log and encodes the training, validation and test rows into `data.work`/features. Training
    and evaluation do this themselves when it has not been done or when log, features or split have changed.

    --extend adds new files of the log, with later requests, to existing features and reads nothing else: statistics and
    the table rows of known ids stay, frequent new ids get further rows, and only the new rows are encoded, into the
    splits of the settings. Then `mmoe-rec train --config C --from MODEL` goes on from the previous model.
    """
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
        if gone := extended.gone:
            print(f"files that are gone from the log stay counted: {len(gone):,}, such as '{gone[0]}'")
    if empty := [name for name in ("train", "validation") if not features.manifest["splits"][name]["rows"]]:
        print(f"no model can be trained on these: {empty_split(empty[0], features.folder)}")
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
            f"{task} {kinds.get(task, DEFAULT).describe_labels(split['label_sum'][task], observed)}"
            for task, observed in split["observed"].items()
        )
        print(f"  {name}: {split['rows']:,} rows; {labels}" if split["rows"] else f"  {name}: no rows")
        for task, number in split["unmatured"].items():
            if number:
                print(f"    {describe_unmatured(task, number, format_time(split['known_by']))}")
    if sentence := describe_request_times(requests):
        print(sentence)
    if requests and requests["continued_rows"]:
        rows, begun = requests["continued_rows"], requests["continued"]
        print(
            f"{rows:,} new row{' belongs' if rows == 1 else 's belong'} to {begun:,} request{'s' * (begun != 1)} of "
            "the files before: counters and histories take such labels, but the rows are not encoded"
        )
    for each in features.manifest["left_out"]:
        print(f"left out: {each['reason']}")


@settings_command()
@out_option("data.work/inspection")
def inspect(configuration: Configuration, out: Path | None) -> None:
    """mmoe-rec inspect --config configs/complete_journey.yaml

    The health of a data set before one trains on it: rows, labels by split and week, and for each feature its coverage,
    ids that training does not know, drift, and how well it alone predicts each task, which finds leaks. Prepares the
    features as training would, or takes existing ones; writes `report.html` and `health.json` to
    `data.work`/inspection.
    """
    settings = configuration.settings
    out = out or Path(settings.data.work) / "inspection"
    check_out(out, settings)
    # matplotlib and Jinja2 are for what there is to be shown.
    with (
        features_in_use(BuildInputs.of(settings), "an inspection") as prepared,
        writing(out, "an inspection", "give another --out"),
    ):
        data, scratch = settings.data, out / ".inspection_scratch"
        health = inspect_features(settings.name, prepared, settings.schema_, scratch, data.memory_gib, data.workers)
        from mmoe_rec.profiling.health_report import FILE, make_report, write
        from mmoe_rec.report.report_files import PAGE

        write(health, out)
    show_report(make_report(health))
    print(f"report: {out / PAGE}")
    print(f"numbers: {out / FILE}")
    print(f"next: mmoe-rec train {configuration.options()}")
