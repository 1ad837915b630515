"""Which structure of the network the log rewards, and which tasks help each other, over several trainings of each.

    <data.work>/structures/structures.json    the verdicts and all numbers, and report.html, which shows them
    <data.work>/structures/trainings/         what each training predicts for the test rows (see `variants`)

All structures have the same rows, steps and rates, and as many units in the first layer of their experts. Trees beside
the network are left out: they would hide what the structures are worth.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mmoe_rec.atomic import write_text
from mmoe_rec.auc import FEWEST
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.comparison import GUARDED, find_differences
from mmoe_rec.evaluation.intervals import Difference, correct_all
from mmoe_rec.evaluation.summary import OBJECTIVE, SCORE, Objective, UserMetrics, find_objective
from mmoe_rec.evaluation.sums import EvaluationSums, count_rarer_label
from mmoe_rec.jobs.run_page import as_code, command, quoted
from mmoe_rec.jobs.variants import TrainedVariant, Variant, VariantTrainings, open_variants
from mmoe_rec.report.structures import (
    MIXTURE,
    ONE_GATE,
    OWN,
    PLE,
    SHARED_BOTTOM,
    TREES,
    Answer,
    Cell,
    StructureRow,
    StructuresReport,
    page,
)
from mmoe_rec.settings.model import Experts, Gates, Model
from mmoe_rec.settings.sections import Settings
from mmoe_rec.training.origin import fixed_settings

if TYPE_CHECKING:
    from mmoe_rec.evaluation.metrics.metric import Metric

FOLDER, FILE, PAGE = "structures", "structures.json", "report.html"
MOST_UNITS = 4096
"""Of a shared bottom's first layer."""


def compare_structures(settings: Settings, seeds: int, at_once: int = 1) -> StructuresReport:
    """Trains all variants with `training.seed` and those after it, and writes the files.

    at_once: how many trainings run at a time. Raises UserError where there are no test rows, or a variant can't be
    trained; StoppedError where a signal came: trainings that have ended stay.
    """
    find_objective(settings.evaluation.decide_by)
    with open_variants(settings, FOLDER, "test", at_once) as trainings:
        report = judge_structures(trainings, seeds)
        folder, run = trainings.folder, trainings.run
        (folder / PAGE).unlink(missing_ok=True)
        fingerprint = trainings.prepared.manifest["fingerprint"]
        tree = {"sentences": report.sentences, "fingerprint": fingerprint, **asdict(report)}
        tree["settings"] = fixed_settings(settings)  # by which a report knows whether it still holds
        write_text(folder / FILE, json.dumps(tree, indent=1, default=asdict))
        write_text(folder / PAGE, page(report))
        assert run is not None, "it was opened with one"
        for name in (FILE, PAGE):
            run.log_artifact(folder / name)
        means = {
            f"test/{each.name}.{task}": at.mean
            for each in report.table
            for task, at in each.cells.items()
            if at.mean is not None
        }
        run.log_metrics(means)
        run.describe("Structures", "\n\n".join([as_code(command()), quoted(report.sentences)]))
    return report


