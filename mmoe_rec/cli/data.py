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
    path = Path(out or f"{name_from_path(log)}.yaml")
    if path.is_dir() or path.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out '{path}' is to be a YAML file, such as {name_from_path(log)}.yaml")
    before = check_replaceable(path, log)
    name = name_from_path(str(path.with_suffix("")))
    work = work or str(path.parent / f"{name}_work")
    corrections = {each: (given[each],) for each in KEY_NAMES if given[each]}
    corrections |= {each: given[each.replace("-", "_")] for each in ("task", "leave-out", "placement")}
    text, schema = draft_settings(name, log, work, given["events"], corrections, given["timezone"])
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / path.name
        draft.write_text(text, encoding="utf-8")
        try:
            settings = load_settings(draft)  # before anything is written, as it would be refused
        except UserError as error:
            raise UserError(str(error).replace(str(draft), str(path))) from None
    check_work_outside_logs(log, settings.schema_, Path(work))
    write_text(path, text)
    show(describe_guesses(schema))
    marks = len(re.findall(rf"{CHECK_MARK}\b", text)) - 1  # one is in the header, beside a checksum
    guesses = f", with {marks} guess{'es' if marks > 1 else ''} to check" if marks else ""
    if before:
        print(f"replaced: settings made by '{before}', whose options count only if this command repeats them")
    print(f"settings: {path}{guesses}")
    print(f"next: mmoe-rec train --config {shlex.quote(str(path))}")


@settings_command()
@out_option("data.work_dir/inspection")
def inspect(configuration: Configuration, out: Path | None) -> None:
    """mmoe-rec inspect --config configs/complete_journey.yaml

    The health of a data set before one trains on it: rows, labels by split and week, and for each feature its coverage,
    ids that training does not know, drift, and how well it alone predicts each task, which finds leaks. Prepares the
    features as training would, or takes existing ones; writes `report.html` and `health.json` to
    `data.work_dir`/inspection.
    """
    settings = configuration.settings
    out = out or Path(settings.data.work_dir) / "inspection"
    check_output_folder(out, settings)
    # matplotlib and Jinja2 are for what there is to be shown.
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
