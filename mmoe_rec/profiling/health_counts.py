"""Count encoded rows by SQL, in bounded memory however many rows there are, and fit a quick model of each binary task.

The quick model says how well the features rank before anything is trained. A logistic regression stands for the model
to come. Validation rows fit it and test rows measure it. Its inputs are the numbers and the training rate of each id.
Placement features are left out because serving lacks them.

PSI, the population stability index, between training shares p and test shares q of the same bins:

    PSI = sum over bins of (q - p) ln(q / p),    p = (rows in bin + 1/2) / (all rows + bins / 2), q likewise

The half row keeps empty bins finite. It is usually read as: below .1 stable, .1 to .25 some drift, above .25 strong
drift (Siddiqi, Credit Risk Scorecards, 2006). Without any drift it is still about (bins - 1) (1 / N + 1 / M) for N and
M rows, which matters where a split has few rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.auc import FEWEST, grouped_auc
from mmoe_rec.batches.encoded_rows import ADVICE, EncodedRows
from mmoe_rec.errors import UserError, first_line
from mmoe_rec.features.layout import DenseInput, IdInput, Layout
from mmoe_rec.log.checks import format_time
from mmoe_rec.log.database import MEMORY_GIB, Database, open_database
from mmoe_rec.preprocessing.prepare import FeatureFolder
from mmoe_rec.progress import bar
from mmoe_rec.settings.schema import Meaning, Schema

SPLITS = ("train", "validation", "test")
WHOS = ("user", "candidate", "request")  # read beside the model's inputs, as is the time
RATE_SMOOTHING = 20.0  # rows of the overall rate that the rate of an id is mixed with
FREQUENT = 50  # most frequent table rows that drift is measured in
PSI_BINS = 20
MOST_ROWS = {"validation": 50_000, "test": 250_000}
"""Rows that the quick model reads. Within users it needs many test rows."""
MOST_VALUES = 20_000_000
"""Numbers that the quick model reads of a split, so that memory holds wide rows."""
_SMALLEST_RATE = 1e-6
# A weaker ridge lost up to .07 of AUC if few rows have many inputs. This one loses at most .0015 elsewhere.
_RIDGE = 0.01


def psi(train: np.ndarray, test: np.ndarray) -> tuple[float | None, float | None]:
    """Population stability index of (B,) counts, and what it is on average if nothing has drifted; None where a split
    has no rows."""
    if not train.sum() or not test.sum():
        return None, None
    p, q = ((each + 0.5) / (each.sum() + 0.5 * len(each)) for each in (train, test))
    noise = (len(train) - 1) * (1 / train.sum() + 1 / test.sum())
    return float(((q - p) * np.log(q / p)).sum()), float(noise)


@dataclass(frozen=True)
class NumberInput:
    """A dense input, its place in the layout and that of the indicator of its missing values, if it has one."""

    name: str
    place: int
    indicator: int | None
    edges: tuple[float, ...]


@dataclass(frozen=True)
class FeatureInputs:
    """A feature with its inputs in the order of the layout."""

    name: str
    meaning: Meaning
    ids: tuple[IdInput, ...]
    numbers: tuple[NumberInput, ...]


def feature_inputs(schema: Schema, layout: Layout) -> list[FeatureInputs]:
    """All features in the order of the settings."""
    return [
        FeatureInputs(
            name,
            feature.meaning(schema),
            tuple(each for each in layout.ids if each.feature == name),
            _numbers(layout.dense, name),
        )
        for name, feature in schema.features.items()
    ]


def _numbers(dense: tuple[DenseInput, ...], feature: str) -> tuple[NumberInput, ...]:
    places = {each.name: place for place, each in enumerate(dense) if each.feature == feature}
    indicators = {f"{name}_missing" for name in places}.intersection(places)
    return tuple(
        NumberInput(name, place, places.get(f"{name}_missing"), dense[place].edges)
        for name, place in places.items()
        if name not in indicators
    )


@dataclass(frozen=True)
class IdCounts:
    """Counts of one id input over a table of R rows.

    Attributes:
        lookups: Split -> (R,) lookups. A row of the log without any id counts as a lookup of row 0, as missing.
        empty: Split -> rows without any id.
        areas: For each task, how well the training rates of the ids rank validation rows.
    """

    lookups: dict[str, np.ndarray]
    empty: dict[str, int]
    areas: Sequence[float | None]


@dataclass(frozen=True)
class NumberCounts:
    """Counts of one dense input.

    Attributes:
        bins: Names of the bins of drift, at the input's edges, or else about `PSI_BINS` of equal training mass. The
            last bin holds missing values.
        counts: Split -> (bins,) rows.
        distinct: Different values in training rows.
        areas: For each task, how well the number alone ranks validation rows, whichever way round, with missing values
            at the better end.
    """

    bins: list[str]
    counts: dict[str, np.ndarray]
    distinct: int
    areas: Sequence[float | None]


@dataclass(frozen=True)
class Drawn:
    """Rows that stand for the validation and test rows."""

    values: np.ndarray  # (N, F) float32, numbers
    rates: np.ndarray  # (N, I, T) float32, mean training rate of each id input for each task
    positive: np.ndarray  # (N, T) float32, 1 or 0, NaN where unobserved
    user: np.ndarray  # (N,) int64
    is_test: np.ndarray  # (N,) bool


@dataclass(frozen=True)
class Counts:
    """Counts of a data set.

    Attributes:
        splits: Split -> rows, users, times and labels, as `health.json` holds them.
        weeks: Labels of each split by week, from Monday 00:00 UTC.
        users_in_both: Fraction of the users of test rows that training rows have too.
        ids: Name of the input -> counts.
        numbers: Name of the input -> counts.
        drawn: Rows that stand for validation and test rows.
    """

    layout: Layout
    features: Sequence[FeatureInputs]
    splits: dict[str, dict[str, Any]]
    weeks: list[dict[str, Any]]
    users_in_both: float
    ids: dict[str, IdCounts]
    numbers: dict[str, NumberCounts]
    drawn: Drawn


def collect(
    prepared: FeatureFolder,
    schema: Schema,
    scratch: Path,
    memory_gib: float = MEMORY_GIB,
    workers: int | None = None,
) -> Counts:
    """Count all encoded rows.

    Args:
        prepared: Folder of the features.
        schema: Schema of the log.
        scratch: Folder for data that memory does not hold. It is made and removed.
        memory_gib: As for `open_database`.
        workers: As for `open_database`.

    Raises:
        UserError: A split has no rows, or rows can't be read.
    """
    import duckdb

    prepared.require_rows(*SPLITS)
    layout, features = prepared.layout, feature_inputs(schema, prepared.layout)
    for split in SPLITS:
        EncodedRows(prepared.split(split), layout)  # It explains wrong files better than DuckDB does.
    ids, numbers, tasks = dict[str, IdCounts](), dict[str, NumberCounts](), range(len(layout.tasks))
    try:
        with open_database(scratch, memory_gib, workers) as database:
            for split in SPLITS:
                _view(database, split, prepared)
            splits, weeks = _count_labels(database, layout)
            both = "SELECT avg((w0 IN (SELECT w0 FROM train))::INT) FROM (SELECT DISTINCT w0 FROM test)"
            (users_in_both,) = database.row(both)
            rates = list[np.ndarray]()
            _draw(database, splits, len(layout.dense) + len(layout.ids) * len(tasks))
            with bar() as progress:
                for feature in progress.track(features, description="inspecting"):
                    for each in feature.ids:
                        ids[each.name], of_rows = _count_ids(database, layout, each)
                        rates += [] if each.placement else [of_rows]
                    numbers |= _count_numbers(database, feature, tasks)
            drawn = _read_drawn(database, layout, rates)
    except duckdb.Error as error:
        raise UserError(f"the rows in '{prepared.folder}' can't be read ({first_line(error)}); {ADVICE}") from None
    return Counts(layout, features, splits, weeks, users_in_both, ids, numbers, drawn)


def _view(database: Database, split: str, prepared: FeatureFolder) -> None:
    """Makes a view of the rows of a split: `WHOS` as w0 to w2, the time t; by their place in the layout, ids as i0 and
    so on, lists all of them, numbers d0; of tasks labels l0, null where unobserved, and p0, whether they are positive.
    """
    layout, files = prepared.layout, sorted(prepared.split(split).glob("*.parquet"))
    places = {name: f"c{place}" for place, name in enumerate(pq.read_schema(files[0]).names)}
    columns = {f"w{place}": places[name] for place, name in enumerate(WHOS)} | {"t": f"epoch_us({places['time']})"}
    for place, each in enumerate(layout.ids):
        column = places[f"id.{each.name}"]
        columns[f"i{place}"] = f"CASE WHEN len({column}) = 0 THEN [0] ELSE {column} END" if each.many else column
    columns |= {f"d{place}": places[f"dense.{number.name}"] for place, number in enumerate(layout.dense)}
    for place, task in enumerate(layout.tasks):
        label = places[f"label.{task.name}"]
        columns[f"l{place}"] = label = f"CASE WHEN NOT isnan({label}) THEN {label}::DOUBLE END"
        # A linear kind's label above its mean is positive.
        columns[f"p{place}"] = f"{label} > {task.mean if task.kind.is_linear else 0.5:.17e}"
    paths = ", ".join("'" + escape(str(file)).replace("'", "''") + "'" for file in files)
    source = f"read_parquet([{paths}], hive_partitioning = false) AS file({', '.join(places.values())})"
    wanted = ", ".join(f"{column} AS {name}" for name, column in columns.items())
    database.run(f"CREATE VIEW {split} AS SELECT {wanted} FROM {source}")


def _count_labels(database: Database, layout: Layout) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Describe the rows and labels of each split, and the labels by week."""
    splits, weeks = dict[str, dict[str, Any]](), dict[int, dict[str, Any]]()
    labels = "".join(f", count(l{task}), coalesce(sum(l{task}), 0)" for task in range(len(layout.tasks)))
    who = "".join(f", count(DISTINCT w{place})" for place in range(len(WHOS)))
    week = "epoch_us(date_trunc('week', make_timestamp(t)))"

    def describe(rows: int, *its: float) -> dict[str, Any]:
        return {
            task.name: {
                "kind": task.kind,
                "observed": observed,
                "share_observed": observed / rows,
                "rate": total / observed if observed else None,
            }
            for task, observed, total in zip(layout.tasks, its[::2], its[1::2], strict=True)
        }

    for split in SPLITS:
        first, last, *different = database.row(f"SELECT min(t), max(t){who} FROM {split}")
        rows, *its = database.row(f"SELECT count(*){labels} FROM {split}")
        splits[split] = {
            "rows": rows,
            **{f"{name}s": count for name, count in zip(WHOS, different, strict=True)},
            "first_request": format_time(first),
            "last_request": format_time(last),
            "tasks": describe(rows, *its),
        }
        for start, rows, *its in database.rows(f"SELECT {week} AS week, count(*){labels} FROM {split} GROUP BY week"):
            weeks.setdefault(start, {})[split] = {"rows": rows, "tasks": describe(rows, *its)}
    return splits, [{"week": format_time(start)[:10], "splits": its} for start, its in sorted(weeks.items())]


