"""Compares variants of settings over several runs: `compare_variants`, `judge`.

data.work/comparison/comparison.json, report.html    what was found
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mmoe_rec.auc import FEWEST
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.comparison import Differences, average_trainings, find_differences
from mmoe_rec.evaluation.intervals import Difference
from mmoe_rec.evaluation.summary import OBJECTIVE, SCORE, Objective, find_objective
from mmoe_rec.evaluation.sums import EvaluationSums, count_rarer_label
from mmoe_rec.experiments.experiment_report import (
    FILE,
    ExperimentResult,
    MetricMean,
    VariantResult,
    correct_cells,
    write,
)
from mmoe_rec.experiments.runner import Runner, TrainedVariant, open_runner
from mmoe_rec.experiments.variants import Variant
from mmoe_rec.report.report_files import PAGE
from mmoe_rec.settings.sections import Settings
from mmoe_rec.tracking.runs import as_code, command, quoted
from mmoe_rec.training.origin import fixed_settings

if TYPE_CHECKING:
    from mmoe_rec.evaluation.metrics.metric import Metric

FOLDER = "comparison"
Columns = dict[tuple[str, str], tuple[str, str]]
"""Task and metric -> the metric in words, and whether higher or lower values are better."""
BASE = Variant("these settings")


def compare_variants(settings: Settings, variants: Sequence[Variant], seeds: int) -> ExperimentResult:
    """Train variants of settings, and compare them on the test rows.

    Args:
        settings: The settings.
        variants: The base variant and those that are compared with it, if any.
        seeds: Number of runs of each, with `training.seed` and the seeds after it.

    Raises:
        UserError: A variant has an unknown key or can't be trained, there are fewer than two seeds, or the split has
            no test rows.
        StoppedError: A signal came. Complete runs stay.
    """
    check(settings, variants, seeds)
    with open_runner(settings, "compare", "test", folder=FOLDER) as runner:
        report = judge(runner, variants, seeds, settings.evaluation.margin)
        keep(runner, report)
    return report


def check(settings: Settings, variants: Sequence[Variant], seeds: int) -> None:
    """Raise UserError for a wrong variant or too few seeds, before features are built."""
    if seeds < 2:
        raise UserError(f"{seeds} run of each variant can't show how far runs differ. Give --seeds 2 or more.")
    find_objective(settings.evaluation.decide_by)
    names = [variant.name for variant in variants]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two variants are named '{twice}'. Give each variant another name.")
    for variant in variants:
        variant.apply(settings)
        for name in variant.without_features:
            if name not in settings.features:
                raise UserError(f"variant '{variant.name}': there is no feature '{name}' to leave out.")


def judge(runner: Runner, variants: Sequence[Variant], seeds: int, margin: float) -> ExperimentResult:
    """Train variants, the base first, and judge their differences from the base.

    Args:
        runner: Trains the variants.
        variants: The base variant and the others.
        seeds: Number of runs of each.
        margin: Largest loss at which a simpler variant is adopted.
    """
    settings, first = runner.settings, runner.settings.training.seed
    numbers, warnings = range(first, first + seeds), list[str]()
    trained = runner.train([each for each in variants if not each.trees_alone], numbers)
    for variant in (each for each in variants if each.trees_alone):
        try:
            trained += runner.train([variant], numbers)
        except UserError as error:  # Trees may have no input to learn from, and the networks' verdicts stand.
            warnings.append(f"{variant.name} is left out: {error}")
    base, *others = trained
    measured = base.measure()
    metrics = _choose_metrics(settings, measured[0])
    objective = Objective.of(settings.evaluation.decide_by, measured[0], list(settings.tasks))
    wanted, resamples = {metric.name for metric in metrics.values()}, settings.evaluation.resamples
    theirs = ((other.variant.name, other.measure()) for other in others)
    differences: Differences = {}
    if others and (wanted or objective is not None):
        differences = find_differences(measured, theirs, objective, resamples, wanted)
    means = average_trainings(measured, resamples, objective)
    columns: Columns = {
        (task, metric.name): (f"{metric.name} of {task}", metric.better) for task, metric in metrics.items()
    }
    decides = None
    if objective is not None:
        decides = OBJECTIVE if len(objective.groups) > 1 else (objective.groups[0], objective.metric)
        columns = {decides: (objective.name, objective.better)} | columns
    base_means = {key: means[key[0]][key[1]].mean for key in columns if key[1] in means.get(key[0], {})}
    results = [_summarize(each, base, columns, decides, base_means, differences) for each in trained]
    rows = int(measured[0].tables["ranking"]["rows"].to_numpy().sum())
    means.pop(OBJECTIVE[0], None)
    return ExperimentResult(
        title=f"Comparison of variants of {settings.name}" if others else f"{seeds} runs of {settings.name}",
        seeds=base.seeds,
        rows=rows,
        units="rows" if rows == measured[0].users else "users",
        means=means,
        variants=correct_cells(results),
        margin=margin,
        few={task: count_rarer_label(measured[0], task) for task in settings.tasks if task not in metrics},
        warnings=[*warnings, *_warn(trained)],
        facts=_list_facts(runner, trained),
    )


def keep(runner: Runner, report: ExperimentResult) -> None:
    """Write the report and log it to MLflow."""
    settings, run = runner.settings, runner.run
    identity = {"features": runner.prepared.manifest["fingerprint"], "settings": fixed_settings(settings)}
    write(report, runner.folder, identity)
    for name in (FILE, PAGE):
        run.log_artifact(runner.folder / name)
    means = {
        re.sub(r"[^\w\-. :/]", "", f"{each.name}/{name}"): cell.mean  # MLflow allows no other characters.
        for each in report.variants
        for name, cell in each.cells.items()
        if cell.mean is not None
    }
    run.log_metrics(means)
    run.describe("Comparison", "\n\n".join([as_code(command()), quoted([report.headline, *report.sentences])]))


def _choose_metrics(settings: Settings, sums: EvaluationSums) -> dict[str, Metric[Any]]:
    """Return the metric that judges each task with enough labels: the one that decides, if it is of such tasks."""
    decide_by = settings.evaluation.decide_by
    decides, of_score = find_objective(decide_by), decide_by.startswith(f"{SCORE}.")
    return {
        task.name: decides if decides.is_of(task.kind) and not of_score else find_objective(task.kind.guarded)
        for task in sums.tasks
        if count_rarer_label(sums, task.name) >= FEWEST
    }


def _summarize(
    trained: TrainedVariant,
    base: TrainedVariant,
    columns: Columns,
    decides: tuple[str, str] | None,
    means: Mapping[tuple[str, str], float | None],
    differences: Differences,
) -> VariantResult:
    """Return the result of a variant, not corrected. A variant without a task is judged by the others, one by one."""
    variant, cells = trained.variant, dict[str, MetricMean]()
    for key, (label, better) in columns.items():
        mean, apart = means.get(key), None
        if trained is not base:
            apart = _negate(differences.get((variant.name, *key), Difference(None)))
            mean = None if mean is None or apart.value is None else mean + apart.value
        cells[label] = MetricMean(better, mean, apart)
    judged = [] if decides is None else [decides]
    if variant.without_tasks:
        judged = [key for key in columns if key != OBJECTIVE and key[0] not in variant.without_tasks]
    change = "--model.trees={}" if variant.trees_alone else variant.change
    return VariantResult(
        name=variant.name,
        change="" if variant.without_tasks else change,
        simpler=variant.simpler,
        cells=cells,
        judged=() if trained is base else tuple(columns[key][0] for key in judged),
        parameters=trained.facts[0].get("parameters"),
        seconds=float(np.mean([facts["seconds"] for facts in trained.facts])),
    )


def _negate(apart: Difference) -> Difference:
    """Turn a difference of the base from a variant around."""
    value, low, high = (None if each is None else 0.0 - each for each in (apart.value, apart.high, apart.low))
    return replace(apart, value=value, low=low, high=high)


def _warn(trained: Sequence[TrainedVariant]) -> Iterator[str]:
    """Yield which networks seem to have ended too early, each reason once."""
    early: dict[str, list[str]] = {}
    for each in trained:
        if reason := next(filter(None, (facts.get("early_end") for facts in each.facts)), None):
            early.setdefault(reason.partition(";")[2], []).append(each.variant.name)
    for advice, names in early.items():
        yield f"networks of {', '.join(names)} had few steps, or were still getting better at the end;{advice}"


def _list_facts(runner: Runner, trained: Sequence[TrainedVariant]) -> dict[str, str]:
    settings, runs = runner.settings, [facts for each in trained for facts in each.facts]
    rows = f"{runner.split} rows" if runner.part is None else f"the {runner.part} part of the {runner.split} rows"
    facts = {
        "log": settings.data.log,
        "judged by": rows,
        "runs": f"{len(runs):,}",
        "precision": " or ".join(sorted({facts["precision"] for facts in runs if "precision" in facts})),
        "resamples": f"{settings.evaluation.resamples:,}",
        "command": command(),
    }
    if any(task.given is not None for task in settings.tasks.values()):
        facts["tasks with `given`"] = "without the given task, they are learned from their own labels alone"
    return facts
