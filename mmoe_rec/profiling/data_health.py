"""Measure the health of a data set: labels, and coverage, unknown IDs, drift and AUC of each feature.

Drift is the population stability index between training fractions p and test fractions q of the same bins:

    PSI = sum over bins of (q - p) ln(q / p),    p = (rows in bin + 1/2) / (all rows + bins / 2), q likewise

The half row keeps the index finite for empty bins. Without drift, the index of N and M rows would be about
(bins - 1) (1 / N + 1 / M), so this value is subtracted. The usual reading is stable below .1, some drift from .1 to
.25, and strong drift above .25 (Siddiqi, Credit Risk Scorecards, 2006).
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
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
from mmoe_rec.settings.log_columns import SPLITS
from mmoe_rec.settings.schema import InputSemantics, Schema

MAX_SAMPLE_ROWS = 1_000_000
"""Approximate limit on the rows of a split for measuring features. Larger splits are sampled by user."""
COMPARED_SPLITS = ("train", "test")
ID_COLUMNS = ("user", "candidate", "request")
RATE_SMOOTHING = 20.0
"""Smoothing of label rates by ID: this many rows with the overall rate are added to the rows of each ID."""
MAX_FREQUENT_IDS = 50
"""Number of IDs, the most frequent ones, that each get a bin for measuring drift."""
PSI_BINS = 20


def measure_health(
    name: str,
    prepared: FeatureFolder,
    schema: Schema,
    scratch: Path,
    memory_gib: float = DEFAULT_MEMORY_GIB,
    workers: int | None = None,
) -> dict[str, Any]:
    """Measure the health of a data set, as JSON values. Unknown values are None.

    Args:
        name: Name of the data set.
        prepared: Folder of the features.
        schema: Schema of the log.
        scratch: Folder for data that doesn't fit into memory. It is created and removed.
        memory_gib: Memory limit, as for `open_database`.
        workers: Number of threads, as for `open_database`.

    Raises:
        UserError: A split has no rows, or rows can't be read.
    """
    prepared.require_rows(*SPLITS)
    layout, manifest = prepared.layout, prepared.manifest
    for split in SPLITS:
        EncodedDataset(prepared.split(split), layout)  # Check the files, with clearer messages than DuckDB's.
    try:
        with open_database(scratch, memory_gib, workers) as database:
            for split in SPLITS:
                _create_view(database, split, prepared)
            splits, weeks = _count_labels(database, layout)
            counts = _InputCounter(database, prepared, splits)
            with bar() as progress:
                features = [
                    _measure_feature(feature, schema, counts)
                    for feature in progress.track(list(schema.features), description="inspecting")
                ]
            query = "SELECT avg((w0 IN (SELECT w0 FROM train))::INT) FROM (SELECT DISTINCT w0 FROM test)"
            (shared_user_fraction,) = database.row(query)
    except duckdb.Error as error:
        raise UserError(f"the rows in '{prepared.folder}' can't be read ({first_line(error)}). {ADVICE}") from None
    health = {
        "name": name,
        "fingerprint": manifest.get("fingerprint"),
        "overview": _overview(manifest, splits, schema, shared_user_fraction),
        "features": features,
        "weeks": [] if manifest.get("first_request") is None else weeks,
    }
    findings = list_findings(health)
    health |= {"findings": [asdict(finding) for finding in findings], "headline": describe_findings(findings)}
    # The round trip turns NumPy numbers into Python numbers, and numbers that are not finite into None.
    text = json.dumps(health, default=lambda number: number.item())
    plain: dict[str, Any] = json.loads(text, parse_constant=lambda _: None)
    return plain


def _create_view(database: Database, split: str, prepared: FeatureFolder) -> None:
    """Create an SQL view of a split's rows, named like the split.

    Its columns are w0 to w2 for `ID_COLUMNS`, t for the time in microseconds, i0, i1, ... for the layout's IDs (or
    lists of IDs), and d0, d1, ... for its numbers. The first task has its label in l0 (null where unobserved) and
    whether it is positive in p0, the second task in l1 and p1, and so on.
    """
    layout, files = prepared.layout, sorted(prepared.split(split).glob("*.parquet"))
    sql = {name: f"c{index}" for index, name in enumerate(pq.read_schema(files[0]).names)}
    columns = {f"w{index}": sql[name] for index, name in enumerate(ID_COLUMNS)} | {"t": f"epoch_us({sql['time']})"}
    for index, id_input in enumerate(layout.ids):
        ids = sql[f"id.{id_input.name}"]
        columns[f"i{index}"] = f"CASE WHEN len({ids}) = 0 THEN [0] ELSE {ids} END" if id_input.is_list else ids
    columns |= {f"d{index}": sql[f"dense.{number.name}"] for index, number in enumerate(layout.dense)}
    for index, task in enumerate(layout.tasks):
        label = sql[f"label.{task.name}"]
        columns[f"l{index}"] = label = f"CASE WHEN NOT isnan({label}) THEN {label}::DOUBLE END"
        # The label of a regression counts as positive above its mean.
        columns[f"p{index}"] = f"{label} > {task.mean if task.kind.is_linear else 0.5:.17e}"
    paths = ", ".join("'" + escape(str(file)).replace("'", "''") + "'" for file in files)
    source = f"read_parquet([{paths}], hive_partitioning = false) AS file({', '.join(sql.values())})"
    selected = ", ".join(f"{expression} AS {name}" for name, expression in columns.items())
    database.run(f"CREATE VIEW {split} AS SELECT {selected} FROM {source}")


def _count_labels(database: Database, layout: Layout) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Count the rows and labels of each split, and by week from Monday 00:00 UTC."""
    splits, weeks = dict[str, dict[str, Any]](), dict[int, dict[str, Any]]()
    labels = "".join(f", count(l{task}), coalesce(sum(l{task}), 0)" for task in range(len(layout.tasks)))
    ids = "".join(f", count(DISTINCT w{index})" for index in range(len(ID_COLUMNS)))
    week = "epoch_us(date_trunc('week', make_timestamp(t)))"

    def describe_tasks(*totals: float) -> dict[str, Any]:
        return {
            task.name: {"kind": task.kind, "observed": observed, "rate": total / observed if observed else None}
            for task, observed, total in zip(layout.tasks, totals[::2], totals[1::2], strict=True)
        }

    for split in SPLITS:
        first, last, *distinct = database.row(f"SELECT min(t), max(t){ids} FROM {split}")
        rows, *totals = database.row(f"SELECT count(*){labels} FROM {split}")
        splits[split] = {
            "rows": rows,
            **{f"{name}s": count for name, count in zip(ID_COLUMNS, distinct, strict=True)},
            "first_request": format_time(first),
            "last_request": format_time(last),
            "tasks": describe_tasks(*totals),
        }
        by_week = database.rows(f"SELECT {week} AS week, count(*){labels} FROM {split} GROUP BY week")
        for start, rows, *totals in by_week:
            weeks.setdefault(start, {})[split] = {"rows": rows, "tasks": describe_tasks(*totals)}
    return splits, [{"week": format_time(start)[:10], "splits": counts} for start, counts in sorted(weeks.items())]


