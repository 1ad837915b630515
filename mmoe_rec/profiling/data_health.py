"""The health of a data set, from its encoded rows: counts by SQL, and features by at most `MAX_SAMPLE_ROWS` rows of a
split.

`measure_health` returns plain data, as `health.json` holds it. Unknown values are None.

overview    the log and its splits
features    each feature with its inputs: coverage, unknown ids, drift, AUC alone
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
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from glob import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.auc import auc_of_counts
from mmoe_rec.batches.encoded_dataset import ADVICE, EncodedDataset
from mmoe_rec.errors import UserError, first_line
from mmoe_rec.features.layout import IdInput, Layout
from mmoe_rec.features.vocabulary import row_names
from mmoe_rec.log.checks import format_time
from mmoe_rec.log.database import DEFAULT_MEMORY_GIB, Database, open_database
from mmoe_rec.point_in_time.arrays import one_array
from mmoe_rec.preprocessing.prepare import FeatureFolder
from mmoe_rec.profiling.health_findings import describe_findings, list_findings
from mmoe_rec.progress import bar
from mmoe_rec.settings.schema import InputSemantics, Schema

MAX_SAMPLE_ROWS = 1_000_000
"""Rows of a split that features are measured by. Of more rows, those of some users are read."""
SPLITS = ("train", "validation", "test")
COMPARED_SPLITS = ("train", "test")
ID_COLUMNS = ("user", "candidate", "request")  # read beside the model's inputs, as is the time
RATE_SMOOTHING = 20.0  # rows of the overall rate that the rate of an id is mixed with
MAX_FREQUENT_IDS = 50  # most frequent table rows that drift is measured in
PSI_BINS = 20


def measure_health(
    name: str,
    prepared: FeatureFolder,
    schema: Schema,
    scratch: Path,
    memory_gib: float = DEFAULT_MEMORY_GIB,
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
    prepared.require_rows(*SPLITS)
    layout, manifest = prepared.layout, prepared.manifest
    for split in SPLITS:
        EncodedDataset(prepared.split(split), layout)  # It explains wrong files better than DuckDB does.
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
            (shared_user_fraction,) = database.row(both)
    except duckdb.Error as error:
        raise UserError(f"the rows in '{prepared.folder}' can't be read ({first_line(error)}). {ADVICE}") from None
    health = {
        "name": name,
        "fingerprint": manifest.get("fingerprint"),
        "overview": _overview(manifest, splits, schema, shared_user_fraction),
        "features": features,
        "weeks": [] if manifest.get("first_request") is None else weeks,
    }
    # Python's numbers for NumPy's, and None for what is not finite.
    text = json.dumps({**health, "findings": list_findings(health)}, default=lambda each: each.item())
    found: dict[str, Any] = json.loads(text, parse_constant=lambda _: None)
    return found | {"headline": describe_findings(found["findings"])}


def _view(database: Database, split: str, prepared: FeatureFolder) -> None:
    """Make a view of the rows of a split.

    It has `ID_COLUMNS` as w0 to w2 and the time t. By their place in the layout it has ids as i0 and so on, lists all
    of them, and numbers as d0. Of tasks it has labels l0, null where unobserved, and p0, whether they are positive.
    """
    layout, files = prepared.layout, sorted(prepared.split(split).glob("*.parquet"))
    places = {name: f"c{place}" for place, name in enumerate(pq.read_schema(files[0]).names)}
    columns = {f"w{place}": places[name] for place, name in enumerate(ID_COLUMNS)} | {
        "t": f"epoch_us({places['time']})"
    }
    for place, each in enumerate(layout.ids):
        column = places[f"id.{each.name}"]
        columns[f"i{place}"] = f"CASE WHEN len({column}) = 0 THEN [0] ELSE {column} END" if each.is_list else column
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
    who = "".join(f", count(DISTINCT w{place})" for place in range(len(ID_COLUMNS)))
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
            **{f"{name}s": count for name, count in zip(ID_COLUMNS, different, strict=True)},
            "first_request": format_time(first),
            "last_request": format_time(last),
            "tasks": describe_tasks(*its),
        }
        for start, rows, *its in database.rows(f"SELECT {week} AS week, count(*){labels} FROM {split} GROUP BY week"):
            weeks.setdefault(start, {})[split] = {"rows": rows, "tasks": describe_tasks(*its)}
    return splits, [{"week": format_time(start)[:10], "splits": its} for start, its in sorted(weeks.items())]


def _overview(
    manifest: Mapping[str, Any], counted: Mapping[str, dict[str, Any]], schema: Schema, shared_user_fraction: float
) -> dict[str, Any]:
    """Describe the files, rows and times of the log (None if it has none), files left out, and the splits."""
    splits = dict[str, dict[str, Any]]()
    for split, counts in counted.items():
        told = manifest.get("splits", {}).get(split, {})
        splits[split] = counts | {
            "labels_known_by": format_time(told["label_cutoff"]) if told.get("label_cutoff") is not None else None,
            "pending_labels": {task: count for task, count in told.get("pending_labels", {}).items() if count},
        }
        if manifest.get("first_request") is None:
            splits[split] |= dict.fromkeys(("first_request", "last_request", "labels_known_by"))
    names = ("log", "digest", "files", "rows", "first_request", "last_request", "requests")
    return {name: manifest.get(name) for name in names} | {
        "rows_in_splits": sum(split["rows"] for split in splits.values()),
        "skipped": [{name: str(each[name]) for name in ("file", "reason")} for each in manifest.get("skipped", [])],
        "split_column": None if schema.split is None else schema.split.column,
        # Where times split rows, users are in both by right.
        "shared_user_fraction": shared_user_fraction if schema.split is not None and schema.columns.has_user else None,
        "splits": splits,
    }


def _feature(name: str, schema: Schema, counts: "_Counts") -> dict[str, Any]:
    settings, keys = schema.features[name], schema.columns
    semantics = settings.semantics(schema)
    ids = [each for each in counts.layout.ids if each.feature == name]
    inputs = [counts.count_ids(each, semantics.parts.get(each.table, semantics)) for each in ids]
    inputs += counts.count_numbers(find_dense_inputs(counts.layout, name), semantics.zeros_missing)
    return {
        "name": name,
        "kind": settings.kind,
        "role": schema.role_of(name),
        "columns": semantics.columns,
        "is_key": settings.kind == "id" and semantics.columns in ((keys.user,), (keys.candidate,)),
        "coverage": {split: _best(min, (each["coverage"][split] for each in inputs)) for split in COMPARED_SPLITS},
        "unknown": {split: inputs[0]["unknown"][split] if inputs else None for split in COMPARED_SPLITS},
        "psi": _best(max, (each["psi"] for each in inputs)),
        "auc": {task.name: _best(max, (each["auc"][task.name] for each in inputs)) for task in counts.layout.tasks},
        "inputs": inputs,
    }


def _best(pick: Callable[..., float], values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return pick(known) if known else None


def find_dense_inputs(layout: Layout, feature: str) -> dict[int, int | None]:
    """Return the dense inputs of a feature and the indicators of their missing values, by their places."""
    places = {each.name: place for place, each in enumerate(layout.dense) if each.feature == feature}
    indicators = {f"{name}_missing" for name in places}.intersection(places)
    return {place: places.get(f"{name}_missing") for name, place in places.items() if name not in indicators}


class _Counts:
    """Counts of the inputs of a data set over at most about `MAX_SAMPLE_ROWS` rows of a split, as `health.json` holds
    them."""

    def __init__(self, database: Database, prepared: FeatureFolder, splits: Mapping[str, Mapping[str, Any]]) -> None:
        self.prepared, self.layout, self._database = prepared, prepared.layout, database
        self._every = {split: -(-counted["rows"] // MAX_SAMPLE_ROWS) for split, counted in splits.items()}

    def _read(self, split: str, columns: Sequence[str]) -> tuple[pa.Table, np.ndarray]:
        """Read columns of a split. Returns them with the (N, tasks) labels: 1 if positive, NaN where unobserved."""
        labels = [f"p{place}::INT::DOUBLE AS p{place}" for place in range(len(self.layout.tasks))]
        rows = f"{split} WHERE hash(w0) % {self._every[split]} = 0"
        table = self._database.table(f"SELECT {', '.join([*columns, *labels])} FROM {rows}")
        return table, np.stack([table[f"p{place}"].to_numpy() for place in range(len(labels))], axis=1)

    def _read_ids(self, split: str, each: IdInput) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Read the lookups of an input: (M,) place of the row, (M,) id, and the (N, tasks) labels."""
        table, labels = self._read(split, [column := f"i{self.layout.ids.index(each)}"])
        values = one_array(table[column])
        if not each.is_list:
            return np.arange(len(values)), values.to_numpy(), labels
        row = np.repeat(np.arange(len(values)), values.value_lengths().to_numpy())
        return row, values.flatten().to_numpy(), labels

    def count_ids(self, each: IdInput, semantics: InputSemantics) -> dict[str, Any]:
        """Count the lookups of an input. A row without any id counts as a lookup of row 0, as missing."""
        rows = self.layout.table(each.table).rows
        row, ids, labels = self._read_ids("train", each)
        validation_row, validation_ids, validation_labels = self._read_ids("validation", each)
        _, test_ids, test_labels = self._read_ids("test", each)
        lookups = {"train": np.bincount(ids, minlength=rows), "test": np.bincount(test_ids, minlength=rows)}
        shares = {"train": 1 - lookups["train"][0] / len(labels), "test": 1 - lookups["test"][0] / len(test_labels)}
        areas = dict[str, float | None]()
        for place, task in enumerate(self.layout.tasks):
            label = labels[row, place]
            seen = ~np.isnan(label)
            observed, positives = (np.bincount(ids[seen], each, rows) for each in (None, label[seen]))
            # The fraction of positives of an id, with `RATE_SMOOTHING` rows of the overall fraction.
            rates = (positives + RATE_SMOOTHING * positives.sum() / max(seen.sum(), 1)) / (observed + RATE_SMOOTHING)
            scores = np.bincount(validation_row, rates[validation_ids]) / np.bincount(validation_row)
            areas[task.name] = _area(scores, validation_labels[:, place]) if seen.any() else None
        missing, first = int(semantics.missing), semantics.first_seen_row
        frequent = np.argsort(-lookups["train"][first:], kind="stable")[:MAX_FREQUENT_IDS] + first
        others = (
            ["all others"] * (rows - first > MAX_FREQUENT_IDS)
            + ["unknown"] * bool(semantics.unknown)
            + ["missing"] * missing
        )
        unknown, drift = dict[str, float | None](), list[np.ndarray]()
        for split, of_split in lookups.items():
            given, out = of_split[missing:].sum(), of_split[missing:first].sum()
            unknown[split] = out / given if semantics.unknown and given else None
            rest = {"all others": of_split[first:].sum() - of_split[frequent].sum(), "unknown": out}
            rest["missing"] = of_split[0]
            drift.append(np.array([*of_split[frequent], *(rest[name] for name in others)], np.float64))
        return {
            "name": each.name,
            "table": each.table,
            "coverage": shares if semantics.missing else dict.fromkeys(COMPARED_SPLITS),
            "constant": int((lookups["train"] > 0).sum()) <= 1,
            "unknown": unknown,
            **_drift(row_names(semantics, each.table, [*frequent.tolist(), *others], self.prepared.serving), *drift),
            "auc": areas,
        }

    def count_numbers(self, numbers: Mapping[int, int | None], zeros_missing: bool) -> list[dict[str, Any]]:
        """Count the numbers of a feature, given with their indicators by `find_dense_inputs`.

        A missing vector is all zeros. Any other number without an indicator was never missing in training rows.
        """
        if not numbers:
            return []
        columns = [f"d{place}" for place in {*numbers, *numbers.values()} - {None}]
        read = {split: self._read(split, columns) for split in SPLITS}
        values = dict[str, np.ndarray]()  # split -> (N, numbers), NaN where missing
        for split, (table, _) in read.items():
            both = [(table[f"d{place}"], None if of is None else table[f"d{of}"]) for place, of in numbers.items()]
            found = np.stack([value.to_numpy().astype(np.float64) for value, _ in both], axis=1)
            missing = [np.zeros(len(found), bool) if of is None else of.to_numpy() > 0.5 for _, of in both]
            none = (found == 0).all(axis=1, keepdims=True) & zeros_missing
            values[split] = np.where(np.stack(missing, axis=1) | none, np.nan, found)
        labels = read["validation"][1]
        return [
            self._count_number(place, of is not None or zeros_missing, {s: values[s][:, n] for s in SPLITS}, labels)
            for n, (place, of) in enumerate(numbers.items())
        ]

    def _count_number(
        self, place: int, tells: bool, values: Mapping[str, np.ndarray], labels: np.ndarray
    ) -> dict[str, Any]:
        number, areas = self.layout.dense[place], dict[str, float | None]()
        for task_place, task in enumerate(self.layout.tasks):
            # A number ranks either way round, with missing values at the better end.
            ranked = (np.nan_to_num(values["validation"], nan=end) for end in (-np.inf, np.inf))
            ends = [_area(each, labels[:, task_place]) for each in ranked]
            areas[task.name] = max((max(each, 1 - each) for each in ends if each is not None), default=None)
        names, counts = _count_bins(number.edges, values)
        missing = {split: float(np.isnan(values[split]).mean()) for split in COMPARED_SPLITS}
        bins = slice(None) if tells else slice(-1)
        return {
            "name": number.name,
            "table": None,
            # Without an indicator every training row had a value. Whether test rows do cannot be seen.
            "coverage": {split: 1 - missing[split] for split in COMPARED_SPLITS}
            if tells
            else {"train": 1.0, "test": None},
            "constant": len(np.unique(values["train"])) <= 1,  # one value, or none
            "unknown": dict.fromkeys(COMPARED_SPLITS),
            **_drift(names[bins], *(counts[split][bins] for split in COMPARED_SPLITS)),
            "auc": areas,
        }


