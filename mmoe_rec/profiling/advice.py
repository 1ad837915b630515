"""What to change where a data set is suspicious: a sentence, and where it is a setting the override that changes it.

An override of the command line, such as `--split.train_start 2024-01-29`, stands in YAML as `split: {train_start:
2024-01-29}`. What a change gains, trainings tell: `NOTE`.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any

from mmoe_rec.task_kinds import KINDS

NOTE = "`mmoe-rec compare --variant NAME KEY=VALUE` tells what a change gains"
SELDOM_ROWS = 5
"""Training rows below which little is learnt of an id."""
_LEFT_OUT = 0.01  # of training look-ups, which a vocabulary leaves out
_WINDOWS = (7, 28, 91)  # days
_PERIODS = 3  # windows that the training rows should hold

Health = Mapping[str, Any]
Advice = dict[str, str | None]
"""`do`: what to change; `override`: that does it, None where no setting does"""


def change(what: str, key: str | None = None, value: object = None) -> Advice:
    """Advice, with the override that does it, where there is one. key: of a setting; value: as YAML."""
    if key is None:
        return {"do": what, "override": None}
    text = "null" if value is None else str(value)
    return {"do": what, "override": f"--{key} {shlex.quote(text)}"}


def leave_out(feature: Health, health: Health, unless: str = "") -> Advice:
    """To go without a feature, and those that read its table. unless: how the sentence ends."""
    name = feature["name"]
    readers = [
        each["name"]
        for each in health["features"]
        if each["name"] != name and any(its["table"] == name for its in each["inputs"])
    ]
    of_table = f", and {', '.join(f'`{each}`' for each in readers)}, which read its table" if readers else ""
    override = " ".join(f"--features.{each} null" for each in (name, *readers))
    return {"do": f"leave out `{name}`{of_table}{unless}", "override": override}


def lengthen_split(health: Health, split: str, rarer: int, needed: int) -> Advice:
    """Start a split earlier, so that it has as many labels as needed if their rate stays the same."""
    splits = health["overview"]["splits"]
    before, key = {"test": ("validation", "validation_end"), "validation": ("train", "train_end")}[split]
    what = f"begin the {split} rows earlier, or take a log of more rows"
    if health["overview"]["first_request"] is None or not rarer:
        return change(what)
    first, last = (_time(splits[split][name]) for name in ("first_request", "last_request"))
    start = last - (last - first) * (1.2 * needed / rarer)
    is_possible = start > _time(splits[before]["first_request"]) + timedelta(days=1)
    return change(what, f"split.{key}", start.date()) if is_possible else change(what)


def know_more(feature: Health, health: Health) -> Iterator[Advice]:
    """A larger vocabulary where ids were left out of it, counters that learn of new ids, later rows."""
    settings, vocabulary = feature["settings"], feature["vocabulary"] or {"distinct": 0, "known": 0}
    owner, columns = f"features.{settings.get('table') or feature['name']}", feature["columns"]
    labels = health["overview"]["splits"]["train"]["tasks"]
    tasks = [name for name, task in labels.items() if KINDS[task["kind"]].is_binary]
    counters = [each["name"] for each in health["features"] if each["kind"] == "counter" and each["columns"] == columns]
    if feature["kind"] == "id" and counters:
        why = f", as `{counters[0]}` counts by the same column, and goes on learning while a model serves"
        yield leave_out(feature, health, why)
    elif feature["kind"] == "id" and tasks and health["overview"]["first_request"] is not None:
        counter = f"{{kind: counter, task: {tasks[0]}, by: {json.dumps(columns)}, outputs: [rate, rows]}}"
        what = "count what is known of each id: counters go on learning while a model serves"
        yield change(what, f"features.{feature['name']}_counts", counter)
    if vocabulary["distinct"] > vocabulary["known"] and (feature["unknown"]["train"] or 0.0) > _LEFT_OUT:
        if settings.get("max_size") is not None and vocabulary["known"] >= settings["max_size"]:
            yield change("keep more ids than the most frequent ones", f"{owner}.max_size")
        elif settings.get("min_count", 1) > 1:
            least = SELDOM_ROWS if settings["min_count"] > SELDOM_ROWS else 1
            what = f"give more ids a row of their own, which they have from {settings['min_count']} rows on"
            yield change(what, f"{owner}.min_count", least)
    describe_too = "describe it by other columns too, and " if feature["is_key"] else ""
    yield change(f"{describe_too}train on later rows, and more often (`mmoe-rec refresh`)")


def make_steady(feature: Health, health: Health, grows: bool, has_new_ids: bool) -> Iterator[Advice]:
    """Windows for counts of all of the past, which grow; a later start where the past was empty at first."""
    overview, settings = health["overview"], feature["settings"]
    train = overview["splits"]["train"]
    if overview["first_request"] is None or feature["kind"] not in ("counter", "history"):
        yield change("see whether its column changed, and train on later rows")
        return
    if has_new_ids:
        yield change("its ids are new: train on later rows, and more often (`mmoe-rec refresh`)")
        return
    first, last = _time(train["first_request"]), _time(train["last_request"])
    days = (last - first) / timedelta(days=1)
    most = days / _PERIODS
    windows = [each for each in settings.get("window_days") or () if each is not None]  # its own without the total
    windows = windows or [each for each in _WINDOWS if each <= most] or [max(1, int(most))]
    if grows:
        key = f"features.{feature['name']}"
        yield change("count over windows", f"{key}.window_days", f"[{', '.join(f'{each:g}' for each in windows)}]")
        if settings["task"] is not None and "rate" not in settings["outputs"]:
            yield change("or take the rate, which does not grow", f"{key}.outputs", "[rate, recency]")
    if first - _time(overview["first_request"]) < timedelta(days=1) < last - first:
        start = (first + timedelta(days=min(max(windows), days / 2))).date()
        yield change("try to train on rows from when the past has filled", "split.train_start", start)


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)