def _overview(
    manifest: Mapping[str, Any], counted: Mapping[str, dict[str, Any]], schema: Schema, shared_user_fraction: float
) -> dict[str, Any]:
    """Describe the log, its skipped files and its splits. Times are None if the log has none."""
    splits = dict[str, dict[str, Any]]()
    for split, counts in counted.items():
        stored = manifest.get("splits", {}).get(split, {})
        cutoff = stored.get("label_cutoff")
        splits[split] = counts | {
            "labels_observed_until": None if cutoff is None else format_time(cutoff),
            "pending_labels": {task: count for task, count in stored.get("pending_labels", {}).items() if count},
        }
        if manifest.get("first_request") is None:
            splits[split] |= dict.fromkeys(("first_request", "last_request", "labels_observed_until"))
    names = ("log", "digest", "files", "rows", "first_request", "last_request", "requests")
    return {name: manifest.get(name) for name in names} | {
        "rows_in_splits": sum(split["rows"] for split in splits.values()),
        "skipped": [{key: str(file[key]) for key in ("file", "reason")} for file in manifest.get("skipped", [])],
        "split_column": None if schema.split is None else schema.split.column,
        # If times split the rows, splits normally share users.
        "shared_user_fraction": shared_user_fraction if schema.split is not None and schema.columns.has_user else None,
        "splits": splits,
    }