def _count_bins(edges: Sequence[float], values: Mapping[str, np.ndarray]) -> tuple[list[str], dict[str, np.ndarray]]:
    """Count values by bin.

    The bins lie at the input's edges, or have about equal training mass if there are none. The last bin holds missing
    values.

    Returns:
        Names of the bins, and split -> (bins,) rows.
    """
    known = values["train"][~np.isnan(values["train"])]
    if len(edges) < 2 and len(known):
        parts = np.arange(1, PSI_BINS + 1) / PSI_BINS
        edges = tuple(np.unique(np.quantile(known, parts, method="inverted_cdf")))
    counts = {}
    for split in COMPARED_SPLITS:
        bin_ = np.where(np.isnan(values[split]), len(edges) + 1, np.searchsorted(edges, values[split]))
        counts[split] = np.bincount(bin_, minlength=len(edges) + 2)
    words = [f"{edge:.3g}" for edge in edges]
    between = [f"{low} to {high}" for low, high in pairwise(words)]
    names = [f"up to {words[0]}", *between, f"over {words[-1]}"] if words else ["all values"]
    return [*names, "missing"], counts


def _area(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """Return the AUC of (N,) scores, None if one of the two labels is missing. labels: (N,), NaN where unobserved."""
    seen = ~np.isnan(labels)
    _, place = np.unique(scores[seen], return_inverse=True)
    positives = np.bincount(place, labels[seen])
    area = float(auc_of_counts(positives, np.bincount(place, minlength=len(positives)) - positives))
    return None if math.isnan(area) else area


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
