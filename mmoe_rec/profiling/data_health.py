"""From sums to the health of a data set: plain data, as `health.json` holds it. What is unknown is None.

overview    of the log and its splits
features    each with its inputs: coverage, different values, unknown ids, drift, AUC alone
tables      rows, bytes, and how many rows training never looks up
weeks       labels by week
forecasts   of each binary task, and of their mean, how small a gain the test rows can show (`forecast.py`)
findings    what is suspicious, in words, and what to change (`health_findings.py`)
sentences   the same in short
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mmoe_rec.features.layout import IdInput, Layout
from mmoe_rec.features.vocabulary import row_names
from mmoe_rec.log.checks import format_time
from mmoe_rec.log.database import MEMORY_GIB
from mmoe_rec.preprocessing.prepare import FeatureFolder
from mmoe_rec.profiling.advice import SELDOM_ROWS
from mmoe_rec.profiling.forecast import forecast
from mmoe_rec.profiling.health_counts import FeatureInputs, Labels, NumberInput, SplitSums, Sums, collect, psi
from mmoe_rec.profiling.health_findings import describe, find
from mmoe_rec.settings.schema import Meaning, Schema

_TIMES = ("first_request", "last_request", "labels_known_by")


def overview(manifest: Mapping[str, Any], sums: Sums, schema: Schema) -> dict[str, Any]:
    """Files, rows and times of the log (None where it has none), files left out, and for each split its rows, different
    users, and labels. Where a column splits rows of users, also which share of the test users training knows."""
    told, users_in_both = manifest.get("splits", {}), None
    splits = {name: _split(each, sums.layout, told.get(name, {})) for name, each in sums.splits.items()}
    if manifest.get("first_request") is None:
        splits = {name: split | dict.fromkeys(_TIMES) for name, split in splits.items()}
    if schema.split is not None and schema.columns.has_user:  # where times split rows, users are in both by right
        users_in_both = sums.users_in_both
    names = ("log", "digest", "files", "rows", "first_request", "last_request", "requests")
    return {name: manifest.get(name) for name in names} | {
        "rows_in_splits": sum(split["rows"] for split in splits.values()),
        "left_out": [{name: str(each[name]) for name in ("file", "reason")} for each in manifest.get("left_out", [])],
        "split_column": None if schema.split is None else schema.split.column,
        "users_in_both": users_in_both,
        "has_sampling_rate": schema.columns.sampling_rate is not None,
        "same_share": dict(zip((task.name for task in sums.layout.tasks), sums.same_share, strict=True)),
        "splits": splits,
    }


def weeks(manifest: Mapping[str, Any], sums: Sums) -> list[dict[str, Any]]:
    """Labels of each split by week, from Monday 00:00 UTC by the request's time; none of a log without times."""
    if manifest.get("first_request") is None:
        return []
    starts = sorted({week for week, _ in sums.weeks})
    return [
        {
            "week": format_time(start)[:10],
            "splits": {
                split: {"rows": labels.rows, "tasks": _tasks(labels, sums.layout)}
                for (week, split), labels in sums.weeks.items()
                if week == start
            },
        }
        for start in starts
    ]


def _split(sums: SplitSums, layout: Layout, told: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "rows": sums.labels.rows,
        **{f"{name}s": count for name, count in sums.who.items()},
        "first_request": format_time(sums.first),
        "last_request": format_time(sums.last),
        "labels_known_by": format_time(told["known_by"]) if told.get("known_by") is not None else None,
        "unmatured": {name: count for name, count in told.get("unmatured", {}).items() if count},
        "tasks": _tasks(sums.labels, layout),
    }


def _tasks(labels: Labels, layout: Layout) -> dict[str, dict[str, Any]]:
    return {
        task.name: {
            "kind": task.kind,
            "observed": int(observed),
            "share_observed": float(observed / labels.rows),
            "rate": float(total / observed) if observed else None,
        }
        for task, observed, total in zip(layout.tasks, labels.observed, labels.total, strict=True)
    }


SPLITS = ("train", "test")
_FLOAT_BYTES = 4  # row-wise Adagrad keeps one more for each row


def inspect(
    name: str,
    prepared: FeatureFolder,
    schema: Schema,
    dims: Mapping[str, int],
    scratch: Path,
    memory_gib: float = MEMORY_GIB,
    workers: int | None = None,
) -> dict[str, Any]:
    """The health of a data set of that name, ready for JSON.

    dims: table -> width that a model gives it; scratch, memory_gib, workers: as for `collect`. Raises UserError for
    encoded rows that are missing or can't be read.
    """
    sums, manifest = collect(prepared, schema, scratch, memory_gib, workers), prepared.manifest
    health = {
        "name": name,
        "fingerprint": manifest.get("fingerprint"),
        "overview": overview(manifest, sums, schema),
        "features": [_feature(each, schema, sums, prepared, manifest) for each in sums.features],
        "tables": _tables(sums, dims),
        "weeks": weeks(manifest, sums),
        "forecasts": _forecasts(sums),
    }
    # Python's numbers for NumPy's, and None for what is not finite.
    text = json.dumps({**health, "findings": find(health)}, default=lambda each: each.item())
    found: dict[str, Any] = json.loads(text, parse_constant=lambda _: None)
    return found | {"sentences": describe(found)}


