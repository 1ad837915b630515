"""What is told on the terminal: tables of evaluations and validations, and of a data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from mmoe_rec.evaluation import metrics as every
from mmoe_rec.evaluation.comparison import Comparison, Results
from mmoe_rec.evaluation.intervals import LEVEL, Difference, Interval
from mmoe_rec.evaluation.metrics.metric import Named
from mmoe_rec.evaluation.summary import CATALOGUE, SCORE, Summary, rows_of_catalogue, rows_of_metrics
from mmoe_rec.profiling.advice import NOTE
from mmoe_rec.profiling.health_findings import DRIFT, LEAK_AUC, STRONG_DRIFT, flags_of, split_findings
from mmoe_rec.report.findings import find_all
from mmoe_rec.report.formatting import day, fixed, percent, rate, signed, size
from mmoe_rec.report.sentences import describe_results, describe_rows

if TYPE_CHECKING:
    from mmoe_rec.settings.sections import Settings
    from mmoe_rec.training.checkpoint import FinishedTraining
    from mmoe_rec.training.validation import Validation

_VALIDATIONS = {"loss ↓": "loss", "auc ↑": "auc", "gauc ↑": "gauc", "calibration → 1": "calibration"}
_TITLED: dict[str, Any] = {"title_justify": "left", "title_style": "bold"}
_NAME = 32  # letters of a name before it may be broken


def show_results(results: Results) -> Iterator[Table | str]:
    """Tables, verdicts, notes and warnings of an evaluation."""
    yield results_table(results.summaries)
    if results.comparison is not None:
        yield differences_table(results.comparison, results.first.summary)
    yield from describe_results(results, find_all(results))


def results_table(columns: Mapping[str, Summary]) -> Table:
    """One row a headline metric, one column a model; the best value of a row is bold. Three models fit into 80 columns.

    Of how well a task's prediction ranks each request's rows there is only GAUC; `metrics.json` has all. Values stand
    with half the width of their 95% interval, whose ends need not lie evenly. What is undefined is a dash; a note says
    why.
    """
    summaries = list(columns.values())
    units = "rows" if all(each.each_row_is_a_user for each in summaries) else "users"
    table = Table(header_style="bold", caption=f"± half the 95% interval, bootstrap over {units}")
    _add_columns(table, columns)
    for section in (*{name: None for summary in summaries for name in summary.tasks}, SCORE):
        rows = rows_of_metrics(summaries, section).items()
        shown = {metric: _cells(metric, values) for metric, values in rows if metric.is_shown(section == SCORE)}
        _add_section(table, section, shown)
    of_all = {each: _cells(each, values) for each, values in rows_of_catalogue(summaries).items() if each.is_headline}
    _add_section(table, CATALOGUE, of_all)
    return table


def differences_table(compared: Comparison, summary: Summary) -> Table:
    """One row a headline metric, one column another model. summary: of the model.

    A difference that is significant after Holm's correction is bold: green where the model is better, red where it is
    worse; of what should be 1, a word says which.
    """
    caption = f"± half the 95% interval; bold: shown (p < {LEVEL:g}, corrected)"
    table = Table(title=Text(f"Differences: {compared.model} minus"), **_TITLED, header_style="bold", caption=caption)
    _add_columns(table, compared.against)
    others = [each.groups for each in compared.against.values()]
    for group in dict.fromkeys(name for each in others for name in each):
        rows: dict[Named, list[Text]] = {}
        for metric in every.METRICS:
            found = [each.get(group, {}).get(metric.name) for each in others]
            is_undefined = all(each is None or each.value is None for each in found)
            if any(found) and metric.is_shown(group == SCORE) and not (metric.ranks_within and is_undefined):
                value = summary.groups[group].get(metric.name).value
                rows[metric] = [_difference_cell(each, metric, value) for each in found]
        _add_section(table, group, rows)
    return table


def _add_columns(table: Table, names: Iterable[str]) -> None:
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(Text(name), justify="right", no_wrap=True)


def _add_section(table: Table, name: str, rows: Mapping[Any, Sequence[Text]]) -> None:
    """Rows of metrics below a heading, if there are any."""
    if rows:
        table.add_row(Text(name, style="bold"))
    for place, (metric, cells) in enumerate(rows.items(), start=1):
        table.add_row(f"  {metric.label}", *cells, end_section=place == len(rows))


def _cells(metric: Named, intervals: Sequence[Interval]) -> list[Text]:
    losses = [float("inf") if each.value is None else metric.loss(each.value) for each in intervals]
    best = min(losses) if len(intervals) > 1 else None
    cells = []
    for each, loss in zip(intervals, losses, strict=True):
        if each.value is None:
            cells.append(Text("-", style="dim"))
            continue
        text = Text(metric.shown(each.value), style="bold" if loss == best else "")
        if each.low is not None and each.high is not None:
            text.append(f" ±{metric.shown((each.high - each.low) / 2)}", style="not bold dim")
        cells.append(text)
    return cells


def _difference_cell(apart: Difference | None, metric: Named, value: float | None) -> Text:
    """value: of the model."""
    if apart is None or apart.value is None or value is None:
        return Text("-", style="dim")
    is_gain = metric.loss(value) < metric.loss(value - apart.value)
    style = f"bold {'green' if is_gain else 'red'}" if apart.is_significant else ""
    shown, *half = signed(apart.value, *(() if apart.high is None else (apart.high - apart.value,)))
    reach = "".join(f" ±{each.removeprefix('+')}" for each in half)
    text = Text(shown, style=style).append(reach, style="not bold dim")
    is_told = metric.better == "one" and apart.is_significant
    return text.append(" closer" if is_gain else " further") if is_told else text


def validations_table(
    history: Sequence[tuple[int, Validation]], best_step: int, served: Validation, network: Validation | None = None
) -> Table:
    """Build a table with a row for each step and task, and the model below. What is undefined is a dash.

    Args:
        history: Step and validation of the network alone, in order.
        best_step: Step whose state was chosen.
        served: The model as it is served, on validation rows that chose nothing.
        network: The network alone on the same rows, if the model has trees.
    """
    caption = (
        "steps: the network alone, on the selecting rows; below: the network alone and the model as it is served, on "
        "the judging rows, those of the other validation users; gauc: by user; calibration: predicted / observed"
    )
    table = _plain_table("Validations", ["step", "task"], list(_VALIDATIONS), caption)
    rows = {f"{step:,}{' chosen' if step == best_step else ''}": found for step, found in history}
    judged = {"served": served} if network is None else {"network": network, "served": served}
    for label, found in {**rows, **judged}.items():
        names = dict.fromkeys([*found.loss, *found.auc])
        style = "bold" if label == "served" else ""
        for place, name in enumerate(names):
            values = [getattr(found, metric).get(name) for metric in _VALIDATIONS.values()]
            cells = ["-" if value is None else f"{value:.4f}" for value in values]
            last = place == len(names) - 1
            table.add_row("" if place else label, Text(name), *cells, style=style, end_section=last)
    return table


def describe_training(trained: FinishedTraining, settings: Settings) -> Iterator[Table | str]:
    """What people are told of a training that has ended: all validations, why a state was chosen, warnings, speed."""
    from mmoe_rec.inference.artifact import read_artifact
    from mmoe_rec.training.checkpoint import latest_checkpoint
    from mmoe_rec.training.validation import explain_choice, warnings_of

    if trained.before:
        yield "this training has already ended, and what follows was so then; without --resume a new one begins"
    if trained.started_from is not None:
        values = trained.started_from.flat().items()
        text = ", ".join(f"{name.removeprefix('validation/')} {value:.4f}" for name, value in values)
        yield f"validation of the network that it was started from, on the selecting rows: {text}"
    if (checkpoint := latest_checkpoint(trained.artifact.parent / "checkpoints")) is not None:
        history = checkpoint.state.history
        yield validations_table(history, trained.best_step, trained.best, trained.network)
        yield from explain_choice(dict(history)[trained.best_step], trained.best_step, settings.training.select_by)
    if early_end := read_artifact(trained.artifact, verify=False).early_end:
        yield f"warning: the model {early_end}"
    for warning in warnings_of(trained.best, settings.training.calibration):
        yield f"warning: {warning}"
    if note := trained.best.experts.note(settings.model.gates.rule):
        yield f"note: {note}"
    if trained.rows_per_s:  # else all steps were done before, and the rest was left
        yield f"{trained.rows_per_s:,.0f} rows/s in training, {trained.waiting:.1%} of the time spent waiting for data"
    yield from trained.compared


def show_health(health: dict[str, Any]) -> Iterator[RenderableType]:
    """The health of a data set in 80 columns: splits, labels, features, tables, then findings."""
    overview = health["overview"]
    splits, times = overview["splits"], f"{day(overview['first_request'])} to {day(overview['last_request'])} UTC"
    yield Text(
        f"{overview['files'] or 0:,} file{'s' * (overview['files'] != 1)}, {overview['rows'] or 0:,} rows, "
        f"{times if overview['first_request'] else 'without times'}"
    )
    for note in describe_rows(overview):
        yield Text(note, style="yellow")
    who = ("requests", "users", "candidates")
    table = _plain_table("Splits", ["split"], ["rows", *who])
    for split, each in splits.items():
        table.add_row(split, *(f"{each[name]:,}" for name in ("rows", *who)))
    yield table
    table = _plain_table("Labels", ["task"], list(splits), "rate (or mean) of the observed labels")
    for name in next(iter(splits.values()))["tasks"]:
        tasks = [each["tasks"][name] for each in splits.values()]
        table.add_row(Text(name), *(f"{rate(each['rate'], each['kind'])} of {each['observed']:,}" for each in tasks))
    yield table
    yield _features_table(health)
    yield _embeddings_table(health["tables"])
    yield from _show_findings(health)


def _plain_table(title: str, left: Sequence[str], right: Sequence[str], caption: str | None = None) -> Table:
    table = Table(title=title, **_TITLED, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.caption, table.caption_justify = caption, "left"
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _features_table(health: dict[str, Any]) -> Table:
    caption = "unknown: ids without a row of their own; PSI: drift to test; AUC: the feature alone, of its best task"
    columns = ["has\nvalue", "unknown\nin test", "PSI", "AUC"]
    table = _plain_table("Features", ["feature"], columns, caption)
    table.columns[0].min_width = min(_NAME, max(len(each["name"]) for each in health["features"]))
    table.add_column("flags", style="yellow", overflow="fold")
    for each in health["features"]:
        psi, best = each["psi"], max((auc for auc in each["auc"].values() if auc is not None), default=None)
        drifts = (psi or 0) > DRIFT
        table.add_row(
            Text(each["name"]),
            percent(each["coverage"]["train"]),
            percent(each["unknown"]["test"]),
            Text(fixed(psi, 2), style="bold yellow" if drifts and psi > STRONG_DRIFT else "yellow" if drifts else ""),
            Text(fixed(best), style="bold red" if (best or 0) > LEAK_AUC else ""),
            ", ".join(flags_of(health, each["name"])),
        )
    return table


def _embeddings_table(tables: list[dict[str, Any]]) -> Table:
    total = sum(each["bytes"] + each["optimizer_bytes"] for each in tables)
    shown = sorted(tables, key=lambda each: -each["bytes"])[:8]
    title = f"Embedding tables: {len(tables)}, {size(total)} with the optimizer's state" + (
        f"; the {len(shown)} largest" if len(shown) < len(tables) else ""
    )
    table = _plain_table(title, ["table"], ["rows", "dim", "float32", "optimizer", "seen in training"])
    for each in shown:
        bytes_of = (size(each[name]) for name in ("bytes", "optimizer_bytes"))
        seen = percent(1 - each["never_seen"])
        table.add_row(Text(each["name"]), f"{each['rows']:,}", str(each["dim"]), *bytes_of, seen)
    return table


def _show_findings(health: dict[str, Any]) -> Iterator[Text]:
    for each in health["overview"]["left_out"]:
        yield Text(f"left out: {each['file']}: {each['reason']}", style="bold red")
    if not health["findings"]:
        yield Text("nothing suspicious found", style="bold green")
    shown, folded = split_findings(health["findings"])
    told = set[str]()
    for each in shown:
        style = "bold red" if each["severity"] == "problem" else "yellow"
        yield Text.assemble((f"{each['severity']}: ", style), each["message"])
        for advice in each["advice"]:
            if (key := advice["override"] or advice["do"]) not in told:  # which several findings may advise
                line = f"  {advice['do']}{': ' if advice['override'] else ''}"
                yield Text.assemble(line, (advice["override"] or "", "bold"))
            told.add(key)
    if told:
        yield Text(NOTE, style="dim")
    if folded:
        kinds = Counter(each["check"] for each in folded)
        named = ", ".join(f"{name} ({number})" for name, number in kinds.most_common())
        yield Text(f"{len(folded)} more warnings, which cost less: {named}; the report has them", style="dim")
    yield from map(Text, health["sentences"][1:])
