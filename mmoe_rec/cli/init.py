"""mmoe-rec init data/shop/log --events data/shop/purchases --out shop.yaml
mmoe-rec init data/shop/log --out shop.yaml --user customer --task bought kept

Reads a log of Parquet files, one row for each candidate that was shown, and writes settings for it: who, what, when, in
which list; what describes what; tasks; features, above all counters and histories; a split by time. It asks nothing:
what a person should check is marked "# check" in the file, with the reason. Columns that come after the request, or
tell a label too well to be known before it, are left out.

A wrong guess is put right by an option, with the same --out: what was said before still counts. A file that was edited
by hand is never replaced.
"""

from __future__ import annotations

import re
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mmoe_rec.atomic import write_text
from mmoe_rec.cli.main import command, show
from mmoe_rec.errors import UserError
from mmoe_rec.settings.load import load_settings

if TYPE_CHECKING:
    from mmoe_rec.profiling.meaning import Meaning
    from mmoe_rec.profiling.profile import Profile
    from mmoe_rec.profiling.proposal import Events

_NO_NAME = frozenset({"log", "logs", "data", "parquet", "part", "interactions", "events"})


@command(__doc__)
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
def init(log: str, out: str | None, **given: Any) -> None:
    from mmoe_rec.preprocessing.logs import check_apart
    from mmoe_rec.profiling.settings_file import CHECK, words_before

    path = Path(out or f"{_name_of(log)}.yaml")
    if path.is_dir() or path.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out '{path}' is to be a YAML file, such as {_name_of(log)}.yaml")
    if before := words_before(path):
        told = init.make_context("init", before).params
        if told["log"].rstrip("/") != log.rstrip("/"):
            raise UserError(f"'{path}' has the settings of '{told['log']}': name another --out for '{log}'")
        given = {key: value or told[key] for key, value in given.items()}
    words = [log, *(() if out is None else ("--out", out))]
    for key, value in given.items():
        for each in (value,) if isinstance(value, str) else value or ():
            words += [f"--{key.replace('_', '-')}", each]
    name = _name_of(str(path.with_suffix("")))
    work = given["work"] or str(path.parent / f"{name}_work")
    text, meaning, warnings = _propose(name, log, work, words, given)
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / path.name
        draft.write_text(text, encoding="utf-8")
        try:
            settings = load_settings(draft)  # before anything is written, as it would be refused
        except UserError as error:
            raise UserError(str(error).replace(str(draft), str(path))) from None
    check_apart(log, settings.schema_, Path(work))
    write_text(path, text)
    show(_describe(meaning, warnings))
    marks = len(re.findall(rf"{CHECK}\b", text)) - 1  # one is in the header, beside a checksum
    guesses = f", with {marks} guess{'es' if marks > 1 else ''} to check" if marks else ""
    print(f"settings: {path}{guesses}")
    print(f"next: mmoe-rec train --config {shlex.quote(str(path))}")


def _name_of(path: str, passed: frozenset[str] = _NO_NAME) -> str:
    """What a path says a data set is called; some words say nothing."""
    parts = [part.removesuffix(".parquet") for part in Path(path).parts]
    told = next(
        (each for each in reversed(parts) if each.lower() not in passed and not set(each) & set("*?[=:")), "log"
    )
    return re.sub(r"[^\w.-]+", "_", told).strip("._-") or "log"


def _propose(
    name: str, log: str, work: str, words: Sequence[str], given: Mapping[str, Any]
) -> tuple[str, Meaning, list[str]]:
    from mmoe_rec.profiling.guess import guess
    from mmoe_rec.profiling.meaning import PURPOSES
    from mmoe_rec.profiling.profile import open_profile
    from mmoe_rec.profiling.proposal import Proposal
    from mmoe_rec.profiling.settings_file import settings_text

    said = {each: (given[each],) for each in PURPOSES if given[each]}
    said |= {each: given[each.replace("-", "_")] for each in ("task", "leave-out", "placement")}
    with ExitStack() as open_logs:
        folder = Path(open_logs.enter_context(tempfile.TemporaryDirectory()))
        profile = open_logs.enter_context(open_profile(log, folder / "log", "LOG"))
        meaning = guess(profile, said)
        events: list[Events] = []
        for place, path in enumerate(given["events"]):
            other = open_logs.enter_context(open_profile(path, folder / f"events-{place}", "--events"))
            events.append(_read_events(path, other, meaning, {each.name for each in events}))
        proposal = Proposal(meaning, events, given["timezone"])
        text = settings_text(name, log, work, words, meaning, proposal, events)
    return text, meaning, [*meaning.warnings, *proposal.warnings]


def _read_events(path: str, profile: Profile, meaning: Meaning, taken: set[str]) -> Events:
    from mmoe_rec.profiling.proposal import read_events

    name = re.sub(r"\W+", "_", _name_of(path, _NO_NAME - {"events"}))
    return read_events(path, name if name not in taken else f"{name}_{len(taken) + 1}", profile, meaning)


def _describe(meaning: Meaning, warnings: Sequence[str]) -> Iterator[Any]:
    """What was guessed, for the terminal."""
    from rich.markup import escape
    from rich.table import Table

    if "user" not in meaning.keys:
        yield f"warning: {meaning.key_checks['user']}"
    table = Table(box=None, show_header=False, pad_edge=False)
    for purpose in ("user", "candidate", "request", "time"):
        if purpose in meaning.keys:
            table.add_row(purpose, meaning.keys[purpose], meaning.key_checks.get(purpose, ""))
    for task in meaning.tasks:
        seen = f"where {task.observed_when[0]}" if task.observed_when else ""
        late = f"final after {task.matures_after_days:g} days" if task.matures_after_days else ""
        table.add_row("task", task.column, ", ".join(filter(None, (task.objective, seen, late))))
    for role, names in meaning.roles.items():
        if names:
            table.add_row(f"describe {role}s" if role in ("user", "candidate") else role, ", ".join(names), "")
    for why in dict.fromkeys(meaning.left_out.values()):
        names = [name for name, reason in meaning.left_out.items() if reason == why]
        table.add_row("left out", ", ".join(names), escape(why))
    yield table
    for each in warnings:
        yield f"warning: {each}"