def _forecasts(sums: Sums) -> dict[str, Any]:
    """Task, or several with commas for their mean -> what test rows can tell; None where a label is too rare."""
    tasks = {task.name: place for place, task in enumerate(sums.layout.tasks) if task.kind == "binary"}
    found = {name: forecast(sums.drawn, [place]) for name, place in tasks.items()}
    judged = [name for name, each in found.items() if each is not None]
    if len(judged) > 1:
        found[", ".join(judged)] = forecast(sums.drawn, [tasks[name] for name in judged])
    return {name: None if each is None else asdict(each) for name, each in found.items()}


def _feature(
    feature: FeatureInputs, schema: Schema, sums: Sums, prepared: FeatureFolder, manifest: Mapping[str, Any]
) -> dict[str, Any]:
    settings, meaning, keys = schema.features[feature.name], feature.meaning, schema.columns
    inputs = [_id_input(each, meaning.parts.get(each.table, meaning), sums, prepared) for each in feature.ids]
    inputs += [_number_input(each, feature, sums) for each in feature.numbers]
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
        "vocabulary": manifest.get("vocabularies", {}).get(feature.name),
        "psi": _best(max, (each["psi"] for each in inputs)),
        "auc": {task.name: _best(max, (each["auc"][task.name] for each in inputs)) for task in sums.layout.tasks},
        "inputs": inputs,
    }


def _best(pick: Callable[..., float], values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return pick(known) if known else None


def _id_input(each: IdInput, meaning: Meaning, sums: Sums, prepared: FeatureFolder) -> dict[str, Any]:
    ids = sums.ids[each.name]
    names, train, test = ids.psi_counts(meaning)
    labels = row_names(meaning, each.table, names, prepared.serving)
    return {
        "name": each.name,
        "columns": [f"id.{each.name}"],
        "table": each.table,
        "coverage": _coverage(sums, ids.empty) if meaning.missing else dict.fromkeys(SPLITS),
        "distinct": ids.distinct(meaning),
        "constant": int((ids.counts["train"] > 0).sum()) <= 1,
        "unknown": {split: ids.unknown_share(split, meaning) for split in SPLITS},
        "rows_per_id": ids.rows_per_id(meaning) if meaning.unknown else None,
        "seldom": ids.seldom_share(meaning, SELDOM_ROWS) if meaning.unknown else None,
        **_drift(labels, train, test),
        "auc": _by_task(sums, ids.areas),
    }


def _number_input(each: NumberInput, feature: FeatureInputs, sums: Sums) -> dict[str, Any]:
    numbers = sums.numbers[each.name]
    labels, train, test = numbers.bins, numbers.counts["train"], numbers.counts["test"]
    missing = {split: int(numbers.counts[split][-1]) for split in SPLITS}
    tells = each.indicator is not None or feature.meaning.zeros_missing
    if not tells:
        labels, train, test = labels[:-1], train[:-1], test[:-1]
    return {
        "name": each.name,
        "columns": [f"dense.{each.name}"] + [f"dense.{each.name}_missing"] * (each.indicator is not None),
        "table": None,
        # Without an indicator every training row had a value; whether test rows do cannot be seen.
        "coverage": _coverage(sums, missing) if tells else {"train": 1.0, "test": None},
        "distinct": numbers.distinct,
        # All training rows have one value, or all have none.
        "constant": numbers.distinct + bool(missing["train"]) <= 1,
        "unknown": dict.fromkeys(SPLITS),
        "rows_per_id": None,
        "seldom": None,
        **_drift(labels, train, test),
        "auc": _by_task(sums, numbers.areas),
    }


def _by_task(sums: Sums, values: Sequence[float | None]) -> dict[str, float | None]:
    return {task.name: value for task, value in zip(sums.layout.tasks, values, strict=True)}


def _coverage(sums: Sums, missing: Mapping[str, int]) -> dict[str, float]:
    return {split: 1 - missing[split] / sums.splits[split].labels.rows for split in SPLITS}


def _drift(labels: list[str], train: np.ndarray, test: np.ndarray) -> dict[str, Any]:
    totals, (index, noise) = (max(train.sum(), 1), max(test.sum(), 1)), psi(train, test)
    return {
        "psi": index,
        "psi_noise": noise,
        "bins": [
            {"bin": label, "train": p / totals[0], "test": q / totals[1]}
            for label, p, q in zip(labels, train, test, strict=True)
        ],
    }


def _tables(sums: Sums, dims: Mapping[str, int]) -> list[dict[str, Any]]:
    tables = []
    for table in sums.layout.tables:
        users = [each.name for each in sums.layout.ids if each.table == table.name]
        seen = np.zeros(table.rows, bool)
        for name in users:
            seen |= sums.ids[name].counts["train"] > 0
        hashed = any(each.meaning.hashed and each.name == table.name for each in sums.features)
        tables.append(
            {
                "name": table.name,
                "inputs": users,
                "hashed": hashed,
                "rows": table.rows,
                "dim": dims[table.name],
                "bytes": table.rows * dims[table.name] * _FLOAT_BYTES,
                "optimizer_bytes": table.rows * _FLOAT_BYTES,
                "rows_seen": int(seen.sum()),
                "never_seen": 1 - float(seen.mean()),
            }
        )
    return tables
