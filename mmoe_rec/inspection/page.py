"""The health of a data set as one HTML page that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmoe_rec.inspection.charts import shares_chart, weeks_chart
from mmoe_rec.inspection.explanations import CHECKS, MEASURES
from mmoe_rec.inspection.feature_table import feature_table, psi_badge
from mmoe_rec.inspection.findings import drift_beyond_noise, moved, shown_and_folded
from mmoe_rec.inspection.formatting import NONE, count, day, percent, rate, requests_told, unmatured_told
from mmoe_rec.inspection.markup import Markup, breakable, joined, prose, tag
from mmoe_rec.inspection.tables import embedding_tables, grid

_DRAWN = 12  # features whose drift is drawn

_SECTIONS = {
    "rows": "Rows and labels",
    "weeks": "Labels by week",
    "features": "Features",
    "drift": "Drift",
    "tables": "Embedding tables",
    "measures": "How it is measured",
}


def page(health: dict[str, Any]) -> str:
    """The whole page."""
    css = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    title = f"Data set health: {health['name']}"
    bodies = {
        "rows": _rows(health["overview"]),
        "weeks": _weeks(health),
        "features": feature_table(health),
        "drift": _drift(health["features"]),
        "tables": embedding_tables(health["tables"]),
        "measures": tag("div", _definitions(MEASURES), class_="card"),
    }
    links = [tag("a", words, href=f"#{name}") for name, words in _SECTIONS.items()]
    parts = [tag("h2", words, id=name) + bodies[name] for name, words in _SECTIONS.items()]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(css)),
    )
    top = [tag("h1", title), _subtitle(health["overview"]), tag("nav", *links), _verdict(health["findings"])]
    main = tag("main", *top, *map(Markup, parts))
    return "<!doctype html>\n" + tag("html", head, tag("body", main), lang="en") + "\n"


def _subtitle(overview: dict[str, Any]) -> Markup:
    period = f", requests from {day(overview['first_request'])} to {day(overview['last_request'])} UTC"
    return tag("p", tag("code", overview["log"] or NONE), period, class_="muted")


def _verdict(findings: list[dict[str, Any]]) -> Markup:
    if not findings:
        words = "No leaking or constant feature, no strong drift, no label that is missing or has changed much."
        return tag("div", tag("strong", "Nothing suspicious found"), tag("p", words), class_="card verdict")
    numbers = {word: sum(each["severity"] == word for each in findings) for word in ("problem", "warning")}
    said = [f"{number} {word}{'s' * (number != 1)}" for word, number in numbers.items() if number]
    shown, folded = shown_and_folded(findings)
    parts = [tag("strong", f"{' and '.join(said)} found"), _checks(shown)]
    if folded:
        words = f"{len(folded)} more warnings, which cost less"
        parts.append(tag("details", tag("summary", words), _checks(folded)))
    return tag("div", *parts, class_=f"card verdict {findings[0]['severity']}")


def _checks(findings: list[dict[str, Any]]) -> Markup:
    names = dict.fromkeys(each["check"] for each in findings)
    items = [_check(name, [each for each in findings if each["check"] == name]) for name in names]
    return tag("ul", *items, class_="findings")


def _check(name: str, findings: list[dict[str, Any]]) -> Markup:
    title, advice = CHECKS[name]
    badge = tag("span", str(len(findings)), class_=f"badge {findings[0]['severity']}")
    messages = [tag("li", prose(_sentence(each["message"]))) for each in findings]
    return tag("li", tag("h3", badge, title), tag("p", prose(advice), class_="muted small"), tag("ul", *messages))


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:]


def _rows(overview: dict[str, Any]) -> Markup:
    parts = []
    if overview["left_out"]:
        files = [[tag("code", each["file"]), each["reason"]] for each in overview["left_out"]]
        title = tag("h3", tag("span", str(len(files)), class_="badge problem"), " files of the log left out")
        parts.append(tag("div", title, grid([("file", ""), ("reason", "")], files), class_="card"))
    notes = [told] if (told := requests_told(overview["requests"])) else []
    notes += [
        f"{name}: {unmatured_told(task, number, split['labels_known_by'])}"
        for name, split in overview["splits"].items()
        for task, number in split["unmatured"].items()
    ]
    if notes:
        parts.append(tag("div", tag("ul", *(tag("li", note) for note in notes)), class_="card"))
    outside = (overview["rows"] or 0) - overview["rows_in_splits"]
    numbers = {
        "files": overview["files"],
        "rows in the log": overview["rows"],
        "rows in the three splits": overview["rows_in_splits"],
        "rows before or after them": outside if overview["rows"] is not None else None,
    }
    tiles = [
        tag("div", tag("b", NONE if value is None else f"{value:,}"), tag("span", words), class_="card tile")
        for words, value in numbers.items()
    ]
    tasks = list(next(iter(overview["splits"].values()))["tasks"])
    hint = "Observed labels, their share of the rows, and how many of them are positive (or their mean)"
    columns = [("split", ""), ("requests from", ""), ("to", ""), ("rows", ""), ("requests", ""), ("users", "")]
    columns += [("candidates", ""), *((task, hint) for task in tasks)]
    rows = [
        [
            tag("b", name),
            _moment(split["first_request"]),
            _moment(split["last_request"]),
            f"{split['rows']:,}",
            *(count(split[who]) for who in ("requests", "users", "candidates")),
            *(_labels(task) for task in split["tasks"].values()),
        ]
        for name, split in overview["splits"].items()
    ]
    parts += [tag("div", *tiles, class_="tiles"), tag("div", grid(columns, rows, numbers_from=3), class_="card")]
    return joined(*parts)


def _labels(task: dict[str, Any]) -> Markup:
    observed = f"{task['observed']:,} observed, {percent(task['share_observed'])}"
    return joined(tag("b", rate(task["rate"], task["kind"])), tag("br"), tag("span", observed, class_="muted small"))


def _legend(*splits: str) -> Markup:
    return tag(
        "p",
        *(joined(tag("span", class_=f"key {split}"), words) for split, words in zip(splits, splits, strict=True)),
        class_="muted small",
    )


def _weeks(health: dict[str, Any]) -> Markup:
    tasks = next(iter(health["overview"]["splits"].values()))["tasks"]
    words = {"binary": "share of positive labels", "regression": "mean label"}
    cards = [
        tag(
            "div",
            tag("div", tag("h3", name), tag("span", words[task["kind"]], class_="muted small"), class_="title"),
            tag("div", weeks_chart(health["weeks"], name), class_="scroll"),
            class_="card",
        )
        for name, task in tasks.items()
    ]
    note = "Line: rate among observed labels; bars: observed rows. Weeks start on Monday, 00:00 UTC."
    return joined(tag("p", note, class_="muted small"), tag("div", *cards, class_="stack"))


def _drift(features: list[dict[str, Any]]) -> Markup:
    inputs = [(feature, each) for feature in features for each in feature["inputs"] if each["psi"] is not None]
    worst: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for feature, each in sorted(inputs, key=lambda pair: -drift_beyond_noise(pair[1])):
        worst.setdefault(feature["name"], (feature, each))
    cards = [
        tag(
            "div",
            tag("div", tag("h3", breakable(each["name"])), psi_badge(each["psi"], "PSI "), class_="title"),
            shares_chart(each["bins"], ordered=each["table"] is None),
            tag("p", _sentence(moved(each)), class_="muted small"),
            class_="card",
        )
        for _, each in list(worst.values())[:_DRAWN]
    ]
    note = "The features that drift most, each by its worst input: shares of the rows in the same bins. Point at a bar."
    return joined(tag("p", note, class_="muted small"), _legend("train", "test"), tag("div", *cards, class_="charts"))


def _definitions(words: dict[str, str]) -> Markup:
    return tag("dl", *(joined(tag("dt", name), tag("dd", prose(meaning))) for name, meaning in words.items()))


def _moment(time: str) -> Markup:
    when, clock = day(time).split(" ")
    return joined(tag("span", when, class_="still"), " ", tag("span", clock, class_="muted small"))