def _measure_feature(name: str, schema: Schema, counts: "_InputCounter") -> dict[str, Any]:
    settings, keys = schema.features[name], schema.columns
    semantics = settings.semantics(schema)
    ids = [id_input for id_input in counts.layout.ids if id_input.feature == name]
    inputs = [counts.count_ids(id_input, semantics.parts.get(id_input.table, semantics)) for id_input in ids]
    inputs += counts.count_numbers(find_dense_inputs(counts.layout, name), semantics.zeros_missing)
    return {
        "name": name,
        "kind": settings.kind,
        "role": schema.role_of(name),
        "columns": semantics.columns,
        "is_key": settings.kind == "id" and semantics.columns in ((keys.user,), (keys.candidate,)),
        "coverage": {split: _best(min, (input_["coverage"][split] for input_ in inputs)) for split in COMPARED_SPLITS},
        "unknown": {split: inputs[0]["unknown"][split] if inputs else None for split in COMPARED_SPLITS},
        "psi": _best(max, (input_["psi"] for input_ in inputs)),
        "auc": {task.name: _best(max, (input_["auc"][task.name] for input_ in inputs)) for task in counts.layout.tasks},
        "inputs": inputs,
    }


def _best(pick: Callable[..., float], values: Iterable[float | None]) -> float | None:
    not_none = [value for value in values if value is not None]
    return pick(not_none) if not_none else None


def find_dense_inputs(layout: Layout, feature: str) -> dict[int, int | None]:
    """Return which dense inputs a feature has, and which inputs indicate that their values are missing.

    Args:
        layout: Layout of the inputs.
        feature: Name of the feature.

    Returns:
        Index of the input in `layout.dense` -> index of its indicator, None if it has no indicator.
    """
    indexes = {number.name: index for index, number in enumerate(layout.dense) if number.feature == feature}
    indicators = {f"{name}_missing" for name in indexes}.intersection(indexes)
    return {index: indexes.get(f"{name}_missing") for name, index in indexes.items() if name not in indicators}


