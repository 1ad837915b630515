"""The report of a data set's health."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from matplotlib.ticker import FuncFormatter, MaxNLocator

from mmoe_rec.atomic import write_text
from mmoe_rec.profiling.health_findings import DRIFT_PSI, LEAK_AUC, STRONG_DRIFT_PSI, describe_shift, worst_drift
from mmoe_rec.report.charts import COLORS, new_figure, style_axes, to_svg
from mmoe_rec.report.formatting import (
    NO_VALUE,
    describe_conflicting_times,
    describe_pending_labels,
    format_count,
    format_fixed,
    format_minute,
    format_percent,
    format_rate,
)
from mmoe_rec.report.parts import Cell, Figure, Mark, Report, Row, Sentence, Table
from mmoe_rec.report.report_files import write_report
from mmoe_rec.task_kinds import KINDS

HEALTH_FILE = "health.json"
_DRAWN = 12  # features whose drift is drawn
_SHOWN = 5  # warnings that the terminal shows
_MEASURES = {
    "PSI": "Population stability index between training and test rows: below .1 stable, above .25 strong drift. "
    "Numbers have about 20 bins of equal training mass. Ids have bins for the most frequent ids, unknown, missing, and "
    "all others. The PSI that rows have by chance is subtracted.",
    "AUC": "How well the feature alone ranks the validation rows of a task: .5 is chance. An id ranks by the rate of "
    "its table row in training rows. A regression's label counts as positive above its mean in training.",
    "Order of findings": "Problems first. Warnings by their rough cost: the share of the test rows that they spoil "
    "times how well the feature alone ranks validation rows (2 AUC - 1).",
}


def write_health(health: Mapping[str, Any], folder: Path) -> None:
    """Write `health.json` with all values, and the report. Raises UserError if the folder can't be made."""
    report = make_report(health)
    write_text(folder / HEALTH_FILE, json.dumps(health, indent=1, allow_nan=False))
    write_report(report, folder)


def make_report(health: Mapping[str, Any]) -> Report:
    """Build the report of a health, as `mmoe_rec.profiling.data_health` describes it."""
    overview, findings = health["overview"], health["findings"]
    severities = [each["severity"] for each in findings]
    mark: Mark = "problem" if "problem" in severities else "warning" if severities else "good"
    shown = severities.count("problem") + _SHOWN
    sentences = [
        Sentence(f"left out: {each['file']}: {each['reason']}", "problem", "file") for each in overview["skipped"]
    ]
    sentences += [
        Sentence(each["message"], each["severity"], each["check"], page_only=place >= shown)
        for place, each in enumerate(findings)
    ]
    if len(findings) > shown:
        sentences.append(Sentence(f"{len(findings) - shown} more warnings, which cost less, are in the report"))
    sentences += [Sentence(each, "note") for each in describe_time_issues(overview)]
    return Report(
        title=f"Data set health: {health['name']}",
        headline=health["headline"],
        mark=mark,
        about=_about(overview),
        figures=[*_weeks(health), *_drift(health["features"])],
        tables=[*_splits(overview), _features(health)],
        sentences=sentences,
        measures=_MEASURES,
        identity={"features": health["fingerprint"]},
    )


def _about(overview: Mapping[str, Any]) -> str:
    files, times = overview["files"] or 0, "without times"
    if overview["first_request"]:
        times = (
            f"requests from {format_minute(overview['first_request'])} to {format_minute(overview['last_request'])} UTC"
        )
    return f"{overview['log'] or NO_VALUE}: {files:,} file{'s' * (files != 1)}, {overview['rows'] or 0:,} rows, {times}"


def describe_time_issues(overview: Mapping[str, Any]) -> list[str]:
    """Describe requests of several times, and labels that have not matured.

    Args:
        overview: The log and its splits, as in a health.
    """
    told = describe_conflicting_times(overview["requests"])
    return [each for each in (told,) if each] + [
        f"{name}: {describe_pending_labels(task, number, split['labels_known_by'])}"
        for name, split in overview["splits"].items()
        for task, number in split["pending_labels"].items()
    ]


def _splits(overview: Mapping[str, Any]) -> Iterator[Table]:
    splits, who = overview["splits"], ("rows", "requests", "users", "candidates")
    rows = [
        (
            name,
            f"{format_minute(each['first_request'])} to {format_minute(each['last_request'])}",
            *(format_count(each[of]) for of in who),
        )
        for name, each in splits.items()
    ]
    if overview["first_request"] is None:
        yield Table("Splits", ("split", *who), [(row[0], *row[2:]) for row in rows])
    else:
        yield Table("Splits", ("split", "requests from", *who), rows, left=2)
    labels = list[Row]()
    for name in next(iter(splits.values()))["tasks"]:
        tasks = [each["tasks"][name] for each in splits.values()]
        labels.append((name, *(Cell(format_rate(t["rate"], t["kind"]), f"of {t['observed']:,}") for t in tasks)))
    yield Table("Labels", ("task", *splits), labels, "rate (or mean) of the observed labels")


