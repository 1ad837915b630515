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
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mmoe_rec.atomic import digest, write_text
from mmoe_rec.batches.encoded_rows import EncodedRows, Rows
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.comparison import RESAMPLES_OF_SLICES, find_differences
from mmoe_rec.evaluation.intervals import Difference, correct_all
from mmoe_rec.evaluation.scoring import COLUMNS, ROWS_AT_A_TIME, join_labels
from mmoe_rec.evaluation.summary import OBJECTIVE, Objective
from mmoe_rec.evaluation.sums import MOST_UNITS, EvaluationSums
from mmoe_rec.experiments.compare import BASE, FOLDER, check, judge, keep
from mmoe_rec.experiments.experiment_report import ExperimentResult
from mmoe_rec.experiments.runner import Network, Runner, open_runner
from mmoe_rec.experiments.variants import Variant
from mmoe_rec.features.layout import Encoded, Layout
from mmoe_rec.log.columns import hash_column
from mmoe_rec.model.model_layout import ModelLayout
from mmoe_rec.point_in_time.arrays import one_array
from mmoe_rec.progress import bar, say
from mmoe_rec.report.parts import Table
from mmoe_rec.settings.schema import Remembering, Schema
from mmoe_rec.settings.sections import Settings

MAX_ROWS, EXCHANGED_ROWS, MAX_REPEATS = 100_000, 200_000, 10
"""Validation rows that are permuted, of whole users; exchanged rows of each feature; and most repeats."""
JOINT = "the joint candidates"


@dataclass(frozen=True)
class Group:
    """Features that are left out together. name: of a single feature, its own."""

    name: str
    features: tuple[str, ...]

    @property
    def variant(self) -> Variant:
        """The variant without them."""
        return Variant(f"without {self.name}", without_features=self.features, simpler=True)


@dataclass(frozen=True)
class Loss:
    """The loss of the objective when features are permuted, positive if the model uses them."""

    group: Group
    apart: Difference

    @property
    def is_shown(self) -> bool:
        """Whether the loss is significant."""
        return self.apart.is_significant and (self.apart.low or 0.0) > 0

    def is_harmless(self, margin: float) -> bool:
        """Whether the interval rules out a loss above the margin, or above half of it if there is a loss for sure.

        Validation rows selected the model, so they like what it learned from noise in them.
        """
        return self.apart.high is not None and self.apart.high <= (margin / 2 if self.is_shown else margin)


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
    _check_features(only, schema)
    check(settings, [BASE], seeds)
    alone = [Group(name, (name,)) for name in only or schema.features if schema.role_of(name) != "placement"]
    with open_runner(settings, "compare features", "test", folder=FOLDER) as runner:
        found = _permute_once(runner, alone, margin)
        order = {row[0]: place for place, row in enumerate(found["rows"])}
        groups = [Group(name, (name,)) for name in only] or find_sources(schema)
        groups.sort(key=lambda group: max(order.get(name, -1) for name in group.features))
        if found["joint"]:
            groups.insert(0, Group(", ".join(found["joint"]), tuple(found["joint"])))
        unique: dict[frozenset[str], Group] = {}
        for group in groups:
            unique.setdefault(frozenset(group.features), group)
        variants = [group.variant for group in unique.values() if schema.can_rank_without(group.features)]
        report = judge(runner, [BASE, *variants], seeds, margin)
        heads = ("feature", "loss of a model that has it", "verdict")
        rows = [tuple(row) for row in found["rows"]]
        table = Table(f"Loss of {found['objective']} when a feature is permuted", heads, rows)
        report = replace(report, notes=found["notes"], tables=[table])
        keep(runner, report)
    return report


def find_sources(schema: Schema) -> list[Group]:
    """Group features by their source: values of a role, and counters or histories of a task or of an event log."""
    sources: dict[str, list[str]] = {}
    for name, feature in schema.features.items():
        source = f"values of {schema.role_of(name)}"
        if isinstance(feature, Remembering):
            kind = "histories" if feature.kind == "history" else f"{feature.kind}s"
            source = f"{kind} of {feature.task or feature.events}"
        sources.setdefault(source, []).append(name)
    return [Group(name, tuple(features)) for name, features in sources.items()]


