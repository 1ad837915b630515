"""What features are worth to a model that is trained: what it loses where their inputs come from other rows.

A feature's inputs are exchanged together (permutation importance: Breiman, 2001; of any model: Fisher, Rudin and
Dominici, 2019), so that it keeps its values and says nothing of its row. Features of user and context are the same for
all rows of a request, and stay so: whole requests exchange them. Those of candidates are exchanged among all rows. A
group's features are exchanged by the same two permutations, so that those of one kind go on fitting each other.

It tells what this model uses. What a model without a feature would lose, only a training without it tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from mmoe_rec.batches.encoded_rows import EncodedRows, Rows
from mmoe_rec.evaluation.comparison import GUARDED, find_differences
from mmoe_rec.evaluation.intervals import Difference, correct_all
from mmoe_rec.evaluation.summary import OBJECTIVE, Objective
from mmoe_rec.evaluation.sums import MOST_UNITS, EvaluationSums
from mmoe_rec.features.layout import Encoded, Layout
from mmoe_rec.log.columns import hash_column
from mmoe_rec.point_in_time.arrays import one_array
from mmoe_rec.settings.schema import Remembering, Schema

_ROWS_AT_A_TIME = 65_536
FEATURE, GROUP = "feature", "group"


@dataclass(frozen=True)
class HeldRows:
    """N encoded rows in memory, as `score_rows` reads them from files.

    read: the rows; beside: their further columns; weights: the names of those that weigh rows.
    """

    layout: Layout
    read: Rows
    beside: pa.Table
    weights: Sequence[str]

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.read)

    def weighing(self, weighted: bool) -> Sequence[str]:
        """As of `EncodedRows`; `weighted` was decided when the rows were read."""
        return self.weights

    def stream(self, batch_size: int, columns: Sequence[str] = ()) -> Iterator[tuple[Rows, pa.Table]]:
        """As of `EncodedRows`."""
        for start in range(0, self.rows, batch_size):
            stop = min(start + batch_size, self.rows)
            yield self.read.slice(start, stop), self.beside.slice(start, stop - start).select(list(columns))

    def draw_donors(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(N,) int64 each: rows of other requests, for what describes user and context, and other rows."""
        request = one_array(self.beside["request"]).dictionary_encode().indices.to_numpy().astype(np.int64)
        first = np.unique(request, return_index=True)[1]
        return first[generator.permutation(len(first))][request], generator.permutation(self.rows)

    def with_donors(self, schema: Schema, features: Iterable[str], donors: tuple[np.ndarray, np.ndarray]) -> HeldRows:
        """The same rows, where these features have the inputs of others. donors: as `draw_donors` gives them."""
        (of_requests, of_rows), encoded = donors, self.read.encoded
        ids, dense = dict(encoded.ids), encoded.dense.copy()
        for name in features:
            rows = of_requests if schema.role_of(name) in ("user", "context") else of_rows
            for each in (each for each in self.layout.ids if each.feature == name):
                held = ids[each.name]
                ids[each.name] = held[rows] if isinstance(held, np.ndarray) else held.take(rows)
            columns = np.flatnonzero([each.feature == name for each in self.layout.dense])
            dense[:, columns] = encoded.dense[np.ix_(rows, columns)]
        return replace(self, read=replace(self.read, encoded=Encoded(ids, dense)))


def hold_rows(rows: EncodedRows, users: EncodedRows, most: int, columns: Sequence[str], weighted: bool) -> HeldRows:
    """All rows of as many users, drawn by their hashes, as have about so many rows, in memory.

    users: the same rows without inputs, to be counted; columns: to be held beside; weighted: rows weigh 1 / the rate at
    which they were sampled.
    """

    def groups_of(table: pa.Table) -> np.ndarray:
        # By other bits than those by which sums put users together, so that these groups stay as many.
        return (hash_column(one_array(table["user"])) % np.uint64(MOST_UNITS)).astype(np.int64)

    counts = np.zeros(MOST_UNITS, np.int64)
    for _, table in users.stream(_ROWS_AT_A_TIME, ("user",)):
        counts += np.bincount(groups_of(table), minlength=MOST_UNITS)
    taken = np.cumsum(counts) <= max(most, counts[np.flatnonzero(counts)[0]])
    weights, parts, tables = rows.weighing(weighted), list[Rows](), list[pa.Table]()
    for part, table in rows.stream(_ROWS_AT_A_TIME, [*columns, *weights]):
        places = np.flatnonzero(taken[groups_of(table)])
        parts.append(part.take(places))
        tables.append(table.take(pa.array(places)))
    return HeldRows(rows.layout, Rows.concatenate(parts), pa.concat_tables(tables).combine_chunks(), weights)


@dataclass(frozen=True)
class Part:
    """Features that are left out together: one, or a group of a kind. kind: `feature` or `group`."""

    name: str
    features: tuple[str, ...]
    kind: str = FEATURE


def find_sources(schema: Schema) -> list[Part]:
    """Groups of features, each in one, by what they come from: values of a role, counters or histories of a task or of
    a log of events."""
    sources: dict[str, list[str]] = {}
    for name, feature in schema.features.items():
        source = f"values of {schema.role_of(name)}"
        if isinstance(feature, Remembering):
            what = "histories" if feature.kind == "history" else f"{feature.kind}s"
            source = f"{what} of {feature.task or feature.events}"
        sources.setdefault(source, []).append(name)
    return [Part(name, tuple(its), GROUP) for name, its in sources.items()]


