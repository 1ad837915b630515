"""Find features that a model can do without, see `compare_features`.

Permutation importance selects the features that may be removable. It replaces the inputs of a feature by the inputs of
random rows, which keeps their distribution and removes their information (Breiman, 2001; Fisher, Rudin and Dominici,
2019). User and context features are equal in all rows of a request, so they are permuted among whole requests.

Permutation shows only how much one trained model uses a feature. Models that are trained without the selected features
show how much the features are worth. Neither shows the value of a comparison that no feature makes. So a feature of the
user is `untested`, and not removable, if a feature of the candidate has the same IDs and no feature compares them. The
same holds for that feature of the candidate.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

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
from mmoe_rec.features.kinds.match import MatchFeature
from mmoe_rec.features.kinds.relative import find_comparing
from mmoe_rec.features.layout import EncodedInputs, Layout
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.log.columns import hash_column
from mmoe_rec.model.model_layout import ModelLayout
from mmoe_rec.point_in_time.arrays import one_array
from mmoe_rec.progress import bar, say
from mmoe_rec.report.parts import Table
from mmoe_rec.settings.schema import EventFeature, Schema
from mmoe_rec.settings.sections import Settings

MAX_ROWS = 100_000
"""Approximate number of validation rows to permute. All rows of a sampled user are read."""
TARGET_PERMUTED_ROWS, MAX_REPEATS = 200_000, 10
"""Intended number of permuted rows of a feature. The permutation is repeated at most `MAX_REPEATS` times for it."""
MIN_SHARED_IDS = 5
"""Minimum number of IDs that two features share if a comparison of them may help."""


class FeatureVerdict(StrEnum):
    """Whether a model needs a feature.

    Attributes:
        REMOVABLE: A model without this feature and all other removable features has a negligible loss.
        UNTESTED: The loss is not significant, but the feature may help in a comparison that no feature makes.
        USED: The loss is significant.
        INCONCLUSIVE: The loss is not significant, but the rows can't rule out a loss above the margin.
    """

    REMOVABLE = "removable"
    UNTESTED = "untested"
    USED = "used"
    INCONCLUSIVE = "inconclusive"


def compare_features(settings: Settings, only: Sequence[str], margin: float, seeds: int) -> ExperimentResult:
    """Find removable features by permutation, train without them, and compare the runs on the test rows.

    Args:
        settings: Settings whose features are compared.
        only: Features to permute, and to leave out one at a time. If empty, all features are permuted, and groups of
            features by source are left out.
        margin: Largest loss of the objective that is negligible.
        seeds: Number of runs of each variant.

    Raises:
        UserError: A feature doesn't exist, or no task has enough labels.
    """
    schema = settings.schema_
    check_variants(settings, [replace(BASE_VARIANT, name="--only", without_features=tuple(only))], seeds)
    single = [name for name in only or schema.features if schema.role_of(name) != "placement"]
    with open_runner(settings, "compare features", "test", folder=COMPARISON_FOLDER) as runner:
        importance = _permute_once(runner, single, margin)
        joint, order = importance["joint"], {row[0]: index for index, row in enumerate(importance["rows"])}
        groups = list((({name: (name,) for name in only}) or group_by_source(schema)).items())
        comparing = find_comparing(schema)
        # A relative feature can't be kept without the counters that it compares.
        groups = [
            (name, tuple(dict.fromkeys(chain(group, *(comparing.get(key, ()) for key in group)))))
            for name, group in groups
        ]
        groups.sort(key=lambda group: max(order.get(name, -1) for name in group[1]))
        if joint:
            groups.insert(0, (", ".join(joint), tuple(joint)))
        unique: dict[frozenset[str], Variant] = {}
        for name, features in groups:
            variant = Variant(f"without {name}", without_features=features, is_simpler=True)
            if schema.can_rank_without(features):
                unique.setdefault(frozenset(features), variant)
        report = train_and_compare(runner, [BASE_VARIANT, *unique.values()], seeds, margin)
        header = ("feature", "loss without its information", "verdict")
        rows = [tuple(row) for row in importance["rows"]]
        table = Table(f"Loss of {importance['objective']} when a feature is permuted", header, rows)
        report = replace(report, notes=importance["notes"], tables=[table])
        save_result(runner, report)
    return report


def group_by_source(schema: Schema) -> dict[str, tuple[str, ...]]:
    """Return the names of the features by source, such as `values of user` or `counters of click`."""
    sources: dict[str, list[str]] = {}
    for name, feature in schema.features.items():
        source = f"values of {schema.role_of(name)}"
        if isinstance(feature, EventFeature):
            kind = "histories" if feature.kind == "history" else f"{feature.kind}s"
            source = f"{kind} of {feature.task or feature.events}"
        sources.setdefault(source, []).append(name)
    return {name: tuple(features) for name, features in sources.items()}


def _permute_once(runner: Runner, features: Sequence[str], margin: float) -> dict[str, Any]:
    """Return `permutation_importance` for the first seed, from a file if an earlier command has written it."""
    spec = runner.plan_run(BASE_VARIANT, runner.settings.training.seed)
    file = spec.file.with_name(f"{spec.file.stem}-{digest(list(features), margin)}.json")
    if not file.exists():
        say(f"run: {spec.name}")
        network = runner.train_run(spec)
        assert network is not None, "the base variant trains a network"
        write_text(file, json.dumps(permutation_importance(runner, network, features, margin)))
    importance: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return importance


def permutation_importance(runner: Runner, network: Network, features: Sequence[str], margin: float) -> dict[str, Any]:
    """Measure how much of the objective a network loses if features are permuted among validation rows.

    Args:
        runner: Runner of the command.
        network: The trained network.
        features: Features to permute, one at a time.
        margin: Largest loss of the objective that is negligible.

    Returns:
        `objective`: name of the metric. `rows`: feature, loss and verdict, the smallest loss first. `joint`: removable
        features, to leave out together. `notes`: sentences for the report.

    Raises:
        UserError: No task has enough labels.
    """
    settings, schema, layout = runner.settings, runner.settings.schema_, network.layout
    rows, columns = sample_rows(settings, runner.prepared.split("validation"), layout, MAX_ROWS)
    repeats = int(np.clip(-(-TARGET_PERMUTED_ROWS // len(rows)), 2, MAX_REPEATS))
    labels = collect_labels(settings, layout, [(rows.labels, columns)])
    request = one_array(columns["request"]).dictionary_encode().indices.to_numpy().astype(np.int64)

    def measure(rows: LabeledRows) -> EvaluationSums:
        size = settings.evaluation.batch_size
        parts = (rows.slice(start, min(start + size, len(rows))) for start in range(0, len(rows), size))
        values, score = predict_rows(network.model, layout, parts, network.calibration)
        predicted = {task.name: values[:, index] for index, task in enumerate(layout.tasks)}
        return labels.with_predictions(predicted, score).sum()

    base = measure(rows)
    objective = Objective.from_setting(settings.evaluation.primary_metric, base, list(settings.tasks))
    if objective is None:
        raise UserError("no task has enough labels in the validation rows to compare features. Move the split.")
    resamples = min(settings.evaluation.resamples, SLICE_RESAMPLES)

    def measure_loss(name: str, features: Sequence[str]) -> Difference:
        permuted = []
        for repeat in range(repeats):
            generator = np.random.default_rng([zlib.crc32(name.encode()), repeat])
            permuted.append(measure(_permute_features(rows, request, layout, schema, features, generator)))
        difference = find_differences([base], [(name, permuted)], objective, resamples, ())[(name, *OBJECTIVE)]
        return difference if objective.better == "higher" else difference.negated

    differences = []
    with bar() as progress:
        step = progress.add_task("permuting features", total=len(features))
        for name in features:
            differences.append(measure_loss(name, [name]))
            progress.advance(step)
    losses = dict(zip(features, holm_correct(differences), strict=True))
    pairs = find_uncompared(FeaturePipeline.load(runner.prepared.serving, stores=False))
    tested = {name: loss for name, loss in losses.items() if name not in pairs}
    measure_joint = partial(measure_loss, "the joint candidates")
    names = choose_removable(tested, margin, measure_joint, _find_dependents(layout, schema))
    table = []
    for name, loss in sorted(losses.items(), key=lambda item: item[1].value or 0.0):
        verdict = FeatureVerdict.USED if _is_significant_loss(loss) else FeatureVerdict.INCONCLUSIVE
        if name in pairs and verdict is FeatureVerdict.INCONCLUSIVE:
            verdict = FeatureVerdict.UNTESTED
        table.append((name, loss.format(), FeatureVerdict.REMOVABLE if name in names else verdict))
    notes = ["no feature is a candidate to leave out, for the reasons in the column `verdict`"]
    if names:
        notes = [f"candidates to leave out together: {', '.join(f'`{name}`' for name in names)}"]
    notes += [
        f"`{name}` has the same IDs as `{other}`, but no feature compares them. Before you leave `{name}` out, add a "
        "feature of kind `match` with both columns"
        for name, other in pairs.items()
        if (name, FeatureVerdict.UNTESTED) in {(row[0], row[2]) for row in table}
    ]
    return {"objective": objective.name, "rows": table, "joint": names, "notes": notes}


def find_uncompared(pipeline: FeaturePipeline) -> dict[str, str]:
    """Return ID features that no `match` compares with a feature of the same IDs, each with the name of that feature.

    One feature belongs to the user or context, and the other to the candidate. They have the same IDs if they share at
    least half of the smaller vocabulary, and at least `MIN_SHARED_IDS` IDs.
    """
    schema, vocabularies = pipeline.schema, pipeline.vocabularies
    compared = [set(feature.columns) for feature in schema.features.values() if isinstance(feature, MatchFeature)]
    roles = {name: schema.role_of(name) for name in vocabularies}
    pairs: dict[str, str] = {}
    for name, own in vocabularies.items():
        for other, ids in vocabularies.items():
            are_sides = roles[name] in ("user", "context") and roles[other] == "candidate"
            columns = {own.feature.column, ids.feature.column}
            if are_sides and own.ids.type == ids.ids.type and columns not in compared:
                shared = pc.sum(pc.is_in(own.ids, ids.ids)).as_py() or 0
                if shared >= max(MIN_SHARED_IDS, min(len(own.ids), len(ids.ids)) / 2):
                    pairs |= {name: other, other: name}
    return pairs


def _is_significant_loss(loss: Difference) -> bool:
    """Return whether a loss is significantly above zero."""
    return loss.is_significant and (loss.low or 0.0) > 0


def is_negligible(loss: Difference, margin: float) -> bool:
    """Return whether the interval of a loss excludes losses above the margin.

    If the loss is significantly above zero, the interval must exclude losses above half the margin.

    Args:
        loss: Loss of the objective, corrected for the number of comparisons.
        margin: Largest loss that is negligible.
    """
    return loss.high is not None and loss.high <= (margin / 2 if _is_significant_loss(loss) else margin)


def choose_removable(
    losses: Mapping[str, Difference],
    margin: float,
    measure_loss: Callable[[Sequence[str]], Difference],
    dependents: Mapping[str, Sequence[str]],
) -> list[str]:
    """Choose features whose joint loss is negligible. Return an empty list if there are none.

    Args:
        losses: Feature -> loss of the objective if it is permuted, corrected for the number of comparisons.
        margin: Largest loss that is negligible.
        measure_loss: Function that measures the loss if several features are permuted together.
        dependents: Feature -> other features that can't be kept without it.
    """
    names = [name for name, loss in losses.items() if is_negligible(loss, margin)]
    names.sort(key=lambda name: losses[name].high or 0.0)
    while names := [name for name in names if set(dependents.get(name, ())) <= set(names)]:
        (joint,) = holm_correct([measure_loss(names)])
        if is_negligible(joint, margin):
            break
        # Drop the quarter of candidates with the largest upper limits of loss.
        names = names[: len(names) - max(1, len(names) // 4)]
    return names


def _find_dependents(layout: Layout, schema: Schema) -> dict[str, list[str]]:
    """Return the features that can't be kept without another one, by the name of the feature that they need.

    A feature needs the owner of its embedding table. A relative feature needs the counters that it compares.
    """
    features = {ids.feature for ids in layout.ids}
    dependents = find_comparing(schema) | {ids.table: [] for ids in layout.ids if ids.table in features}
    for ids in layout.ids:
        if ids.feature != ids.table and ids.feature not in dependents.get(ids.table, [ids.feature]):
            dependents[ids.table].append(ids.feature)
    return dependents


def _permute_features(
    rows: LabeledRows,
    request: np.ndarray,
    layout: Layout,
    schema: Schema,
    features: Iterable[str],
    generator: np.random.Generator,
) -> LabeledRows:
    """Return N rows in which `features` have the inputs of other random rows. `request`: (N,) index of each request."""
    first = np.unique(request, return_index=True)[1]
    request_donors, row_donors = first[generator.permutation(len(first))][request], generator.permutation(len(rows))
    encoded = rows.encoded
    ids, dense = dict(encoded.ids), encoded.dense.copy()
    for name in features:
        donors = request_donors if schema.role_of(name) in ("user", "context") else row_donors
        for id_input in (id_input for id_input in layout.ids if id_input.feature == name):
            values = ids[id_input.name]
            ids[id_input.name] = values[donors] if isinstance(values, np.ndarray) else values.take(donors)
        columns = np.flatnonzero([number.feature == name for number in layout.dense])
        dense[:, columns] = encoded.dense[np.ix_(donors, columns)]
    return replace(rows, encoded=EncodedInputs(ids, dense))


def sample_rows(settings: Settings, folder: Path, layout: ModelLayout, max_rows: int) -> tuple[LabeledRows, pa.Table]:
    """Read all rows of a sample of users, which is drawn in whole buckets of hashed user IDs.

    Args:
        settings: The settings.
        folder: Folder of the encoded rows.
        layout: Layout of the model.
        max_rows: Maximum number of rows, unless the first bucket has more.

    Returns:
        The rows, and a table with their IDs, weights, and labels of joint outcomes (such as a view with a purchase).
    """
    rows = EncodedDataset(folder, layout)
    no_inputs = EncodedDataset(folder, replace(layout, tables=(), ids=(), dense=(), attention=()))

    def groups_of(table: pa.Table) -> np.ndarray:
        # Sample by the lowest bits of the hash, since the bootstrap groups users by the highest bits. With the same
        # bits, the sample would contain users of a few bootstrap groups only.
        return (hash_column(one_array(table["user"])) % np.uint64(MAX_BOOTSTRAP_UNITS)).astype(np.int64)

    counts = np.zeros(MAX_BOOTSTRAP_UNITS, np.int64)
    for _, table in no_inputs.stream(ROWS_AT_A_TIME, ("user",)):
        counts += np.bincount(groups_of(table), minlength=MAX_BOOTSTRAP_UNITS)
    taken = np.cumsum(counts) <= max(max_rows, counts[np.flatnonzero(counts)[0]])
    joint_outcomes = [f"label.{name}" for name in layout.joint_outcomes]
    weights = rows.weight_columns(settings.training.sampling_correction == "weights")
    parts, tables = list[LabeledRows](), list[pa.Table]()
    for part, table in rows.stream(ROWS_AT_A_TIME, (*ID_COLUMNS, *joint_outcomes, *weights)):
        indexes = np.flatnonzero(taken[groups_of(table)])
        parts.append(part.take(indexes))
        tables.append(table.take(pa.array(indexes)))
    return LabeledRows.concatenate(parts), pa.concat_tables(tables).combine_chunks()