def _features(health: Mapping[str, Any]) -> Table:
    heads = ("feature", "flags", "has value", "unknown in test", "PSI", "AUC")
    rows = list[Row]()
    for each in health["features"]:
        best = max((auc for auc in each["auc"].values() if auc is not None), default=None)
        mark: Mark = "problem" if (best or 0) > LEAK_AUC else ""
        rows.append(
            (
                each["name"],
                ", ".join(found["check"] for found in health["findings"] if found["about"] == each["name"]),
                format_percent(each["coverage"]["train"]),
                format_percent(each["unknown"]["test"]),
                _psi_cell(each["psi"]),
                Cell(format_fixed(best), "", mark),
            )
        )
    return Table("Features", heads, rows, "PSI: drift to test; AUC: the feature alone, of its best task", left=2)


def _psi_cell(psi: float | None) -> Cell:
    mark: Mark = "problem" if (psi or 0) > STRONG_DRIFT_PSI else "warning" if (psi or 0) > DRIFT_PSI else ""
    return Cell(format_fixed(psi, 2), "", mark)


def _weeks(health: Mapping[str, Any]) -> Iterator[Figure]:
    if health["weeks"]:
        for name, task in next(iter(health["overview"]["splits"].values()))["tasks"].items():
            note = f"{KINDS[task['kind']].mean_label_name}, and observed rows; weeks start on Monday, 00:00 UTC"
            yield Figure(f"{name} by week", draw_label_rates(health["weeks"], name), note)


def draw_label_rates(weeks: list[dict[str, Any]], task: str) -> str:
    """Draw the rate of a task's label by week, above its observed rows. Each split has a color."""
    figure = new_figure(12.8, 3.6)
    line, bars = map(style_axes, figure.subplots(2, 1, sharex=True, height_ratios=[4, 1]))
    below, rates, kind = Counter[int](), list[float](), ""
    for split in dict.fromkeys(split for week in weeks for split in week["splits"]):
        labels = {
            place: week["splits"][split]["tasks"][task] for place, week in enumerate(weeks) if split in week["splits"]
        }
        known = {place: each["rate"] for place, each in labels.items() if each["rate"] is not None}
        rows = {place: each["observed"] for place, each in labels.items()}
        line.plot(list(known), list(known.values()), color=COLORS[split], linewidth=2, marker="o", label=split)
        line.axvspan(min(rows) - 0.5, max(rows) + 0.5, color=COLORS[split], alpha=0.08, linewidth=0)
        bottom = [below[place] for place in rows]
        bars.bar(list(rows), list(rows.values()), 0.72, bottom, color=COLORS[split], alpha=0.45)
        below.update(rows)
        rates += known.values()
        kind = next(iter(labels.values()))["kind"]
    line.set_ylim(bottom=min([*rates, 0.0]))  # Noise must not look like news.
    line.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    shown = (lambda rate, _: f"{100 * rate:.3g}%") if KINDS[kind].is_binary else (lambda rate, _: f"{rate:.4g}")
    line.yaxis.set_major_formatter(FuncFormatter(shown))
    line.legend(loc="upper left", ncols=3, frameon=False, fontsize=9, labelcolor="linecolor")
    most = max([*below.values(), 1])
    bars.set_yticks([0, most], ["rows", f"{most:,}"])
    every = range(0, len(weeks), -(-len(weeks) // 12))
    bars.set_xticks(every, [date.fromisoformat(weeks[place]["week"]).strftime("%-d %b %y") for place in every])
    return to_svg(figure, f"rate of {task} by week")


def _drift(features: Sequence[Mapping[str, Any]]) -> Iterator[Figure]:
    """Draw the features that drift most, each by its worst input."""
    worst = filter(None, map(worst_drift, features))
    for each in sorted(worst, key=lambda each: -float(each["psi"]))[:_DRAWN]:
        figure, places = new_figure(5.6, 2.6), range(len(each["bins"]))
        axes = style_axes(figure.subplots())
        for split, shift in (("train", -0.2), ("test", 0.2)):
            shares = [part[split] for part in each["bins"]]
            axes.bar([place + shift for place in places], shares, 0.4, color=COLORS[split], label=split)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
        names = [part["bin"] for part in each["bins"]]
        named = {places[0], places[-1], *(place for place in places if names[place] in ("all others", "unknown"))}
        ticks = sorted(named) if each["table"] else [places[0], places[-1]]
        axes.set_xticks(ticks, [names[place][:24] for place in ticks], rotation=20, ha="right")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=9)
        label = f"shares of training and test rows in the bins of {each['name']}"
        yield Figure(f"{each['name']}: PSI {each['psi']:.2f}", to_svg(figure, label), describe_shift(each))
