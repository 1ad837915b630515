"""The files of an evaluation: `metrics.json`, `comparison.json` and others, with their notes and sentences."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.atomic import atomic_file
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.comparison import Comparison
from mmoe_rec.evaluation.off_policy import PolicyEstimate
from mmoe_rec.evaluation.results import Results
from mmoe_rec.evaluation.summary import SCORE, Summary
from mmoe_rec.evaluation.sums import check_folder
from mmoe_rec.report.sentences import (
    describe_guard,
    describe_refusal,
    describe_verdict,
    describe_warnings,
    note_of,
    note_of_group,
)

_DIFFERENCE = ("value", "low", "high", "error", "p", "p_corrected", "detectable")


def write_results(results: Results, out: Path) -> None:
    """Writes the files of an evaluation, replacing those of one before; the page last.

    OUT/metrics.json, metrics.parquet, sums/   of the model in question
    OUT/slices.parquet                         where there are slices
    OUT/against/1/metrics.json, sums/, ...     of each model that it is compared with
    OUT/comparison.json                        differences and verdicts, where there are others
    OUT/report.html                            the page

    Raises UserError, before anything is written, where the rows are not the same, or other files are in the way.
    """
    from mmoe_rec.report.evaluation import page

    text, comparison, against = page(results), results.comparison, out / "against"
    for each in against.iterdir() if against.is_dir() else ():
        if not (each.name.isdigit() and {path.name for path in each.iterdir()} <= {"sums", "metrics.json"}):
            raise UserError(
                f"'{each}' lies where results go, and belongs to no evaluation: give another folder with --out"
            )
    check_folder(out / "sums")
    (out / "report.html").unlink(missing_ok=True)  # it would tell of other numbers than lie beside it
    shutil.rmtree(against, ignore_errors=True)
    for name in ("comparison.json", "slices.parquet"):
        (out / name).unlink(missing_ok=True)
    for place, model in enumerate(results.models.values()):
        folder = against / str(place) if place else out
        model.sums.save(folder / "sums")
        write_json(folder / "metrics.json", summary_tree(model.summary))
    if comparison is not None:
        write_json(out / "comparison.json", comparison_tree(comparison, results.first.summary))
    tables = {"metrics": metrics_table(results)}
    tables |= {"slices": pa.Table.from_pylist([asdict(each) for each in results.slices])} if results.slices else {}
    for name, table in tables.items():
        with atomic_file(out / f"{name}.parquet") as file:
            pq.write_table(table, file)
    with atomic_file(out / "report.html") as file:
        file.write_text(text, encoding="utf-8")


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """Writes a file."""
    with atomic_file(path) as file:
        file.write_text(json.dumps(tree, indent=1), encoding="utf-8")


def summary_tree(summary: Summary) -> dict[str, Any]:
    """`metrics.json`."""
    names = ("rows", "users", "requests", "resamples", "seed")
    tree: dict[str, Any] = {name: getattr(summary, name) for name in names} | {"tasks": {}}
    for name, group in summary.groups.items():
        kind = {} if name == SCORE else {"kind": group.kind}
        metrics = {metric: asdict(each) for metric, each in group.metrics.items()}
        part = kind | group.counts | metrics | _noted(note_of_group(summary, name)) | group.details
        (tree if name == SCORE else tree["tasks"])[name] = part
    tree |= {} if summary.catalogue is None else {"catalogue": summary.catalogue}
    return tree | _noted(note_of(summary)) | summary.facts


def _noted(note: str | None) -> dict[str, str]:
    return {} if note is None else {"note": note}


def comparison_tree(compared: Comparison, summary: Summary | None = None) -> dict[str, Any]:
    """`comparison.json`. summary: of the model, None where nothing is decided."""
    objective, against = compared.objective, dict[str, Any]()
    for other, versus in compared.against.items():
        against[other] = asdict(replace(versus, verdict=None))
        del against[other]["verdict"]
        if (verdict := versus.verdict) is not None and summary is not None:
            guards = [
                {name: getattr(each, name) for name in ("task", "metric", "passed")}
                | {"sentence": describe_guard(each, other, compared.rules)}
                for each in verdict.guards
            ]
            told = {"sentence": describe_verdict(compared, other, summary), "guards": guards}
            against[other]["verdict"] = {"kind": verdict.kind, **told, "detectable": verdict.detectable}
    names = ("model", "resamples", "seed", "units", "effective_users", "judged", "left_out")
    return {name: getattr(compared, name) for name in names} | {
        "objective": None if objective is None else asdict(objective) | {"name": objective.name},
        "against": against,
    }


def estimate_tree(estimate: PolicyEstimate) -> dict[str, Any]:
    """What `off_policy.json` says of a task."""
    tree: dict[str, Any] = {name: getattr(estimate, name) for name in ("rows", "without_label")}
    tree["refused"] = describe_refusal(estimate)
    if estimate.rows:
        its, names = asdict(estimate), ["users", "logged", "mean_weight", "effective_rows"]
        tree |= {name: its[name] for name in names}
        if estimate.refusal is None:
            for each in its["estimates"]:
                if each["doubly_robust"] is None:
                    del each["doubly_robust"]
            tree |= {"warnings": list(describe_warnings(estimate)), "estimates": list(its["estimates"])}
    return tree


def metrics_table(results: Results) -> pa.Table:
    """`metrics.parquet`: a row for each model, task (`score`, `catalogue`) and metric, with its interval; and for each
    difference from another model, whose name stands in `less`."""
    rows: list[dict[str, Any]] = []
    for name, summary in results.summaries.items():
        tree = summary_tree(summary)
        for group, metrics in {**tree["tasks"], SCORE: tree[SCORE], "catalogue": tree.get("catalogue", {})}.items():
            for metric, value in metrics.items():
                ends = value if isinstance(value, dict) and "low" in value else {"value": value}
                if isinstance(ends["value"], (int, float)) or ends is value:
                    rows.append({"model": name, "less": None, "group": group, "metric": metric, **ends})
    comparison = results.comparison
    for other, versus in ({} if comparison is None else comparison.against).items():
        for group, differences in {"objective": {"objective": versus.objective}, **versus.groups}.items():
            for metric, apart in differences.items():
                keys = {"model": results.name, "less": other, "group": group, "metric": metric}
                rows.append(keys | {end: getattr(apart, end) for end in _DIFFERENCE})
    kinds = [(name, pa.string()) for name in ("model", "less", "group", "metric")]
    return pa.Table.from_pylist(rows, pa.schema([*kinds, *((name, pa.float64()) for name in _DIFFERENCE)]))