def judge_structures(
    trainings: VariantTrainings, seeds: int, variants: Sequence[Variant] | None = None
) -> StructuresReport:
    """Trains, and answers each question by the difference of the first variant from another one.

    variants: None for those of `list_variants`.
    """
    settings, first = trainings.settings, trainings.settings.training.seed
    variants, numbers = variants or list_variants(settings), range(first, first + seeds)
    base, *others = trainings.train([each for each in variants if not each.trees_alone], numbers).values()
    warnings = []
    for each in (each for each in variants if each.trees_alone):
        try:
            others += trainings.train([each], numbers).values()
        except UserError as error:
            warnings.append(f"{each.name} were left out: {error}")
    measured = base.measure()
    sums = measured[0]
    objective = Objective.of(settings.evaluation.decide_by, sums, list(settings.tasks))
    metrics = _metrics_of_tasks(settings, sums)
    wanted = {metric.name for metric in metrics.values()}
    differences, means = {}, dict[str, float]()
    if wanted or objective is not None:  # else no task has labels enough
        theirs = ((each.variant.name, each.measure()) for each in others)
        differences = find_differences(measured, theirs, objective, settings.evaluation.resamples, wanted)
        values = [UserMetrics(each, names=wanted).once for each in measured]
        means = {
            task: float(np.mean([each[task, metric.name] for each in values]))
            for task, metric in metrics.items()
            if all((task, metric.name) in each for each in values)
        }
    answers = list(_ask(base, others, objective, metrics, differences))
    aparts = correct_all([each.apart for each in answers])
    rows = int(sums.tables["ranking"]["rows"].to_numpy().sum())
    return StructuresReport(
        title=f"Structures of {settings.name}",
        name=base.variant.name,
        seeds=base.seeds,
        rows=rows,
        units="rows" if rows == sums.users else "users",
        objective=None if objective is None else objective.name,
        table=list(_tabulate(base, others, means, metrics, differences)),
        answers=[replace(each, apart=apart) for each, apart in zip(answers, aparts, strict=True)],
        metrics={task: metric.name for task, metric in metrics.items()},
        few={task: count_rarer_label(sums, task) for task in settings.tasks if task not in metrics},
        margin=settings.evaluation.margin,
        has_trees=settings.model.trees is not None,
        warnings=[*warnings, *_warn([base, *others])],
        facts=_facts(settings, [base, *others]),
    )


def list_variants(settings: Settings) -> list[Variant]:
    """The settings' own structure first, under its name if it has one; the others; each task alone; each left out; and
    trees."""
    tasks, own = tuple(settings.tasks), settings.model.model_copy(update={"trees": None})
    structures = _structures(own, len(tasks))
    name = next((name for name, model in structures.items() if model == own), OWN)
    base = _with_model(settings, own)
    variants = {name: Variant(name, base)}
    for each, model in structures.items():
        variants.setdefault(each, Variant(each, _with_model(settings, model)))
    if len(tasks) > 1:
        for task in tasks:
            others = tuple(each for each in tasks if each != task)
            variants[f"only {task}"] = Variant(f"only {task}", base, without_tasks=others)
    if len(tasks) > 2:
        variants |= {f"without {task}": Variant(f"without {task}", base, without_tasks=(task,)) for task in tasks}
    variants[TREES] = Variant(TREES, base, trees_alone=True)
    return list(variants.values())


