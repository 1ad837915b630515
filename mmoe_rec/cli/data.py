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
from mmoe_rec.locks import writing
from mmoe_rec.preprocessing.logs import BuildInputs, check_apart, check_out
from mmoe_rec.preprocessing.prepare import features_in_use
from mmoe_rec.profiling.data_health import inspect as inspect_features
from mmoe_rec.profiling.meaning import PURPOSES
from mmoe_rec.profiling.settings_file import CHECK, check_replaceable, describe_guesses, draft_settings, name_of
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
    path = Path(out or f"{name_of(log)}.yaml")
    if path.is_dir() or path.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out '{path}' is to be a YAML file, such as {name_of(log)}.yaml")
    before = check_replaceable(path, log)
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