def _check_features(names: Sequence[str], schema: Schema) -> None:
    for name in names:
        if name not in schema.features:
            near = get_close_matches(name, schema.features, 1)
            hint = f"Did you mean '{near[0]}'?" if near else f"The settings have {', '.join(schema.features)}."
            raise UserError(f"--only '{name}': there is no such feature. {hint}")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"--only '{twice}' is given twice. Give each feature once.")


def _permute_once(runner: Runner, groups: Sequence[Group], margin: float) -> dict[str, Any]:
    """Permute the features of a network with the first seed, unless an earlier command did."""
    seed = runner.settings.training.seed
    task = runner.make_task(BASE, seed)
    file = task.file.with_name(f"{task.file.stem}-{digest([group.name for group in groups], margin)}.json")
    if not file.exists():
        say(f"run: {task.name}")
        network = runner.train_task(task)
        assert network is not None, "only trees alone have no network"
        write_text(file, json.dumps(permute(runner, network, groups, margin)))
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def permute(runner: Runner, network: Network, groups: Sequence[Group], margin: float) -> dict[str, Any]:
    """Measure what a network loses when features are permuted among validation rows.

    Returns:
        `objective` in words; `rows` of a table, the smallest loss first; `joint`, names of features to leave out
        together; and `notes` in sentences.

    Raises:
        UserError: No task has enough labels.
    """
    settings, prepared = runner.settings, runner.prepared
    schema = settings.schema_
    held = hold_rows(settings, prepared.split("validation"), network.layout, MAX_ROWS)
    repeats = int(np.clip(-(-EXCHANGED_ROWS // len(held.rows)), 2, MAX_REPEATS))
    labeled = join_labels(settings, network.layout, [(held.rows, held.beside)]).predicted

    def score(rows: Rows) -> EvaluationSums:
        size = settings.evaluation.batch_size
        parts = (rows.slice(start, min(start + size, len(rows))) for start in range(0, len(rows), size))
        return network.predict(parts).measure(labeled)

    base = score(held.rows)
    objective = Objective.of(settings.evaluation.decide_by, base, list(settings.tasks))
    if objective is None:
        raise UserError("no task has enough labels in the validation rows to compare features. Move the split.")
    resamples = min(settings.evaluation.resamples, RESAMPLES_OF_SLICES)

    def measure_loss(group: Group) -> Loss:
        without = []
        for repeat in range(repeats):
            generator = np.random.default_rng([zlib.crc32(group.name.encode()), repeat])
            without.append(score(held.exchange(schema, group.features, generator)))
        found = find_differences([base], [(group.name, without)], objective, resamples, ())
        apart = found[(group.name, *OBJECTIVE)]
        if objective.better != "higher":
            value, low, high = (None if each is None else -each for each in (apart.value, apart.high, apart.low))
            apart = replace(apart, value=value, low=low, high=high)
        return Loss(group, apart)

    losses = []
    with bar() as progress:
        step = progress.add_task("permuting features", total=len(groups))
        for group in groups:
            losses.append(measure_loss(group))
            progress.advance(step)
    corrected = correct_all([loss.apart for loss in losses])
    losses = [replace(loss, apart=apart) for loss, apart in zip(losses, corrected, strict=True)]
    joint = choose_joint(losses, margin, measure_loss, find_readers(network.layout))
    names = [] if joint is None else list(joint.group.features)
    losses.sort(key=lambda loss: loss.apart.value or 0.0)
    rows = []
    for loss in losses:
        verdict = "used" if loss.is_shown else "open"
        rows.append((loss.group.name, loss.apart.shown(), "candidate" if loss.group.name in names else verdict))
    notes = ["no feature is a candidate to leave out: this model uses each, or these rows can't tell"]
    if joint is not None:
        listed = ", ".join(f"`{name}`" for name in names)
        notes = [f"candidates to leave out together: {listed}; permuted, they lose {joint.apart.shown()}"]
    return {"objective": objective.name, "rows": rows, "joint": names, "notes": notes}


def choose_joint(
    losses: Sequence[Loss],
    margin: float,
    measure_loss: Callable[[Group], Loss],
    readers: Mapping[str, Sequence[str]],
) -> Loss | None:
    """Choose features that are harmless together, and return their joint loss. None if there are none.

    Args:
        losses: Losses of single features, corrected.
        margin: Loss that counts as none.
        measure_loss: Measures the loss of a group.
        readers: Feature -> features that can't be without it.
    """
    alone = [loss for loss in losses if loss.is_harmless(margin)]
    names = [loss.group.name for loss in sorted(alone, key=lambda loss: loss.apart.high or 0.0)]
    while names := [name for name in names if set(readers.get(name, ())) <= set(names)]:
        joint = measure_loss(Group(JOINT, tuple(names)))
        joint = replace(joint, apart=replace(joint.apart, p_corrected=joint.apart.p))
        if joint.is_harmless(margin):
            return joint
        del names[len(names) - max(1, len(names) // 4) :]  # Features that may lose most stay in the model.
    return None


def find_readers(layout: Layout) -> dict[str, list[str]]:
    """Return for each feature the others that look ids up in its tables."""
    features = {each.feature for each in layout.ids}
    readers: dict[str, list[str]] = {each.table: [] for each in layout.ids if each.table in features}
    for each in layout.ids:
        if each.feature != each.table and each.feature not in readers.get(each.table, [each.feature]):
            readers[each.table].append(each.feature)
    return readers


@dataclass(frozen=True)
class HeldRows:
    """N encoded rows in memory, with columns beside them."""

    layout: Layout
    rows: Rows
    beside: pa.Table

    def exchange(self, schema: Schema, features: Iterable[str], generator: np.random.Generator) -> Rows:
        """Return the rows with the inputs of some features from other rows, all of them by the same permutations."""
        request = one_array(self.beside["request"]).dictionary_encode().indices.to_numpy().astype(np.int64)
        first = np.unique(request, return_index=True)[1]
        of_requests, of_rows = first[generator.permutation(len(first))][request], generator.permutation(len(self.rows))
        encoded = self.rows.encoded
        ids, dense = dict(encoded.ids), encoded.dense.copy()
        for name in features:
            rows = of_requests if schema.role_of(name) in ("user", "context") else of_rows
            for each in (each for each in self.layout.ids if each.feature == name):
                held = ids[each.name]
                ids[each.name] = held[rows] if isinstance(held, np.ndarray) else held.take(rows)
            columns = np.flatnonzero([each.feature == name for each in self.layout.dense])
            dense[:, columns] = encoded.dense[np.ix_(rows, columns)]
        return replace(self.rows, encoded=Encoded(ids, dense))


def hold_rows(settings: Settings, folder: Path, layout: ModelLayout, max_rows: int) -> HeldRows:
    """Read all rows of as many users, drawn by their hashes, as have about `max_rows` rows."""
    rows = EncodedRows(folder, layout)
    no_inputs = EncodedRows(folder, replace(layout, tables=(), ids=(), dense=(), attention=()))

    def groups_of(table: pa.Table) -> np.ndarray:
        # Other bits of the hash than metrics use to group users, so that the number of their groups stays.
        return (hash_column(one_array(table["user"])) % np.uint64(MOST_UNITS)).astype(np.int64)

    counts = np.zeros(MOST_UNITS, np.int64)
    for _, table in no_inputs.stream(ROWS_AT_A_TIME, ("user",)):
        counts += np.bincount(groups_of(table), minlength=MOST_UNITS)
    taken = np.cumsum(counts) <= max(max_rows, counts[np.flatnonzero(counts)[0]])
    weighted, outcomes = settings.training.sampling_correction == "weights", [f"label.{n}" for n in layout.outcomes]
    columns = [*COLUMNS, *outcomes, *rows.weighing(weighted)]
    parts, tables = list[Rows](), list[pa.Table]()
    for part, table in rows.stream(ROWS_AT_A_TIME, columns):
        places = np.flatnonzero(taken[groups_of(table)])
        parts.append(part.take(places))
        tables.append(table.take(pa.array(places)))
    return HeldRows(layout, Rows.concatenate(parts), pa.concat_tables(tables).combine_chunks())
