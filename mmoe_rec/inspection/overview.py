"""The part of a data set's health that is about rows, times and labels."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from mmoe_rec.features.layout import Layout
from mmoe_rec.inspection.sums import Labels, SplitSums, Sums
from mmoe_rec.settings.schema import Schema

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


_TIMES = ("first_request", "last_request", "labels_known_by")


def overview(manifest: Mapping[str, Any], sums: Sums, schema: Schema) -> dict[str, Any]:
    """Files, rows and times of the log (None where it has none), files left out, and for each split its rows, different
    users, and labels. Where a column splits rows of users, also which share of the test users training knows."""
    told = manifest.get("splits", {})
    splits = {name: _split(each, sums.layout, told.get(name, {})) for name, each in sums.splits.items()}
    if manifest.get("first_request") is None:
        splits = {name: split | dict.fromkeys(_TIMES) for name, split in splits.items()}
    return {
        "log": manifest.get("log"),
        "digest": manifest.get("digest"),
        "files": manifest.get("files"),
        "rows": manifest.get("rows"),
        "rows_in_splits": sum(split["rows"] for split in splits.values()),
        "first_request": manifest.get("first_request"),
        "last_request": manifest.get("last_request"),
        "left_out": [
            {"file": str(each["file"]), "reason": str(each["reason"])} for each in manifest.get("left_out", [])
        ],
        "requests": manifest.get("requests"),
        "split_column": None if schema.split is None else schema.split.column,
        "users_in_both": _users_in_both(sums, schema),
        "splits": splits,
    }


def _users_in_both(sums: Sums, schema: Schema) -> float | None:
    """None where times split rows: then users are in both by right."""
    if schema.split is None or not schema.columns.has_user:
        return None
    train, test = (sums.splits[name].who["user"] for name in ("train", "test"))
    return test.share_in(train)


def weeks(manifest: Mapping[str, Any], sums: Sums) -> list[dict[str, Any]]:
    """Labels of each week that has rows, from Monday 00:00 UTC by the request's time; each split apart. None of a log
    without times."""
    if manifest.get("first_request") is None:
        return []
    starts = sorted({week for week, _ in sums.weeks})
    return [
        {
            "week": time_of(start)[:10],
            "splits": {
                split: {"rows": labels.rows, "tasks": _tasks(labels, sums.layout)}
                for (week, split), labels in sums.weeks.items()
                if week == start
            },
        }
        for start in starts
    ]


def time_of(microseconds: int) -> str:
    """ISO 8601, UTC."""
    return (_EPOCH + timedelta(microseconds=microseconds)).isoformat(timespec="seconds")


def _split(sums: SplitSums, layout: Layout, told: Mapping[str, Any]) -> dict[str, Any]:
    who = {f"{name}s": {"count": count.count(), "exact": count.exact} for name, count in sums.who.items()}
    return {
        "rows": sums.labels.rows,
        **who,
        "first_request": time_of(sums.first),
        "last_request": time_of(sums.last),
        "labels_known_by": time_of(told["known_by"]) if told.get("known_by") is not None else None,
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
