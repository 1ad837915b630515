"""From counts to the health of a data set: plain data, as `health.json` holds it. Unknown values are None.

overview       the log and its splits
features       each feature with its inputs: coverage, different values, unknown ids, drift, AUC alone
tables         rows, bytes, and how many rows training never looks up
weeks          labels by week
quick_models   how well a quick model ranks each binary task (`health_counts.py`)
findings       suspicious properties, in words, with advice (`health_findings.py`)
sentences      the same in short
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmoe_rec.features.layout import IdInput
from mmoe_rec.features.vocabulary import row_names
from mmoe_rec.log.checks import format_time
from mmoe_rec.log.database import MEMORY_GIB
from mmoe_rec.preprocessing.prepare import FeatureFolder
from mmoe_rec.profiling.advice import SELDOM_ROWS
from mmoe_rec.profiling.health_counts import (
    FREQUENT,
    Counts,
    FeatureInputs,
    NumberInput,
    collect,
    measure_quick_model,
    psi,
)
from mmoe_rec.profiling.health_findings import describe, find
from mmoe_rec.settings.schema import Meaning, Schema

SPLITS = ("train", "test")
_TIMES = ("first_request", "last_request", "labels_known_by")
_FLOAT_BYTES = 4  # Row-wise Adagrad keeps one more float for each row.


def inspect(
    name: str,
    prepared: FeatureFolder,
    schema: Schema,
    dims: Mapping[str, int],
    scratch: Path,
    memory_gib: float = MEMORY_GIB,
    workers: int | None = None,
) -> dict[str, Any]:
    """Describe the health of a data set, ready for JSON.

    Args:
        name: Name of the data set.
        prepared: Folder of the features.
        schema: Schema of the log.
        dims: Table -> width that a model gives it.
        scratch: As for `collect`.
        memory_gib: As for `collect`.
        workers: As for `collect`.

    Raises:
        UserError: Encoded rows are missing or can't be read.
    """
    counts, manifest = collect(prepared, schema, scratch, memory_gib, workers), prepared.manifest
    tasks = {task.name: place for place, task in enumerate(counts.layout.tasks) if task.kind.is_binary}
    health = {
        "name": name,
        "fingerprint": manifest.get("fingerprint"),
        "overview": _overview(manifest, counts, schema),
        "features": [_feature(each, schema, counts, prepared) for each in counts.features],
        "tables": _tables(counts, dims),
        "weeks": [] if manifest.get("first_request") is None else counts.weeks,
        "quick_models": {task: measure_quick_model(counts.drawn, place) for task, place in tasks.items()},
    }
    # Python's numbers for NumPy's, and None for what is not finite.
    text = json.dumps({**health, "findings": find(health)}, default=lambda each: each.item())
    found: dict[str, Any] = json.loads(text, parse_constant=lambda _: None)
    return found | {"sentences": describe(found)}


def _overview(manifest: Mapping[str, Any], counts: Counts, schema: Schema) -> dict[str, Any]:
    """Describe the files, rows and times of the log (None if it has none), files left out, and the splits."""
    splits = dict[str, dict[str, Any]]()
    for split, counted in counts.splits.items():
        told = manifest.get("splits", {}).get(split, {})
        splits[split] = counted | {
            "labels_known_by": format_time(told["known_by"]) if told.get("known_by") is not None else None,
            "unmatured": {task: count for task, count in told.get("unmatured", {}).items() if count},
        }
        if manifest.get("first_request") is None:
            splits[split] |= dict.fromkeys(_TIMES)
    names = ("log", "digest", "files", "rows", "first_request", "last_request", "requests")
    return {name: manifest.get(name) for name in names} | {
        "rows_in_splits": sum(split["rows"] for split in splits.values()),
        "left_out": [{name: str(each[name]) for name in ("file", "reason")} for each in manifest.get("left_out", [])],
        "split_column": None if schema.split is None else schema.split.column,
        # Where times split rows, users are in both by right.
        "users_in_both": counts.users_in_both if schema.split is not None and schema.columns.has_user else None,
        "splits": splits,
    }


def _feature(feature: FeatureInputs, schema: Schema, counts: Counts, prepared: FeatureFolder) -> dict[str, Any]:
    settings, meaning, keys = schema.features[feature.name], feature.meaning, schema.columns
    inputs = [_id_input(each, meaning.parts.get(each.table, meaning), counts, prepared) for each in feature.ids]
    inputs += [_number_input(each, feature, counts) for each in feature.numbers]
    return {
        "name": feature.name,
        "kind": settings.kind,
        "role": schema.role_of(feature.name),
        "columns": meaning.columns,
        "settings": settings.model_dump(mode="json"),
        "is_key": settings.kind == "id" and meaning.columns in ((keys.user,), (keys.candidate,)),
        "coverage": {split: _best(min, (each["coverage"][split] for each in inputs)) for split in SPLITS},
        "unknown": {split: inputs[0]["unknown"][split] if inputs else None for split in SPLITS},
        "distinct": inputs[0]["distinct"] if len(inputs) == 1 else None,
        "vocabulary": prepared.manifest.get("vocabularies", {}).get(feature.name),
        "psi": _best(max, (each["psi"] for each in inputs)),
        "auc": {task.name: _best(max, (each["auc"][task.name] for each in inputs)) for task in counts.layout.tasks},
        "inputs": inputs,
    }


def _best(pick: Callable[..., float], values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return pick(known) if known else None


def _id_input(each: IdInput, meaning: Meaning, counts: Counts, prepared: FeatureFolder) -> dict[str, Any]:
    ids, missing, first = counts.ids[each.name], int(meaning.missing), meaning.first_known
    known, known_in_test = (ids.lookups[split][first:] for split in SPLITS)
    seen, seldom = known > 0, known_in_test[known < SELDOM_ROWS].sum()
    frequent = np.argsort(-known, kind="stable")[:FREQUENT] + first
    others = ["all others"] * (len(known) > FREQUENT) + ["unknown"] * bool(meaning.unknown) + ["missing"] * missing
    unknown, drift = dict[str, float | None](), list[np.ndarray]()
    for split in SPLITS:
        lookups = ids.lookups[split]
        given, out = lookups[missing:].sum(), lookups[missing:first].sum()
        unknown[split] = out / given if meaning.unknown and given else None
        rest = {"all others": lookups[first:].sum() - lookups[frequent].sum(), "unknown": out, "missing": lookups[0]}
        drift.append(np.array([*lookups[frequent], *(rest[name] for name in others)], np.float64))
    return {
        "name": each.name,
        "columns": [f"id.{each.name}"],
        "table": each.table,
        "coverage": _coverage(counts, ids.empty) if meaning.missing else dict.fromkeys(SPLITS),
        "distinct": int(seen.sum()),  # known ids, or buckets, that occur in training rows
        "constant": int((ids.lookups["train"] > 0).sum()) <= 1,
        "unknown": unknown,
        "rows_per_id": known.sum() / seen.sum() if meaning.unknown and seen.any() else None,
        "seldom": seldom / max(ids.lookups["test"].sum(), 1) if meaning.unknown else None,
        **_drift(row_names(meaning, each.table, [*frequent.tolist(), *others], prepared.serving), *drift),
        "auc": _by_task(counts, ids.areas),
    }


def _number_input(each: NumberInput, feature: FeatureInputs, counts: Counts) -> dict[str, Any]:
    numbers = counts.numbers[each.name]
    labels, train, test = numbers.bins, numbers.counts["train"], numbers.counts["test"]
    missing = {split: int(numbers.counts[split][-1]) for split in SPLITS}
    tells = each.indicator is not None or feature.meaning.zeros_missing
    if not tells:
        labels, train, test = labels[:-1], train[:-1], test[:-1]
    return {
        "name": each.name,
        "columns": [f"dense.{each.name}"] + [f"dense.{each.name}_missing"] * (each.indicator is not None),
        "table": None,
        # Without an indicator every training row had a value. Whether test rows do cannot be seen.
        "coverage": _coverage(counts, missing) if tells else {"train": 1.0, "test": None},
        "distinct": numbers.distinct,
        # All training rows have one value, or all have none.
        "constant": numbers.distinct + bool(missing["train"]) <= 1,
        "unknown": dict.fromkeys(SPLITS),
        "rows_per_id": None,
        "seldom": None,
        **_drift(labels, train, test),
        "auc": _by_task(counts, numbers.areas),
    }


def _by_task(counts: Counts, values: Sequence[float | None]) -> dict[str, float | None]:
    return {task.name: value for task, value in zip(counts.layout.tasks, values, strict=True)}


def _coverage(counts: Counts, missing: Mapping[str, int]) -> dict[str, float]:
    return {split: 1 - missing[split] / counts.splits[split]["rows"] for split in SPLITS}


def _drift(labels: list[str], train: np.ndarray, test: np.ndarray) -> dict[str, Any]:
    index, noise = psi(train, test)
    shares = (train / max(train.sum(), 1), test / max(test.sum(), 1))
    bins = [{"bin": label, "train": p, "test": q} for label, p, q in zip(labels, *shares, strict=True)]
    return {"psi": index, "psi_noise": noise, "bins": bins}


def _tables(counts: Counts, dims: Mapping[str, int]) -> list[dict[str, Any]]:
    tables = []
    for table in counts.layout.tables:
        users = [each.name for each in counts.layout.ids if each.table == table.name]
        seen = np.zeros(table.rows, bool)
        for name in users:
            seen |= counts.ids[name].lookups["train"] > 0
        tables.append(
            {
                "name": table.name,
                "inputs": users,
                "hashed": any(each.meaning.hashed and each.name == table.name for each in counts.features),
                "rows": table.rows,
                "dim": dims[table.name],
                "bytes": table.rows * dims[table.name] * _FLOAT_BYTES,
                "optimizer_bytes": table.rows * _FLOAT_BYTES,
                "rows_seen": int(seen.sum()),
                "never_seen": 1 - float(seen.mean()),
            }
        )
    return tables