def _structures(own: Model, tasks: int) -> dict[str, Model]:
    """Name -> model with as many units in the first layer of its experts; one task has no use for gates of tasks."""
    experts, gates = own.experts, own.gates
    total = experts.count + experts.task_count * tasks
    if gates.routing != "soft":  # the budget is what a row takes
        total = min(total, gates.serving_top_k or gates.top_k)
    gates = (
        gates.model_copy(update={"serving_top_k": None}) if gates.routing == "soft" else Gates(dropout=gates.dropout)
    )
    width, (first, *rest) = min(total * experts.units[0], MOST_UNITS), experts.units
    if total == 1:  # a shared bottom, which is taken apart
        total = max(2, min(Experts().count, first // 8))
        first = max(1, first // total)
    one_level = {"task_count": 0, "levels": 1}
    mixture = experts.model_copy(update={**one_level, "count": total, "units": (first, *rest)})
    bottom = experts.model_copy(update={**one_level, "count": 1, "units": (width, *rest)})
    each = max(1, round(total / (tasks + 1)))
    ple = mixture.model_copy(update={"count": each, "task_count": each, "levels": 2})
    per_task, shared = (gates.model_copy(update={"per_task": value}) for value in (True, False))
    found = {SHARED_BOTTOM: (bottom, per_task.model_copy(update={"dropout": 0.0}))}
    if tasks > 1:
        found[ONE_GATE] = mixture, shared
    found[MIXTURE] = mixture, per_task
    if tasks > 1:
        found[PLE] = ple, per_task
    return {
        name: own.model_copy(update={"experts": experts, "gates": gates}) for name, (experts, gates) in found.items()
    }


def _with_model(settings: Settings, model: Model) -> Settings:
    return settings.model_copy(update={"model": Model.model_validate(model.model_dump())})


def _metrics_of_tasks(settings: Settings, sums: EvaluationSums) -> dict[str, Metric[Any]]:
    """Task with enough labels -> the metric that judges it: the one that decides, if it is of such tasks."""
    decide_by = settings.evaluation.decide_by
    decides, of_score = find_objective(decide_by), decide_by.startswith(f"{SCORE}.")
    return {
        task.name: decides if task.kind in decides.kinds and not of_score else find_objective(GUARDED[task.kind])
        for task in sums.tasks
        if task.name in settings.tasks and count_rarer_label(sums, task.name) >= FEWEST
    }


def _ask(
    base: TrainedVariant,
    others: Sequence[TrainedVariant],
    objective: Objective | None,
    metrics: Mapping[str, Metric[Any]],
    differences: Mapping[tuple[str, str, str], Difference],
) -> Iterator[Answer]:
    """The answers, not corrected."""
    learnt = base.variant.settings.tasks
    for each in (other.variant for other in others):
        if each.without_tasks:
            kind = "without" if len(learnt) > 2 and len(each.without_tasks) == 1 else "alone"
            for task, metric in metrics.items():
                if task not in each.without_tasks:
                    apart = differences.get((each.name, task, metric.name), Difference(None))
                    change = "; ".join(f"without tasks.{name}" for name in each.without_tasks)
                    yield Answer(kind, each.name, task, each.without_tasks, metric.name, metric.better, change, apart)
        elif objective is not None:
            apart = differences.get((each.name, *OBJECTIVE), Difference(None))
            kind, change = ("trees", "") if each.trees_alone else ("structure", _describe_change(base.variant, each))
            yield Answer(kind, each.name, None, (), objective.metric, objective.better, change, apart)


def _describe_change(before: Variant, after: Variant) -> str:
    """The lines of `model` that make another structure, as YAML in one line."""
    parts = []
    for section in ("experts", "gates"):
        old, new = (getattr(each.settings.model, section).model_dump(mode="json") for each in (before, after))
        changed = {name: value for name, value in new.items() if value != old[name]}
        if changed:
            text = ", ".join(f"{name}: {json.dumps(value)}" for name, value in changed.items())
            parts.append(f"{section}: {{{text}}}")
    return f"model: {{{', '.join(parts)}}}"


def _tabulate(
    base: TrainedVariant,
    others: Sequence[TrainedVariant],
    means: Mapping[str, float],
    metrics: Mapping[str, Metric[Any]],
    differences: Mapping[tuple[str, str, str], Difference],
) -> Iterator[StructureRow]:
    """The rows of the table. means: of the first variant, from which the others' differ."""
    for each in (base, *others):
        name, cells = each.variant.name, {task: Cell(mean) for task, mean in means.items()}
        if each is not base:
            apart = {task: differences.get((name, task, metrics[task].name), Difference(None)) for task in means}
            cells = {task: Cell(means[task] - its.value, its) for task, its in apart.items() if its.value is not None}
        yield StructureRow(name, cells, each.facts[0].get("parameters"), float(np.mean(each.seconds)))


def _warn(trained: Sequence[TrainedVariant]) -> Iterator[str]:
    """Whose trainings seem to have ended too early, each reason but once."""
    early: dict[str, list[str]] = {}
    for each in trained:
        if told := next(filter(None, (facts.get("early_end") for facts in each.facts)), None):
            early.setdefault(told.partition(";")[2], []).append(each.variant.name)
    for advice, names in early.items():
        yield f"networks of {', '.join(names)} had few steps, or were still getting better at the end;{advice}"


def _facts(settings: Settings, trained: Sequence[TrainedVariant]) -> dict[str, str]:
    precisions = {each["precision"] for one in trained for each in one.facts if "precision" in each}
    facts = {
        "log": settings.data.log,
        "trainings": f"{sum(len(each.seeds) for each in trained)}",
        "precision": " or ".join(sorted(precisions)),
        "resamples": f"{settings.evaluation.resamples:,}",
        "command": command(),
    }
    if any(each.given is not None for each in settings.tasks.values()):
        facts["tasks with `given`"] = "where the given task is left out, they are learnt from their own labels alone"
    return facts
