"""Commands that read a log: `init` and `inspect`."""

import re
import shlex
import tempfile
from pathlib import Path
from typing import Any

import click

from mmoe_rec.atomic import write_text
from mmoe_rec.cli.main import Configuration, command, out_option, settings_command, show, show_report
from mmoe_rec.errors import UserError
from mmoe_rec.locks import write_lock
from mmoe_rec.preprocessing.build_inputs import BuildInputs, check_output_folder, check_work_outside_logs
from mmoe_rec.preprocessing.prepare import lock_features
from mmoe_rec.profiling.data_health import measure_health as inspect_features
from mmoe_rec.profiling.inferred_schema import KEY_NAMES
from mmoe_rec.profiling.settings_file import (
    CHECK_MARK,
    check_replaceable,
    describe_guesses,
    draft_settings,
    name_from_path,
)
from mmoe_rec.settings.load import load_settings


@command()
@click.argument("log")
@click.option("--events", multiple=True, metavar="DIR...", help="additional event logs, such as all purchases")
@click.option("--out", metavar="YAML", help="settings file to write (default: NAME.yaml)")
@click.option("--work", metavar="DIR", help="folder for features and models (default: NAME_work next to the file)")
@click.option("--user", metavar="C", help="column of the user")
@click.option("--candidate", metavar="C", help="column of the candidate")
@click.option("--request", metavar="C", help="column of the request")
@click.option("--time", metavar="C", help="column of the request time")
@click.option("--task", multiple=True, metavar="C...", help="label columns of all tasks")
@click.option("--placement", multiple=True, metavar="C...", help="columns that say where a candidate was shown")
@click.option("--leave-out", multiple=True, metavar="C...", help="columns that aren't model inputs")
@click.option("--timezone", metavar="Z", help="time zone of the users, such as Europe/Berlin")
def init(log: str, out: str | None, work: str | None, **options: Any) -> None:
    """mmoe-rec init data/shop/log --events data/shop/purchases --out shop.yaml
    mmoe-rec init data/shop/log --out shop.yaml --user customer --task bought kept

    Draft a settings file from a log of Parquet files with one row for each candidate that was shown. Infer the key
    columns, the tasks, the features and the split by time. Mark each guess to check with "# check" and its reason.
    Leave out columns that are written after the request, or that reveal a label.

    Correct a wrong guess with an option, or edit the file. The command never replaces a file that was edited by hand.
    """
    path = Path(out or f"{name_from_path(log)}.yaml")
    if path.is_dir() or path.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out '{path}' is not a YAML file. Give a name such as {name_from_path(log)}.yaml.")
    previous_command = check_replaceable(path, log)
    name = name_from_path(str(path.with_suffix("")))
    work = work or str(path.parent / f"{name}_work")
    corrections = {key: (options[key],) for key in KEY_NAMES if options[key]}
    corrections |= {name: options[name.replace("-", "_")] for name in ("task", "leave-out", "placement")}
    text, schema = draft_settings(name, log, work, options["events"], corrections, options["timezone"])
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / path.name
        draft.write_text(text, encoding="utf-8")
        try:
            settings = load_settings(draft)  # Validate the draft before writing the file.
        except UserError as error:
            raise UserError(str(error).replace(str(draft), str(path))) from None
    check_work_outside_logs(log, settings.schema_, Path(work))
    write_text(path, text)
    show(describe_guesses(schema))
    marks = len(re.findall(rf"{CHECK_MARK}\b", text)) - 1  # The header contains one mark next to a checksum.
    guesses = f", with {marks} guess{'es' if marks > 1 else ''} to check" if marks else ""
    if previous_command:
        print(f"replaced: the settings made by '{previous_command}', whose options no longer apply")
    print(f"settings: {path}{guesses}")
    print(f"next: mmoe-rec train --config {shlex.quote(str(path))}")


@settings_command()
@out_option("data.work_dir/inspection")
def inspect(configuration: Configuration, out: Path | None) -> None:
    """mmoe-rec inspect --config configs/complete_journey.yaml

    Report the health of a data set before training. Show rows, and labels by split and week. For each feature, show its
    coverage, its IDs that are not in the vocabulary, its drift, and how well the feature alone predicts each task. A
    feature that predicts too well may be a leak. The command builds the features or reuses existing ones. It writes
    `report.html` and `health.json` to `data.work_dir`/inspection.
    """
    settings = configuration.settings
    out = out or Path(settings.data.work_dir) / "inspection"
    check_output_folder(out, settings)
    # Import matplotlib and Jinja2 only when the report is made.
    with (
        lock_features(BuildInputs.of(settings), "an inspection") as prepared,
        write_lock(out, "an inspection", "give another --out"),
    ):
        data, scratch = settings.data, out / ".inspection_scratch"
        health = inspect_features(settings.name, prepared, settings.schema_, scratch, data.memory_gib, data.workers)
        from mmoe_rec.profiling.health_report import HEALTH_FILE, make_report, write_health
        from mmoe_rec.report.report_files import REPORT_PAGE

        write_health(health, out)
    show_report(make_report(health))
    print(f"report: {out / REPORT_PAGE}")
    print(f"numbers: {out / HEALTH_FILE}")
    print(f"next: mmoe-rec train {configuration.options()}")
