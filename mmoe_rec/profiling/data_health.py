"""The health of a data set: its encoded rows counted by SQL, in bounded memory however many rows there are.

`inspect` returns plain data, as `health.json` holds it. Unknown values are None.

overview    the log and its splits
features    each feature with its inputs: coverage, different values, unknown ids, drift, AUC alone
weeks       labels by week
findings    suspicious properties, in words (`health_findings.py`)
headline    the same in one sentence

Drift is the population stability index between training fractions p and test fractions q of the same bins:

    PSI = sum over bins of (q - p) ln(q / p),    p = (rows in bin + 1/2) / (all rows + bins / 2), q likewise

The half row keeps empty bins finite. The index of N and M rows without drift, about (bins - 1) (1 / N + 1 / M), is
subtracted. It is usually read as: below .1 stable, .1 to .25 some drift, above .25 strong drift (Siddiqi, Credit
Risk Scorecards, 2006).
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from glob import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.batches.encoded_rows import ADVICE, EncodedRows
from mmoe_rec.errors import UserError, first_line
from mmoe_rec.features.layout import IdInput, Layout
from mmoe_rec.features.vocabulary import row_names
from mmoe_rec.log.checks import format_time
from mmoe_rec.log.database import MEMORY_GIB, Database, open_database
from mmoe_rec.preprocessing.prepare import FeatureFolder
from mmoe_rec.profiling.health_findings import describe, find
from mmoe_rec.progress import bar
from mmoe_rec.settings.schema import Meaning, Schema

SPLITS = ("train", "validation", "test")
COMPARED = ("train", "test")
WHOS = ("user", "candidate", "request")  # read beside the model's inputs, as is the time
RATE_SMOOTHING = 20.0  # rows of the overall rate that the rate of an id is mixed with
FREQUENT = 50  # most frequent table rows that drift is measured in
PSI_BINS = 20


def inspect(
    name: str,
    prepared: FeatureFolder,
    schema: Schema,
    scratch: Path,
    memory_gib: float = MEMORY_GIB,
    workers: int | None = None,
) -> dict[str, Any]:
    """Describe the health of a data set, ready for JSON.

    Args:
        name: Name of the data set.
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
    layout, manifest = prepared.layout, prepared.manifest
    for split in SPLITS:
        EncodedRows(prepared.split(split), layout)  # It explains wrong files better than DuckDB does.
    try:
        with open_database(scratch, memory_gib, workers) as database:
            for split in SPLITS:
                _view(database, split, prepared)
            splits, weeks = _count_labels(database, layout)
            counts = _Counts(database, prepared, splits)
            with bar() as progress:
                features = [
                    _feature(feature, schema, counts)
                    for feature in progress.track(list(schema.features), description="inspecting")
                ]
            both = "SELECT avg((w0 IN (SELECT w0 FROM train))::INT) FROM (SELECT DISTINCT w0 FROM test)"
            (users_in_both,) = database.row(both)
    except duckdb.Error as error:
        raise UserError(f"the rows in '{prepared.folder}' can't be read ({first_line(error)}); {ADVICE}") from None
    health = {
        "name": name,
        "fingerprint": manifest.get("fingerprint"),
        "overview": _overview(manifest, splits, schema, users_in_both),
        "features": features,
        "weeks": [] if manifest.get("first_request") is None else weeks,
    }
    # Python's numbers for NumPy's, and None for what is not finite.
    text = json.dumps({**health, "findings": find(health)}, default=lambda each: each.item())
    found: dict[str, Any] = json.loads(text, parse_constant=lambda _: None)
    return found | {"headline": describe(found["findings"])}