def find_parts(schema: Schema, features: Sequence[str] = ()) -> list[Part]:
    """Each feature that is not of placement, then groups of several, by what they come from and by role.

    features: those that are wanted, without groups; none for all.
    """
    roles = {name: schema.role_of(name) for name in schema.features}
    known = [name for name, role in roles.items() if role != "placement"]
    alone, groups = [Part(name, (name,)) for name in features or known], dict[tuple[str, ...], Part]()
    by_role = {role: tuple(name for name in known if roles[name] == role) for role in dict.fromkeys(roles.values())}
    all_of = [Part(f"all of {role}", its, GROUP) for role, its in by_role.items()]
    for group in () if features else (*find_sources(schema), *all_of):
        if 1 < len(group.features) < len(known) and {*group.features} <= {*known}:
            groups.setdefault(group.features, group)
    return [*alone, *groups.values()]


def find_readers(layout: Layout) -> dict[str, list[str]]:
    """Feature -> others that look ids up in its tables, and can't be without it."""
    features = {each.feature for each in layout.ids}
    readers: dict[str, list[str]] = {each.table: [] for each in layout.ids if each.table in features}
    for each in layout.ids:
        if each.feature != each.table and each.feature not in readers.get(each.table, [each.feature]):
            readers[each.table].append(each.feature)
    return readers


@dataclass(frozen=True)
class Worth:
    """What is lost without features. objective: in what decides, positive where it is a loss; tasks: of the metric of
    each task (`GUARDED`), in the same way."""

    part: Part
    objective: Difference
    tasks: Mapping[str, Difference] = field(default_factory=dict)

    @property
    def is_shown(self) -> bool:
        """Whether a loss is shown in what decides."""
        return self.objective.is_significant and (self.objective.value or 0.0) > 0

    def is_harmless(self, margin: float, of_tasks: float) -> bool:
        """Whether a loss of more than the margin is ruled out in what decides, of half of that where a loss is shown,
        and one of more than `of_tasks` for each task. An interval that is wider to either side of its middle tells
        nothing, as of many features some seem to lose nothing by chance, unless it shows a gain.

        A loss that is shown and tiny need not be one: what chose a model's state on these rows liked its noise there.
        """
        low, high = self.objective.low, self.objective.high
        if low is None or high is None or high > (margin / 2 if self.is_shown else margin):
            return False
        if high - low > 2 * margin and high > 0:
            return False
        return all(each.high is not None and each.high <= of_tasks for each in self.tasks.values())


def find_worth(
    part: Part,
    whole: Sequence[EvaluationSums],
    without: Sequence[EvaluationSums],
    objective: Objective,
    tasks: Sequence[str],
    resamples: int,
) -> Worth:
    """The mean loss over permutations, or trainings, on the same redrawn users.

    whole: sums of one or more models with the features; without: of permutations, or trainings without; tasks: those
    that are judged. What comes from the choice of a permutation is in an interval over users, as each user meets other
    rows, and falls with the number of permutations.
    """
    kinds = {task.name: task.kind for task in whole[0].tasks}
    metrics = {GUARDED[kinds[name]] for name in tasks}
    found = find_differences(whole, [(part.name, without)], objective, resamples, metrics)
    of_tasks = {name: found[part.name, name, GUARDED[kinds[name]]] for name in tasks}
    apart = found[(part.name, *OBJECTIVE)]
    if objective.better != "higher":
        value, low, high = (None if each is None else -each for each in (apart.value, apart.high, apart.low))
        apart = replace(apart, value=value, low=low, high=high)
    return Worth(part, apart, of_tasks)


def correct_worths(worths: Sequence[Worth]) -> list[Worth]:
    """The same with p-values corrected by Holm's method: of what decides for the number of features, or of groups, and
    of tasks for the number of all."""
    found: dict[Part, Worth] = {}
    for kind in (FEATURE, GROUP):
        its = [each for each in worths if each.part.kind == kind]
        tasks = iter(correct_all([apart for each in its for apart in each.tasks.values()]))
        for each, objective in zip(its, correct_all([each.objective for each in its]), strict=True):
            found[each.part] = replace(each, objective=objective, tasks={task: next(tasks) for task in each.tasks})
    return [found[each.part] for each in worths]


def choose_to_leave_out(
    worths: Sequence[Worth],
    is_harmless: Callable[[Worth], bool],
    measure: Callable[[Part], Worth],
    readers: Mapping[str, Sequence[str]],
) -> Worth | None:
    """The features that may be left out together, and what is lost without all of them; None where there are none.

    Of those that are harmless alone, the ones that may lose most stay until all others are harmless together.
    measure: what features are worth together; readers: feature -> others that can't be without it.
    """
    alone = [each for each in worths if each.part.kind == FEATURE and is_harmless(each)]
    names = [each.part.name for each in sorted(alone, key=lambda each: each.objective.high or 0.0)]
    while names := [name for name in names if set(readers.get(name, ())) <= set(names)]:
        joint = measure(Part("what may be left out", tuple(names), GROUP))
        joint = replace(joint, objective=replace(joint.objective, p_corrected=joint.objective.p))
        if is_harmless(joint):
            return joint
        del names[len(names) - max(1, len(names) // 4) :]
    return None
