"""The report of a data set's health."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from matplotlib.ticker import FuncFormatter, MaxNLocator

from mmoe_rec.atomic import write_text
from mmoe_rec.profiling.health_findings import (
    DRIFT_PSI,
    LEAK_AUC,
    STRONG_DRIFT_PSI,
    Severity,
    describe_shift,
    worst_drift,
)
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
_MAX_DRIFT_FIGURES = 12
_MAX_TERMINAL_WARNINGS = 5
_MEASURES = {
    "PSI": "Population stability index between training and test rows: below .1 stable, above .25 strong drift. "
    "Numbers have about 20 bins with equal training rows. IDs have bins for the most frequent IDs, unknown, missing, "
    "and all others. The PSI expected by chance is subtracted.",
    "AUC": "How well the feature alone ranks the validation rows of a task: .5 is chance. An ID is ranked by its rate "
    "in training rows. The label of a regression counts as positive above its mean in training.",
    "Order of findings": "Problems first, then warnings by rough cost: the fraction of the test rows that they harm "
    "times the ranking power of the feature alone on validation rows (2 AUC - 1).",
}


def write_health(health: Mapping[str, Any], folder: Path) -> None:
    """Write `health.json` with all values, and the report.

    Args:
        health: Result of `measure_health`.
        folder: Folder to write to.

    Raises:
        UserError: The folder can't be created.
    """
    report = make_report(health)
    write_text(folder / HEALTH_FILE, json.dumps(health, indent=1, allow_nan=False))
    write_report(report, folder)


def make_report(health: Mapping[str, Any]) -> Report:
    """Build the report from a result of `mmoe_rec.profiling.data_health.measure_health`."""
    overview, findings = health["overview"], health["findings"]
    severities = [finding["severity"] for finding in findings]
    mark: Mark = "problem" if Severity.PROBLEM in severities else "warning" if severities else "good"
    shown = severities.count(Severity.PROBLEM) + _MAX_TERMINAL_WARNINGS
    skipped = [f"skipped: {file['file']}: {file['reason']}" for file in overview["skipped"]]
    sentences = [Sentence(text, "problem", "file") for text in skipped]
    sentences += [
        Sentence(finding["message"], finding["severity"], finding["check"], page_only=index >= shown)
        for index, finding in enumerate(findings)
    ]
    if len(findings) > shown:
        sentences.append(Sentence(f"{len(findings) - shown} less harmful warnings are in the report"))
    sentences += [Sentence(issue, "note") for issue in _describe_time_issues(overview)]
    return Report(
        title=f"Data set health: {health['name']}",
        headline=health["headline"],
        mark=mark,
        about=_describe_log(overview),
        figures=[*_draw_weeks(health), *_draw_drift(health["features"])],
        tables=[*_split_tables(overview), _feature_table(health)],
        sentences=sentences,
        measures=_MEASURES,
        identity={"features": health["fingerprint"]},
    )


def _describe_log(overview: Mapping[str, Any]) -> str:
    files, times = overview["files"] or 0, "without times"
    if first := overview["first_request"]:
        times = f"requests from {format_minute(first)} to {format_minute(overview['last_request'])} UTC"
    return f"{overview['log'] or NO_VALUE}: {files:,} file{'s' * (files != 1)}, {overview['rows'] or 0:,} rows, {times}"


def _describe_time_issues(overview: Mapping[str, Any]) -> list[str]:
    conflicts = describe_conflicting_times(overview["requests"])
    return ([conflicts] if conflicts else []) + [
        f"{name}: {describe_pending_labels(task, number, split['labels_observed_until'])}"
        for name, split in overview["splits"].items()
        for task, number in split["pending_labels"].items()
    ]


def _split_tables(overview: Mapping[str, Any]) -> Iterator[Table]:
    splits, kinds = overview["splits"], ("rows", "requests", "users", "candidates")
    rows = list[Row]()
    for name, split in splits.items():
        times = f"{format_minute(split['first_request'])} to {format_minute(split['last_request'])}"
        rows.append((name, times, *(format_count(split[kind]) for kind in kinds)))
    if overview["first_request"] is None:
        yield Table("Splits", ("split", *kinds), [(row[0], *row[2:]) for row in rows])
    else:
        yield Table("Splits", ("split", "requests from", *kinds), rows, text_columns=2)
    labels = list[Row]()
    for name in next(iter(splits.values()))["tasks"]:
        tasks = [split["tasks"][name] for split in splits.values()]
        labels.append((name, *(Cell(format_rate(t["rate"], t["kind"]), f"of {t['observed']:,}") for t in tasks)))
    yield Table("Labels", ("task", *splits), labels, "rate (or mean) of the observed labels")


def _feature_table(health: Mapping[str, Any]) -> Table:
    heads = ("feature", "flags", "has value", "unknown in test", "PSI", "AUC")
    rows = list[Row]()
    for feature in health["features"]:
        best = max((auc for auc in feature["auc"].values() if auc is not None), default=None)
        mark: Mark = "problem" if (best or 0) > LEAK_AUC else ""
        name, psi, auc = feature["name"], _psi_cell(feature["psi"]), Cell(format_fixed(best), "", mark)
        flags = ", ".join(finding["check"] for finding in health["findings"] if finding["subject"] == name)
        coverage, unknown = format_percent(feature["coverage"]["train"]), format_percent(feature["unknown"]["test"])
        rows.append((name, flags, coverage, unknown, psi, auc))
    note = "PSI measures drift to test rows. AUC is the feature's alone, on its best task"
    return Table("Features", heads, rows, note, text_columns=2)


def _psi_cell(psi: float | None) -> Cell:
    mark: Mark = "problem" if (psi or 0) > STRONG_DRIFT_PSI else "warning" if (psi or 0) > DRIFT_PSI else ""
    return Cell(format_fixed(psi, 2), "", mark)


def _draw_weeks(health: Mapping[str, Any]) -> Iterator[Figure]:
    if health["weeks"]:
        for name, task in next(iter(health["overview"]["splits"].values()))["tasks"].items():
            note = f"{KINDS[task['kind']].mean_label_name}, and observed rows; weeks start on Monday, 00:00 UTC"
            yield Figure(f"{name} by week", draw_label_rates(health["weeks"], name), note)


def draw_label_rates(weeks: list[dict[str, Any]], task: str) -> str:
    """Draw the rate of a task's label by week, above bars of its observed rows, with a color for each split.

    Args:
        weeks: Labels by week, as in `health.json`.
        task: Name of the task.

    Returns:
        An `svg` element.
    """
    figure = new_figure(12.8, 3.6)
    line, bars = map(style_axes, figure.subplots(2, 1, sharex=True, height_ratios=[4, 1]))
    below, rates, kind = Counter[int](), list[float](), ""
    for split in dict.fromkeys(split for week in weeks for split in week["splits"]):
        labels = {x: week["splits"][split]["tasks"][task] for x, week in enumerate(weeks) if split in week["splits"]}
        split_rates = {x: counts["rate"] for x, counts in labels.items() if counts["rate"] is not None}
        rows = {x: counts["observed"] for x, counts in labels.items()}
        color = COLORS[split]
        line.plot(list(split_rates), list(split_rates.values()), color=color, linewidth=2, marker="o", label=split)
        line.axvspan(min(rows) - 0.5, max(rows) + 0.5, color=color, alpha=0.08, linewidth=0)
        bottom = [below[x] for x in rows]
        bars.bar(list(rows), list(rows.values()), 0.72, bottom, color=color, alpha=0.45)
        below.update(rows)
        rates += split_rates.values()
        kind = next(iter(labels.values()))["kind"]
    line.set_ylim(bottom=min([*rates, 0.0]))  # A scale from 0 keeps noise from looking like a change.
    line.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    shown = (lambda rate, _: f"{100 * rate:.3g}%") if KINDS[kind].is_binary else (lambda rate, _: f"{rate:.4g}")
    line.yaxis.set_major_formatter(FuncFormatter(shown))
    line.legend(loc="upper left", ncols=3, frameon=False, fontsize=9, labelcolor="linecolor")
    max_rows = max([*below.values(), 1])
    bars.set_yticks([0, max_rows], ["rows", f"{max_rows:,}"])
    ticks = range(0, len(weeks), -(-len(weeks) // 12))
    bars.set_xticks(ticks, [date.fromisoformat(weeks[x]["week"]).strftime("%-d %b %y") for x in ticks])
    return to_svg(figure, f"rate of {task} by week")


def _draw_drift(features: Sequence[Mapping[str, Any]]) -> Iterator[Figure]:
    """Draw the features with the strongest drift, each by the bins of its input with the highest PSI."""
    worst = filter(None, map(worst_drift, features))
    for counts in sorted(worst, key=lambda counts: -float(counts["psi"]))[:_MAX_DRIFT_FIGURES]:
        figure, bars = new_figure(5.6, 2.6), range(len(counts["bins"]))
        axes = style_axes(figure.subplots())
        for split, shift in (("train", -0.2), ("test", 0.2)):
            fractions = [bin_[split] for bin_ in counts["bins"]]
            axes.bar([x + shift for x in bars], fractions, 0.4, color=COLORS[split], label=split)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda fraction, _: f"{fraction:.0%}"))
        names = [bin_["bin"] for bin_ in counts["bins"]]
        named = {bars[0], bars[-1], *(x for x in bars if names[x] in ("all others", "unknown"))}
        ticks = sorted(named) if counts["table"] else [bars[0], bars[-1]]
        axes.set_xticks(ticks, [names[x][:24] for x in ticks], rotation=20, ha="right")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=9)
        label = f"fractions of training and test rows in the bins of {counts['name']}"
        yield Figure(f"{counts['name']}: PSI {counts['psi']:.2f}", to_svg(figure, label), describe_shift(counts))