class _InputCounter:
    """Measures coverage, drift and AUC of inputs on at most about `MAX_SAMPLE_ROWS` rows of each split."""

    def __init__(self, database: Database, prepared: FeatureFolder, splits: Mapping[str, Mapping[str, Any]]) -> None:
        self.prepared, self.layout, self._database = prepared, prepared.layout, database
        self._step = {split: -(-counts["rows"] // MAX_SAMPLE_ROWS) for split, counts in splits.items()}

    def _read(self, split: str, columns: Sequence[str]) -> tuple[pa.Table, np.ndarray]:
        """Read columns of N sampled rows of a split, and labels (N, tasks): 0, 1 (positive) or NaN (unobserved)."""
        labels = [f"p{index}::INT::DOUBLE AS p{index}" for index in range(len(self.layout.tasks))]
        rows = f"{split} WHERE hash(w0) % {self._step[split]} = 0"
        table = self._database.table(f"SELECT {', '.join([*columns, *labels])} FROM {rows}")
        return table, np.stack([table[f"p{index}"].to_numpy() for index in range(len(labels))], axis=1)

    def _read_ids(self, split: str, id_input: IdInput) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Read an input's M IDs in N rows. Returns each ID's row index (M,), the IDs (M,) and the labels (N, tasks)."""
        table, labels = self._read(split, [column := f"i{self.layout.ids.index(id_input)}"])
        values = one_array(table[column])
        if not id_input.is_list:
            return np.arange(len(values)), values.to_numpy(), labels
        row = np.repeat(np.arange(len(values)), values.value_lengths().to_numpy())
        return row, values.flatten().to_numpy(), labels

    def count_ids(self, id_input: IdInput, semantics: InputSemantics) -> dict[str, Any]:
        """Measure coverage, unknown IDs, drift and AUC of an input. An empty list counts as a missing ID (row 0)."""
        rows = self.layout.table(id_input.table).rows
        row, ids, labels = self._read_ids("train", id_input)
        validation_row, validation_ids, validation_labels = self._read_ids("validation", id_input)
        _, test_ids, test_labels = self._read_ids("test", id_input)
        lookups = {"train": np.bincount(ids, minlength=rows), "test": np.bincount(test_ids, minlength=rows)}
        coverage = {"train": 1 - lookups["train"][0] / len(labels), "test": 1 - lookups["test"][0] / len(test_labels)}
        aucs = dict[str, float | None]()
        for index, task in enumerate(self.layout.tasks):
            label = labels[row, index]
            is_observed = ~np.isnan(label)
            observed_ids, observed_labels = ids[is_observed], label[is_observed]
            observed, positives = (np.bincount(observed_ids, weights, rows) for weights in (None, observed_labels))
            overall = positives.sum() / max(is_observed.sum(), 1)
            rates = (positives + RATE_SMOOTHING * overall) / (observed + RATE_SMOOTHING)
            scores = np.bincount(validation_row, rates[validation_ids]) / np.bincount(validation_row)
            aucs[task.name] = _auc(scores, validation_labels[:, index]) if is_observed.any() else None
        missing, first = int(semantics.missing), semantics.first_seen_row
        frequent = np.argsort(-lookups["train"][first:], kind="stable")[:MAX_FREQUENT_IDS] + first
        rest_bins = ["all others"] * (rows - first > MAX_FREQUENT_IDS)
        rest_bins += ["unknown"] * bool(semantics.unknown) + ["missing"] * missing
        names = row_names(semantics, id_input.table, [*frequent.tolist(), *rest_bins], self.prepared.serving)
        unknown, drift = dict[str, float | None](), list[np.ndarray]()
        for split, counts in lookups.items():
            present, not_seen = counts[missing:].sum(), counts[missing:first].sum()
            unknown[split] = not_seen / present if semantics.unknown and present else None
            rest = {"all others": counts[first:].sum() - counts[frequent].sum(), "unknown": not_seen}
            rest["missing"] = counts[0]
            drift.append(np.array([*counts[frequent], *(rest[name] for name in rest_bins)], np.float64))
        return {
            "name": id_input.name,
            "table": id_input.table,
            "coverage": coverage if semantics.missing else dict.fromkeys(COMPARED_SPLITS),
            "constant": int((lookups["train"] > 0).sum()) <= 1,
            "unknown": unknown,
            **_drift(names, *drift),
            "auc": aucs,
        }

    def count_numbers(self, numbers: Mapping[int, int | None], zeros_missing: bool) -> list[dict[str, Any]]:
        """Measure a feature's numbers (`find_dense_inputs`). With `zeros_missing`, rows with only zeros lack them."""
        if not numbers:
            return []
        columns = [f"d{index}" for index in {*numbers, *numbers.values()} - {None}]
        read = {split: self._read(split, columns) for split in SPLITS}
        values = dict[str, np.ndarray]()  # Split -> (N, numbers), NaN where missing.
        for split, (table, _) in read.items():
            dense = np.stack([table[f"d{index}"].to_numpy().astype(np.float64) for index in numbers], axis=1)
            flags = (None if flag is None else table[f"d{flag}"].to_numpy() for flag in numbers.values())
            missing = [np.zeros(len(dense), bool) if flag is None else flag > 0.5 for flag in flags]
            all_zero = (dense == 0).all(axis=1, keepdims=True) & zeros_missing
            values[split] = np.where(np.stack(missing, axis=1) | all_zero, np.nan, dense)
        labels = read["validation"][1]
        return [
            self._count_number(index, flag is not None or zeros_missing, {s: values[s][:, n] for s in SPLITS}, labels)
            for n, (index, flag) in enumerate(numbers.items())
        ]

    def _count_number(
        self, index: int, marks_missing: bool, values: Mapping[str, np.ndarray], labels: np.ndarray
    ) -> dict[str, Any]:
        number, aucs = self.layout.dense[index], dict[str, float | None]()
        for task_index, task in enumerate(self.layout.tasks):
            # Take the best AUC of four orders: ascending or descending, with missing values first or last.
            ranked = (np.nan_to_num(values["validation"], nan=end) for end in (-np.inf, np.inf))
            ends = [_auc(scores, labels[:, task_index]) for scores in ranked]
            aucs[task.name] = max((max(auc, 1 - auc) for auc in ends if auc is not None), default=None)
        names, counts = _count_bins(number.edges, values)
        coverage = dict[str, float | None]({s: 1 - float(np.isnan(values[s]).mean()) for s in COMPARED_SPLITS})
        if not marks_missing:  # No training value was missing, and missing test values can't be recognized.
            coverage = {"train": 1.0, "test": None}
        bins = slice(None) if marks_missing else slice(-1)
        return {
            "name": number.name,
            "table": None,
            "coverage": coverage,
            "constant": len(np.unique(values["train"])) <= 1,
            "unknown": dict.fromkeys(COMPARED_SPLITS),
            **_drift(names[bins], *(counts[split][bins] for split in COMPARED_SPLITS)),
            "auc": aucs,
        }


def _count_bins(edges: Sequence[float], values: Mapping[str, np.ndarray]) -> tuple[list[str], dict[str, np.ndarray]]:
    """Return the names of B bins, and split -> number of rows in each bin, (B,). The last bin is for missing values.

    If `edges` has fewer than two edges, the bins are between quantiles of the training rows.
    """
    present = values["train"][~np.isnan(values["train"])]
    if len(edges) < 2 and len(present):
        parts = np.arange(1, PSI_BINS + 1) / PSI_BINS
        edges = tuple(np.unique(np.quantile(present, parts, method="inverted_cdf")))
    counts = {}
    for split in COMPARED_SPLITS:
        bin_ = np.where(np.isnan(values[split]), len(edges) + 1, np.searchsorted(edges, values[split]))
        counts[split] = np.bincount(bin_, minlength=len(edges) + 2)
    texts = [f"{edge:.3g}" for edge in edges]
    between = [f"{low} to {high}" for low, high in pairwise(texts)]
    names = [f"up to {texts[0]}", *between, f"over {texts[-1]}"] if texts else ["all values"]
    return [*names, "missing"], counts


def _auc(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """Return the AUC of (N,) scores, None if all labels are equal. Labels have shape (N,) and are NaN if unobserved."""
    observed = ~np.isnan(labels)
    _, group = np.unique(scores[observed], return_inverse=True)
    positives = np.bincount(group, labels[observed])
    auc = float(auc_of_counts(positives, np.bincount(group, minlength=len(positives)) - positives))
    return None if math.isnan(auc) else auc


def psi(train: np.ndarray, test: np.ndarray) -> float | None:
    """Return the population stability index beyond chance, None if a split has no rows.

    Args:
        train: Training rows of each bin, shape (B,).
        test: Test rows of each bin, shape (B,).
    """
    if not train.sum() or not test.sum():
        return None
    p, q = ((counts + 0.5) / (counts.sum() + 0.5 * len(counts)) for counts in (train, test))
    noise = (len(train) - 1) * (1 / train.sum() + 1 / test.sum())
    return max(0.0, float(((q - p) * np.log(q / p)).sum() - noise))


def _drift(labels: Sequence[str], train: np.ndarray, test: np.ndarray) -> dict[str, Any]:
    fractions = (train / max(train.sum(), 1), test / max(test.sum(), 1))
    bins = [{"bin": label, "train": p, "test": q} for label, p, q in zip(labels, *fractions, strict=True)]
    return {"psi": psi(train, test), "bins": bins}