def _view(database: Database, split: str, prepared: FeatureFolder) -> None:
    """Make a view of the rows of a split.

    It has `WHOS` as w0 to w2 and the time t. By their place in the layout it has ids as i0 and so on, lists all of
    them, and numbers as d0. Of tasks it has labels l0, null where unobserved, and p0, whether they are positive.
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
    """Describe the rows and labels of each split, and the labels by week, from Monday 00:00 UTC."""
    splits, weeks = dict[str, dict[str, Any]](), dict[int, dict[str, Any]]()
    labels = "".join(f", count(l{task}), coalesce(sum(l{task}), 0)" for task in range(len(layout.tasks)))
    who = "".join(f", count(DISTINCT w{place})" for place in range(len(WHOS)))
    week = "epoch_us(date_trunc('week', make_timestamp(t)))"

    def describe_tasks(*its: float) -> dict[str, Any]:
        return {
            task.name: {
                "kind": task.kind,
                "observed": observed,
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
            "tasks": describe_tasks(*its),
        }
        for start, rows, *its in database.rows(f"SELECT {week} AS week, count(*){labels} FROM {split} GROUP BY week"):
            weeks.setdefault(start, {})[split] = {"rows": rows, "tasks": describe_tasks(*its)}
    return splits, [{"week": format_time(start)[:10], "splits": its} for start, its in sorted(weeks.items())]


def _overview(
    manifest: Mapping[str, Any], counted: Mapping[str, dict[str, Any]], schema: Schema, users_in_both: float
) -> dict[str, Any]:
    """Describe the files, rows and times of the log (None if it has none), files left out, and the splits."""
    splits = dict[str, dict[str, Any]]()
    for split, counts in counted.items():
        told = manifest.get("splits", {}).get(split, {})
        splits[split] = counts | {
            "labels_known_by": format_time(told["known_by"]) if told.get("known_by") is not None else None,
            "unmatured": {task: count for task, count in told.get("unmatured", {}).items() if count},
        }
        if manifest.get("first_request") is None:
            splits[split] |= dict.fromkeys(("first_request", "last_request", "labels_known_by"))
    names = ("log", "digest", "files", "rows", "first_request", "last_request", "requests")
    return {name: manifest.get(name) for name in names} | {
        "rows_in_splits": sum(split["rows"] for split in splits.values()),
        "left_out": [{name: str(each[name]) for name in ("file", "reason")} for each in manifest.get("left_out", [])],
        "split_column": None if schema.split is None else schema.split.column,
        # Where times split rows, users are in both by right.
        "users_in_both": users_in_both if schema.split is not None and schema.columns.has_user else None,
        "splits": splits,
    }


def _feature(name: str, schema: Schema, counts: "_Counts") -> dict[str, Any]:
    settings, keys = schema.features[name], schema.columns
    meaning = settings.meaning(schema)
    ids = [each for each in counts.layout.ids if each.feature == name]
    inputs = [counts.count_ids(each, meaning.parts.get(each.table, meaning)) for each in ids]
    inputs += counts.count_numbers(number_places(counts.layout, name), meaning.zeros_missing)
    return {
        "name": name,
        "kind": settings.kind,
        "role": schema.role_of(name),
        "columns": meaning.columns,
        "is_key": settings.kind == "id" and meaning.columns in ((keys.user,), (keys.candidate,)),
        "coverage": {split: _best(min, (each["coverage"][split] for each in inputs)) for split in COMPARED},
        "unknown": {split: inputs[0]["unknown"][split] if inputs else None for split in COMPARED},
        "distinct": inputs[0]["distinct"] if len(inputs) == 1 else None,
        "psi": _best(max, (each["psi"] for each in inputs)),
        "auc": {task.name: _best(max, (each["auc"][task.name] for each in inputs)) for task in counts.layout.tasks},
        "inputs": inputs,
    }


def _best(pick: Callable[..., float], values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return pick(known) if known else None


def number_places(layout: Layout, feature: str) -> dict[int, int | None]:
    """Return the dense inputs of a feature and the indicators of their missing values, by their places."""
    places = {each.name: place for place, each in enumerate(layout.dense) if each.feature == feature}
    indicators = {f"{name}_missing" for name in places}.intersection(places)
    return {place: places.get(f"{name}_missing") for name, place in places.items() if name not in indicators}


class _Counts:
    """Counts of the inputs of a data set, as `health.json` holds them."""

    def __init__(self, database: Database, prepared: FeatureFolder, splits: Mapping[str, Mapping[str, Any]]) -> None:
        self.prepared, self.layout = prepared, prepared.layout
        self._database, self._rows = database, {split: counted["rows"] for split, counted in splits.items()}
        self._tasks = range(len(self.layout.tasks))

    def count_ids(self, each: IdInput, meaning: Meaning) -> dict[str, Any]:
        """Count the lookups of an input. A row without any id counts as a lookup of row 0, as missing."""
        column, rows = f"i{self.layout.ids.index(each)}", self.layout.table(each.table).rows
        id_, none = (f"unnest({column})", "[0]") if each.many else (column, "0")
        positive = "".join(f", p{task}" for task in self._tasks)
        lookups, empty = dict[str, np.ndarray](), dict[str, int]()
        for split in ("test", "train"):
            (empty[split],) = self._database.row(f"SELECT count(*) FILTER ({column} = {none}) FROM {split}")
            of_rows = f"SELECT {id_} AS id{positive} FROM {split}"
            query = f"SELECT id, count(*) AS rows{_labels(self._tasks)} FROM ({of_rows}) GROUP BY id"
            found = self._database.table(query)
            counted = {name: np.zeros(rows, np.int64) for name in found.column_names}
            for name, values in counted.items():
                values[found["id"].to_numpy()] = found[name].to_numpy()
            lookups[split] = counted["rows"]
        missing, first = int(meaning.missing), meaning.first_known
        known = lookups["train"][first:]
        frequent = np.argsort(-known, kind="stable")[:FREQUENT] + first
        others = ["all others"] * (len(known) > FREQUENT) + ["unknown"] * bool(meaning.unknown) + ["missing"] * missing
        unknown, drift = dict[str, float | None](), list[np.ndarray]()
        for split in COMPARED:
            of_split = lookups[split]
            given, out = of_split[missing:].sum(), of_split[missing:first].sum()
            unknown[split] = out / given if meaning.unknown and given else None
            rest = {"all others": of_split[first:].sum() - of_split[frequent].sum(), "unknown": out}
            rest["missing"] = of_split[0]
            drift.append(np.array([*of_split[frequent], *(rest[name] for name in others)], np.float64))
        names = row_names(meaning, each.table, [*frequent.tolist(), *others], self.prepared.serving)
        return {
            "name": each.name,
            "columns": [f"id.{each.name}"],
            "table": each.table,
            "coverage": self._coverage(empty) if meaning.missing else dict.fromkeys(COMPARED),
            "distinct": int((known > 0).sum()),  # known ids, or buckets, that occur in training rows
            "constant": int((lookups["train"] > 0).sum()) <= 1,
            "unknown": unknown,
            **_drift(names, *drift),
            "auc": self._areas_of_ids(column, id_, counted),
        }

    def _areas_of_ids(self, column: str, id_: str, counted: Mapping[str, np.ndarray]) -> dict[str, float | None]:
        """Rank validation rows by the training rate of their ids, a list by the mean rate of its ids.

        The rate of an id is the fraction of positives in training, with `RATE_SMOOTHING` rows of the overall fraction.
        """
        rates = {"id": np.arange(len(counted["id"]))}
        for task in self._tasks:
            positives, observed = counted[f"k{task}"], counted[f"k{task}"] + counted[f"n{task}"]
            overall = positives.sum() / max(observed.sum(), 1)
            rates[f"r{task}"] = (positives + RATE_SMOOTHING * overall) / (observed + RATE_SMOOTHING)
        table = pa.table(rates)
        self._database.fill("rates", table.schema, [table])
        positive = "".join(f", p{task}" for task in self._tasks)
        of_rows = f"SELECT row, {id_} AS id{positive} FROM (SELECT row_number() OVER () AS row, * FROM validation)"
        means = "".join(f", any_value(p{task}) AS p{task}, avg(r{task}) AS r{task}" for task in self._tasks)
        self._database.run(
            f"CREATE TABLE scored AS SELECT row{means} FROM ({of_rows}) JOIN rates USING (id) GROUP BY row"
        )
        areas = dict[str, float | None]()
        for place, output in enumerate(self.layout.tasks):
            rows = f"SELECT r{place} AS value{_labels([place])} FROM scored GROUP BY value"
            has_labels = counted[f"k{place}"].any() or counted[f"n{place}"].any()
            areas[output.name] = self._area(place, rows) if has_labels else None
        self._database.run("DROP TABLE scored", "DROP TABLE rates")
        return areas

    def count_numbers(self, numbers: Mapping[int, int | None], zeros_missing: bool) -> list[dict[str, Any]]:
        """Count the numbers of a feature, given with their indicators by `number_places`.

        A missing vector is all zeros. Any other number without an indicator was never missing in training rows.
        """
        if not numbers:
            return []
        columns = [f"p{task}" for task in self._tasks]
        none = " AND ".join(f"d{place} = 0" for place in numbers) if zeros_missing else "false"
        for place, indicator in numbers.items():
            missing = "none" if indicator is None else f"d{indicator} > 0.5"
            columns.append(f"CASE WHEN NOT {missing} THEN d{place} END AS d{place}")
        splits = [
            f"SELECT {number} AS split, {', '.join(columns)} FROM (SELECT *, {none} AS none FROM {split})"
            for number, split in enumerate(SPLITS)
        ]
        self._database.run(f"CREATE TABLE numbers AS {' UNION ALL '.join(splits)}")
        found = [self._count_number(place, indicator, zeros_missing) for place, indicator in numbers.items()]
        self._database.run("DROP TABLE numbers")
        return found

    def _count_number(self, place: int, indicator: int | None, zeros_missing: bool) -> dict[str, Any]:
        """Count a number in the table `numbers`, null where it is missing."""
        number = self.layout.dense[place]
        values = f"SELECT split, d{place} AS value, count(*) AS rows{_labels(self._tasks)} FROM numbers GROUP BY ALL"
        self._database.run(f"CREATE TABLE counted AS {values}")
        (distinct,) = self._database.row("SELECT count(value) FROM counted WHERE split = 0")
        names, counts = self._count_bins(number.edges)
        areas = dict[str, float | None]()
        for task_place, task in enumerate(self.layout.tasks):
            # A number ranks either way round, with missing values at the better end.
            rows = f"SELECT value, k{task_place}, n{task_place} FROM counted WHERE split = 1"
            ends = [self._area(task_place, rows, end) for end in ("FIRST", "LAST")]
            areas[task.name] = max((max(each, 1 - each) for each in ends if each is not None), default=None)
        self._database.run("DROP TABLE counted")
        missing = {split: int(counts[split][-1]) for split in COMPARED}
        tells = indicator is not None or zeros_missing
        bins = slice(None) if tells else slice(-1)
        return {
            "name": number.name,
            "columns": [f"dense.{number.name}"] + [f"dense.{number.name}_missing"] * (indicator is not None),
            "table": None,
            # Without an indicator every training row had a value. Whether test rows do cannot be seen.
            "coverage": self._coverage(missing) if tells else {"train": 1.0, "test": None},
            "distinct": distinct,
            # All training rows have one value, or all have none.
            "constant": distinct + bool(missing["train"]) <= 1,
            "unknown": dict.fromkeys(COMPARED),
            **_drift(names[bins], counts["train"][bins], counts["test"][bins]),
            "auc": areas,
        }

    def _count_bins(self, edges: Sequence[float]) -> tuple[list[str], dict[str, np.ndarray]]:
        """Count the values in the table `counted` by bin.

        The bins lie at the input's edges, or have about equal training mass if there are none. The last bin holds
        missing values.

        Returns:
            Names of the bins, and split -> (bins,) rows.
        """
        if len(edges) < 2:
            mass = "sum(rows) OVER (ORDER BY value) AS mass, sum(rows) OVER () AS total"
            known = f"SELECT value, {mass} FROM counted WHERE split = 0 AND value IS NOT NULL"
            ends = [f"min(value) FILTER (mass >= {part} * total / {PSI_BINS})" for part in range(1, PSI_BINS + 1)]
            found = self._database.row(f"SELECT {', '.join(ends)} FROM ({known})")
            edges = tuple(sorted({each for each in found if each is not None}))
        place = " + ".join(["0", *(f"(value > {each:.17e})::INT" for each in edges)])  # with an exponent it is a DOUBLE
        bins = f"SELECT split, CASE WHEN value IS NULL THEN {len(edges) + 1} ELSE {place} END AS bin, rows FROM counted"
        counts = {split: np.zeros(len(edges) + 2, np.int64) for split in SPLITS}
        for split, bin_, rows in self._database.rows(f"SELECT split, bin, sum(rows) FROM ({bins}) GROUP BY ALL"):
            counts[SPLITS[split]][bin_] = rows
        words = [f"{edge:.3g}" for edge in edges]
        between = [f"{low} to {high}" for low, high in pairwise(words)]
        names = [f"up to {words[0]}", *between, f"over {words[-1]}"] if words else ["all values"]
        return [*names, "missing"], counts

    def _area(self, task: int, rows: str, nulls: str = "LAST") -> float | None:
        """Return the AUC from numbers of positive and negative rows by value, None if one of them is missing."""
        below = f"sum(n{task}) OVER (ORDER BY value NULLS {nulls} ROWS UNBOUNDED PRECEDING) - n{task} / 2 AS below"
        pairs = f"sum(k{task})::DOUBLE * sum(n{task})"
        query = f"SELECT sum(k{task} * below) / nullif({pairs}, 0) FROM (SELECT *, {below} FROM ({rows}))"
        (area,) = self._database.row(query)
        return None if area is None else float(area)

    def _coverage(self, missing: Mapping[str, int]) -> dict[str, float]:
        return {split: 1 - missing[split] / self._rows[split] for split in COMPARED}


def _labels(tasks: Sequence[int]) -> str:
    """Return SQL of how many rows have a positive label, and how many another one."""
    return "".join(f", count(*) FILTER (p{n}) AS k{n}, count(*) FILTER (NOT p{n}) AS n{n}" for n in tasks)


def psi(train: np.ndarray, test: np.ndarray) -> float | None:
    """Return the population stability index of (B,) counts beyond chance, None if a split has no rows."""
    if not train.sum() or not test.sum():
        return None
    p, q = ((each + 0.5) / (each.sum() + 0.5 * len(each)) for each in (train, test))
    noise = (len(train) - 1) * (1 / train.sum() + 1 / test.sum())
    return max(0.0, float(((q - p) * np.log(q / p)).sum() - noise))


def _drift(labels: Sequence[str], train: np.ndarray, test: np.ndarray) -> dict[str, Any]:
    shares = (train / max(train.sum(), 1), test / max(test.sum(), 1))
    bins = [{"bin": label, "train": p, "test": q} for label, p, q in zip(labels, *shares, strict=True)]
    return {"psi": psi(train, test), "bins": bins}