def _draw(database: Database, splits: Mapping[str, Mapping[str, Any]], width: int) -> None:
    """Make the table `drawn` of whole requests of validation and test rows, about as many rows as `MOST_ROWS` says."""
    parts = []
    for split, most in MOST_ROWS.items():
        every = -(-splits[split]["rows"] // min(most, MOST_VALUES // max(1, width)))
        parts.append(f"SELECT {split == 'test'} AS is_test, * FROM {split} WHERE hash(w2) % {every} = 0")
    database.run(f"CREATE TABLE drawn AS SELECT row_number() OVER () - 1 AS row, * FROM ({' UNION ALL '.join(parts)})")


def _read_drawn(database: Database, layout: Layout, rates: Sequence[np.ndarray]) -> Drawn:
    """Read the numbers and labels of the drawn rows. rates: (N, T) of each id input."""
    dense = [f"d{place}" for place, number in enumerate(layout.dense) if not number.placement]
    labels = [f"p{task}" for task in range(len(layout.tasks))]
    wanted = "".join(f", {column}::FLOAT AS {column}" for column in [*dense, *labels])
    found = database.table(f"SELECT is_test, dense_rank() OVER (ORDER BY w0) AS user{wanted} FROM drawn ORDER BY row")
    read = {name: found[name].to_numpy() for name in found.column_names}

    def stack(arrays: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
        return np.stack(arrays, axis=1) if arrays else np.empty((len(found), *shape), np.float32)

    values, positive = (stack([read[name] for name in names], (0,)) for names in (dense, labels))
    return Drawn(values, stack(rates, (0, len(labels))), positive, read["user"], read["is_test"])


def _count_ids(database: Database, layout: Layout, each: IdInput) -> tuple[IdCounts, np.ndarray]:
    """Count the lookups of an input and rate each drawn row by its ids.

    The rate of an id is the fraction of positives in training, with `RATE_SMOOTHING` rows of the overall fraction. The
    rate of a list is the mean rate of the ids.

    Returns:
        The counts, and (N, T) float32 rates of the drawn rows.
    """
    tasks, column, rows = range(len(layout.tasks)), f"i{layout.ids.index(each)}", layout.table(each.table).rows
    id_, none = (f"unnest({column})", "[0]") if each.many else (column, "0")
    positive = "".join(f", p{task}" for task in tasks)
    lookups, empty, rates = dict[str, np.ndarray](), dict[str, int](), {"id": np.arange(rows)}
    for split in ("test", "train"):
        (empty[split],) = database.row(f"SELECT count(*) FILTER ({column} = {none}) FROM {split}")
        of_rows = f"SELECT {id_} AS id{positive} FROM {split}"
        found = database.table(f"SELECT id, count(*) AS rows{_labels(tasks)} FROM ({of_rows}) GROUP BY id")
        named = {name: np.zeros(rows, np.int64) for name in found.column_names}
        for name, values in named.items():
            values[found["id"].to_numpy()] = found[name].to_numpy()
        lookups[split] = named["rows"]
    for task in tasks:
        positives, observed = named[f"k{task}"], named[f"k{task}"] + named[f"n{task}"]
        overall = positives.sum() / max(observed.sum(), 1)
        rates[f"r{task}"] = (positives + RATE_SMOOTHING * overall) / (observed + RATE_SMOOTHING)
    table = pa.table(rates)
    database.fill("rates", table.schema, [table])
    means = "".join(f", any_value(p{task}) AS p{task}, avg(r{task}) AS r{task}" for task in tasks)

    def rated(source: str) -> str:
        of_rows = f"SELECT row, {id_} AS id{positive} FROM {source}"
        return f"SELECT row{means} FROM ({of_rows}) JOIN rates USING (id) GROUP BY row"

    database.run(f"CREATE TABLE scored AS {rated('(SELECT row_number() OVER () AS row, * FROM validation)')}")
    areas = [
        _area(database, task, f"SELECT r{task} AS value{_labels([task])} FROM scored GROUP BY value")
        if named[f"k{task}"].any() or named[f"n{task}"].any()
        else None
        for task in tasks
    ]
    found = database.table(f"FROM ({rated('drawn')}) ORDER BY row")
    drawn = np.column_stack([found[f"r{task}"].to_numpy().astype(np.float32) for task in tasks])
    database.run("DROP TABLE scored", "DROP TABLE rates")
    return IdCounts(lookups, empty, areas), drawn


def _count_numbers(database: Database, feature: FeatureInputs, tasks: Sequence[int]) -> dict[str, NumberCounts]:
    """What is counted of the numbers of a feature, by name.

    A missing vector is all zeros. Any other number without an indicator was never missing in training rows.
    """
    if not feature.numbers:
        return {}
    columns, none = [f"p{task}" for task in tasks], "false"
    if feature.meaning.zeros_missing:
        none = " AND ".join(f"d{each.place} = 0" for each in feature.numbers)
    for each in feature.numbers:
        missing = "none" if each.indicator is None else f"d{each.indicator} > 0.5"
        columns.append(f"CASE WHEN NOT {missing} THEN d{each.place} END AS d{each.place}")
    splits = [
        f"SELECT {number} AS split, {', '.join(columns)} FROM (SELECT *, {none} AS none FROM {split})"
        for number, split in enumerate(SPLITS)
    ]
    database.run(f"CREATE TABLE numbers AS {' UNION ALL '.join(splits)}")
    sums = {each.name: _count_number(database, each, tasks) for each in feature.numbers}
    database.run("DROP TABLE numbers")
    return sums


def _count_number(database: Database, number: NumberInput, tasks: Sequence[int]) -> NumberCounts:
    """What is counted of a number in the table `numbers`, null where it is missing."""
    values = f"SELECT split, d{number.place} AS value, count(*) AS rows{_labels(tasks)} FROM numbers GROUP BY ALL"
    database.run(f"CREATE TABLE counted AS {values}")
    (distinct,) = database.row("SELECT count(value) FROM counted WHERE split = 0")
    edges = number.edges
    if len(edges) < 2:
        known = "SELECT value, sum(rows) OVER (ORDER BY value) AS mass, sum(rows) OVER () AS total FROM counted WHERE "
        ends = [f"min(value) FILTER (mass >= {share} * total / {PSI_BINS})" for share in range(1, PSI_BINS + 1)]
        found = database.row(f"SELECT {', '.join(ends)} FROM ({known} split = 0 AND value IS NOT NULL)")
        edges = tuple(sorted({each for each in found if each is not None}))
    place = " + ".join(["0", *(f"(value > {each:.17e})::INT" for each in edges)])  # with an exponent it is a DOUBLE
    bins = f"SELECT split, CASE WHEN value IS NULL THEN {len(edges) + 1} ELSE {place} END AS bin, rows FROM counted"
    counts = {split: np.zeros(len(edges) + 2, np.int64) for split in SPLITS}
    for split, bin_, rows in database.rows(f"SELECT split, bin, sum(rows) FROM ({bins}) GROUP BY ALL"):
        counts[SPLITS[split]][bin_] = rows
    areas = list[float | None]()
    for task in tasks:
        rows = f"SELECT value, k{task}, n{task} FROM counted WHERE split = 1"
        found = [_area(database, task, rows, end) for end in ("FIRST", "LAST")]
        areas.append(max((max(each, 1 - each) for each in found if each is not None), default=None))
    database.run("DROP TABLE counted")
    return NumberCounts([*_names(edges), "missing"], counts, distinct, areas)


def _labels(tasks: Sequence[int]) -> str:
    """How many rows have a positive label, and how many another one."""
    return "".join(f", count(*) FILTER (p{n}) AS k{n}, count(*) FILTER (NOT p{n}) AS n{n}" for n in tasks)


def _area(database: Database, task: int, rows: str, nulls: str = "LAST") -> float | None:
    """The area under the ROC curve from numbers of positive and negative rows by value; None without both."""
    below = f"sum(n{task}) OVER (ORDER BY value NULLS {nulls} ROWS UNBOUNDED PRECEDING) - n{task} / 2 AS below"
    pairs = f"sum(k{task})::DOUBLE * sum(n{task})"
    query = f"SELECT sum(k{task} * below) / nullif({pairs}, 0) FROM (SELECT *, {below} FROM ({rows}))"
    (area,) = database.row(query)
    return None if area is None else float(area)


def _names(edges: Sequence[float]) -> list[str]:
    if not edges:
        return ["all values"]
    words = [f"{edge:.3g}" for edge in edges]
    between = [f"{low} to {high}" for low, high in pairwise(words)]
    return [f"up to {words[0]}", *between, f"over {words[-1]}"]


def measure_quick_model(drawn: Drawn, task: int) -> dict[str, float | None] | None:
    """Fit the quick model of a task. Returns None if a split has fewer than `FEWEST` rows of either label.

    Returns:
        `auc` on test rows, `gauc_user` within users and its standard error over users, `gauc_error`. The latter two are
        None if no user has both labels.
    """
    # Importing scikit-learn takes a second.
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rates = np.clip(drawn.rates[:, :, task], _SMALLEST_RATE, 1 - _SMALLEST_RATE)
    values = np.nan_to_num(np.hstack([drawn.values, np.log(rates / (1 - rates))]), posinf=0.0, neginf=0.0)
    positive = drawn.positive[:, task]
    fit, test = (~np.isnan(positive) & (drawn.is_test == is_test) for is_test in (False, True))
    if not values.shape[1] or any(min(positive[its].sum(), (1 - positive[its]).sum()) < FEWEST for its in (fit, test)):
        return None
    model = make_pipeline(StandardScaler(), LogisticRegression(C=_RIDGE, solver="newton-cholesky"))
    predicted = model.fit(values[fit], positive[fit]).decision_function(values[test])
    label, (_, user) = positive[test], np.unique(drawn.user[test], return_inverse=True)
    auc = float(roc_auc_score(label, predicted))
    within, rows = grouped_auc(user, predicted, label, 1 - label, user.max() + 1), np.bincount(user)
    known = ~np.isnan(within)
    if not known.any():
        return {"auc": auc, "gauc_user": None, "gauc_error": None}
    within, weights = within[known], rows[known] / rows[known].sum()
    gauc = float(weights @ within)
    return {"auc": auc, "gauc_user": gauc, "gauc_error": float(np.sqrt(weights**2 @ (within - gauc) ** 2))}
