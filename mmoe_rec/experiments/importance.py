"""Which features a model can do without: `compare_features`.

A permutation pass orders the candidates: a feature's inputs come from other rows, so that it keeps its values and says
nothing about its row (Breiman, 2001; Fisher, Rudin and Dominici, 2019). Features of user and context are the same for
all rows of a request and stay so: whole requests exchange them. Features of candidates are exchanged among all rows.
The pass shows what this model uses. Only a model that was trained without a feature shows what it is worth, so new runs
confirm.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mmoe_rec.atomic import digest, write_text
from mmoe_rec.batches.encoded_dataset import EncodedDataset, LabeledRows
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.comparison import SLICE_RESAMPLES, find_differences
from mmoe_rec.evaluation.evaluate import ID_COLUMNS, ROWS_AT_A_TIME, collect_labels, predict_rows
from mmoe_rec.evaluation.intervals import Difference, holm_correct
from mmoe_rec.evaluation.summary import OBJECTIVE, Objective
from mmoe_rec.evaluation.sums import MAX_BOOTSTRAP_UNITS, EvaluationSums
from mmoe_rec.experiments.compare import (
    COMPARISON_FOLDER,
    ExperimentResult,
    check_variants,
    save_result,
    train_and_compare,
)
from mmoe_rec.experiments.runner import BASE_VARIANT, Network, Runner, Variant, open_runner
from mmoe_rec.features.layout import EncodedInputs, Layout
from mmoe_rec.log.columns import hash_column
from mmoe_rec.model.model_layout import ModelLayout
from mmoe_rec.point_in_time.arrays import one_array
from mmoe_rec.progress import bar, say
from mmoe_rec.report.parts import Table
from mmoe_rec.settings.schema import EventFeature, Schema
from mmoe_rec.settings.sections import Settings

MAX_ROWS, TARGET_PERMUTED_ROWS, MAX_REPEATS = 100_000, 200_000, 10
"""Validation rows that are permuted, of whole users; exchanged rows of each feature; and most repeats."""
JOINT_NAME = "the joint candidates"


def compare_features(settings: Settings, only: Sequence[str], margin: float, seeds: int) -> ExperimentResult:
    """Permute features on validation rows, then train without the candidates and judge them on the test rows.

    Args:
        settings: The settings, whose features are compared.
        only: Features to compare, none for all and for groups by their source.
        margin: Loss of the objective that counts as none.
        seeds: Number of runs of each variant.

    Raises:
        UserError: There is no such feature, or too few labels to judge.
    """
    schema = settings.schema_
    check_variants(settings, [replace(BASE_VARIANT, name="--only", without_features=tuple(only))], seeds)
    alone = [name for name in only or schema.features if schema.role_of(name) != "placement"]
    with open_runner(settings, "compare features", "test", folder=COMPARISON_FOLDER) as runner:
        found = _permute_once(runner, alone, margin)
        joint, order = found["joint"], {row[0]: place for place, row in enumerate(found["rows"])}
        groups = list((({name: (name,) for name in only}) or group_by_source(schema)).items())
        groups.sort(key=lambda group: max(order.get(name, -1) for name in group[1]))
        if joint:
            groups.insert(0, (", ".join(joint), tuple(joint)))
        unique: dict[frozenset[str], Variant] = {}
        for name, features in groups:
            variant = Variant(f"without {name}", without_features=features, is_simpler=True)
            if schema.can_rank_without(features):
                unique.setdefault(frozenset(features), variant)
        report = train_and_compare(runner, [BASE_VARIANT, *unique.values()], seeds, margin)
        heads = ("feature", "loss of a model that has it", "verdict")
        rows = [tuple(row) for row in found["rows"]]
        table = Table(f"Loss of {found['objective']} when a feature is permuted", heads, rows)
        report = replace(report, notes=found["notes"], tables=[table])
        save_result(runner, report)
    return report


def group_by_source(schema: Schema) -> dict[str, tuple[str, ...]]:
    """Group features by their source: values of a role, and counters or histories of a task or of an event log."""
    sources: dict[str, list[str]] = {}
    for name, feature in schema.features.items():
        source = f"values of {schema.role_of(name)}"
        if isinstance(feature, EventFeature):
            kind = "histories" if feature.kind == "history" else f"{feature.kind}s"
            source = f"{kind} of {feature.task or feature.events}"
        sources.setdefault(source, []).append(name)
    return {name: tuple(features) for name, features in sources.items()}


def _permute_once(runner: Runner, features: Sequence[str], margin: float) -> dict[str, Any]:
    """Permute the features of a network with the first seed, unless an earlier command did."""
    seed = runner.settings.training.seed
    task = runner.plan_run(BASE_VARIANT, seed)
    file = task.file.with_name(f"{task.file.stem}-{digest(list(features), margin)}.json")
    if not file.exists():
        say(f"run: {task.name}")
        network = runner.train_run(task)
        assert network is not None, "only trees alone have no network"
        write_text(file, json.dumps(permutation_importance(runner, network, features, margin)))
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def permutation_importance(runner: Runner, network: Network, features: Sequence[str], margin: float) -> dict[str, Any]:
    """Measure the loss of a network when features are permuted among validation rows.

    Returns:
        `objective` in words; `rows` of a table, the smallest loss first; `joint`, names of features to leave out
        together; and `notes` in sentences.

    Raises:
        UserError: No task has enough labels.
    """
    settings, schema, layout = runner.settings, runner.settings.schema_, network.layout
    rows, beside = sample_rows(settings, runner.prepared.split("validation"), layout, MAX_ROWS)
    repeats = int(np.clip(-(-TARGET_PERMUTED_ROWS // len(rows)), 2, MAX_REPEATS))
    known = collect_labels(settings, layout, [(rows.labels, beside)])
    request = one_array(beside["request"]).dictionary_encode().indices.to_numpy().astype(np.int64)

    def measure(rows: LabeledRows) -> EvaluationSums:
        size = settings.evaluation.batch_size
        parts = (rows.slice(start, min(start + size, len(rows))) for start in range(0, len(rows), size))
        values, score = predict_rows(network.model, layout, parts, network.calibration)
        predicted = {task.name: values[:, place] for place, task in enumerate(layout.tasks)}
        return known.with_predictions(predicted, score).sum()

    base = measure(rows)
    objective = Objective.from_setting(settings.evaluation.primary_metric, base, list(settings.tasks))
    if objective is None:
        raise UserError("no task has enough labels in the validation rows to compare features. Move the split.")
    resamples = min(settings.evaluation.resamples, SLICE_RESAMPLES)

    def measure_loss(name: str, features: Sequence[str]) -> Difference:
        without = []
        for repeat in range(repeats):
            generator = np.random.default_rng([zlib.crc32(name.encode()), repeat])
            without.append(measure(permute_features(rows, request, layout, schema, features, generator)))
        apart = find_differences([base], [(name, without)], objective, resamples, ())[(name, *OBJECTIVE)]
        return apart if objective.better == "higher" else apart.negated

    found = []
    with bar() as progress:
        step = progress.add_task("permuting features", total=len(features))
        for name in features:
            found.append(measure_loss(name, [name]))
            progress.advance(step)
    losses = dict(zip(features, holm_correct(found), strict=True))
    names = choose_removable(losses, margin, partial(measure_loss, JOINT_NAME), find_dependents(layout))
    table = []
    for name, loss in sorted(losses.items(), key=lambda item: item[1].value or 0.0):
        verdict = "candidate" if name in names else "used" if is_significant_loss(loss) else "open"
        table.append((name, loss.format(), verdict))
    notes = ["no feature is a candidate to leave out: this model uses each, or these rows can't tell"]
    if names:
        notes = [f"candidates to leave out together: {', '.join(f'`{name}`' for name in names)}"]
    return {"objective": objective.name, "rows": table, "joint": names, "notes": notes}


def is_significant_loss(loss: Difference) -> bool:
    """Return whether a loss is significant."""
    return loss.is_significant and (loss.low or 0.0) > 0


def is_negligible(loss: Difference, margin: float) -> bool:
    """Return whether the interval rules out a loss above the margin, or above half of it if there is a loss for sure.

    Validation rows selected the model, so they like what it learned from noise in them.
    """
    return loss.high is not None and loss.high <= (margin / 2 if is_significant_loss(loss) else margin)


def choose_removable(
    losses: Mapping[str, Difference],
    margin: float,
    measure_loss: Callable[[Sequence[str]], Difference],
    dependents: Mapping[str, Sequence[str]],
) -> list[str]:
    """Choose features that are harmless together, none if there are none.

    Args:
        losses: Losses of single features, corrected.
        margin: Loss that counts as none.
        measure_loss: Measures the loss of several features.
        dependents: Feature -> features that can't be without it.
    """
    names = [name for name, loss in losses.items() if is_negligible(loss, margin)]
    names.sort(key=lambda name: losses[name].high or 0.0)
    while names := [name for name in names if set(dependents.get(name, ())) <= set(names)]:
        (joint,) = holm_correct([measure_loss(names)])
        if is_negligible(joint, margin):
            break
        names = names[: len(names) - max(1, len(names) // 4)]  # Features that may lose most stay in the model.
    return names


def find_dependents(layout: Layout) -> dict[str, list[str]]:
    """Return for each feature the others that look ids up in its tables."""
    features = {each.feature for each in layout.ids}
    dependents: dict[str, list[str]] = {each.table: [] for each in layout.ids if each.table in features}
    for each in layout.ids:
        if each.feature != each.table and each.feature not in dependents.get(each.table, [each.feature]):
            dependents[each.table].append(each.feature)
    return dependents


def permute_features(
    rows: LabeledRows,
    request: np.ndarray,
    layout: Layout,
    schema: Schema,
    features: Iterable[str],
    generator: np.random.Generator,
) -> LabeledRows:
    """Return N rows with the inputs of some features from other rows, all of them by the same permutations.

    request: (N,) int64 from 0 on.
    """
    first = np.unique(request, return_index=True)[1]
    of_requests, of_rows = first[generator.permutation(len(first))][request], generator.permutation(len(rows))
    encoded = rows.encoded
    ids, dense = dict(encoded.ids), encoded.dense.copy()
    for name in features:
        donors = of_requests if schema.role_of(name) in ("user", "context") else of_rows
        for each in (each for each in layout.ids if each.feature == name):
            held = ids[each.name]
            ids[each.name] = held[donors] if isinstance(held, np.ndarray) else held.take(donors)
        columns = np.flatnonzero([each.feature == name for each in layout.dense])
        dense[:, columns] = encoded.dense[np.ix_(donors, columns)]
    return replace(rows, encoded=EncodedInputs(ids, dense))


def sample_rows(settings: Settings, folder: Path, layout: ModelLayout, max_rows: int) -> tuple[LabeledRows, pa.Table]:
    """Read all rows, with the columns beside them, of as many users as have about `max_rows` rows, drawn by hashes."""
    rows = EncodedDataset(folder, layout)
    no_inputs = EncodedDataset(folder, replace(layout, tables=(), ids=(), dense=(), attention=()))

    def groups_of(table: pa.Table) -> np.ndarray:
        # Other bits of the hash than metrics use to group users, so that the number of their groups stays.
        return (hash_column(one_array(table["user"])) % np.uint64(MAX_BOOTSTRAP_UNITS)).astype(np.int64)

    counts = np.zeros(MAX_BOOTSTRAP_UNITS, np.int64)
    for _, table in no_inputs.stream(ROWS_AT_A_TIME, ("user",)):
        counts += np.bincount(groups_of(table), minlength=MAX_BOOTSTRAP_UNITS)
    taken = np.cumsum(counts) <= max(max_rows, counts[np.flatnonzero(counts)[0]])
    weighted, joint_outcomes = (
        settings.training.sampling_correction == "weights",
        [f"label.{n}" for n in layout.joint_outcomes],
    )
    parts, tables = list[LabeledRows](), list[pa.Table]()
    for part, table in rows.stream(ROWS_AT_A_TIME, (*ID_COLUMNS, *joint_outcomes, *rows.weight_columns(weighted))):
        places = np.flatnonzero(taken[groups_of(table)])
        parts.append(part.take(places))
        tables.append(table.take(pa.array(places)))
    return LabeledRows.concatenate(parts), pa.concat_tables(tables).combine_chunks()
