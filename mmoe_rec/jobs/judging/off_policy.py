"""Estimates of another policy from files of a log with propensities."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from mmoe_rec.atomic import atomic_file
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.judging.off_policy import Shown, estimate
from mmoe_rec.log.checks import BadFile, open_parquet
from mmoe_rec.log.files import find_files
from mmoe_rec.log.values import file_column

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Asked:
    """What is estimated. tasks: names of them, of which the labels are averaged; columns: part -> column of the files;
    where: column -> value, as text, of the rows that count; modelled: tasks for which there is a model's
    expectation."""

    tasks: tuple[str, ...]
    columns: dict[str, str]
    where: dict[str, str] = field(default_factory=dict)
    modelled: frozenset[str] = frozenset()

    @staticmethod
    def of(tasks: Sequence[str], words: Sequence[str], where: Sequence[str]) -> Asked:
        """By the words of a command line. Raises UserError for others."""
        columns = {name: name for name in ("user", "propensity", "target")}
        columns |= {f"label_{task}": f"label_{task}" for task in tasks}
        model = {f"{kind}_{task}" for task in tasks for kind in ("predicted", "expected")}
        for word in words:
            part, equals, column = word.partition("=")
            if not equals or part not in {*columns, *model} or not column:
                raise UserError(
                    f"--columns {word}: expected PART=COLUMN, of the parts {', '.join(sorted({*columns, *model}))}"
                )
            columns[part] = column
        modelled = frozenset(task for task in tasks if {f"predicted_{task}", f"expected_{task}"} <= columns.keys())
        for task in tasks:
            if task not in modelled and {f"predicted_{task}", f"expected_{task}"} & columns.keys():
                raise UserError(
                    f"a doubly robust estimate of '{task}' needs both predicted_{task} (of what was shown) and "
                    f"expected_{task} (of what the target would show); --columns names one"
                )
        return Asked(tuple(tasks), columns, dict(_condition(word) for word in where), modelled)


def _condition(word: str) -> tuple[str, str]:
    column, equals, value = word.partition("=")
    if not equals or not column:
        raise UserError(f"--where {word}: expected COLUMN=VALUE, such as policy=random")
    return column, value


def estimate_policy(asked: Asked, source: str, out: Path, resamples: int) -> dict[str, Any]:
    """Task -> its estimates, see `estimate`; writes them to `off_policy.json` in a folder.

    Raises UserError for a wrong file, column or value, or where no row is left.
    """
    parts = [part for part in _parts(asked, source) if len(part)]
    if not parts:
        conditions = " and ".join(f"{name} = {value}" for name, value in asked.where.items())
        raise UserError(f"'{source}' holds no row{f' with {conditions}' if conditions else ''}")
    rows = pa.concat_tables(parts).combine_chunks()
    numbers = {name: rows[name].to_numpy() for name in rows.column_names if name != "user"}
    found = {}
    for task in asked.tasks:
        shown = Shown(rows["user"].combine_chunks(), numbers["propensity"], numbers["target"], numbers[f"label_{task}"])
        if task in asked.modelled:
            shown = replace(shown, predicted=numbers[f"predicted_{task}"], expected=numbers[f"expected_{task}"])
        found[task] = estimate(shown, resamples)
    with atomic_file(out / "off_policy.json") as file:
        file.write_text(json.dumps({"log": source, "where": asked.where, "tasks": found}, indent=1), encoding="utf-8")
    return found


def told(found: Mapping[str, Mapping[str, Any]]) -> Iterator[Table | str]:
    """For the terminal."""
    from rich.table import Table
    from rich.text import Text

    for task, each in found.items():
        if each["refused"] is not None:
            yield f"{task}: no estimate, as {each['refused']}"
            continue
        table = Table(title=f"{task}: mean label of the target policy, {each['rows']:,} rows", title_justify="left")
        for name in ("weights up to", "SNIPS", "doubly robust", "rows they tell as much as", "weight clipped"):
            table.add_column(name, justify="right")
        for row in each["estimates"]:
            cap = "all" if row["cap"] is None else f"{row['cap']:g}"
            cells = [_interval(row["snips"]), _interval(row.get("doubly_robust"))]
            table.add_row(Text(cap), *cells, f"{row['effective_rows']:,.0f}", f"{row['clipped']:.1%}")
        table.caption = f"as it was logged: {_interval(each['logged'])}; mean weight {_interval(each['mean_weight'])}"
        yield table


def _interval(value: Mapping[str, float | None] | None) -> str:
    if value is None or value["value"] is None:
        return "-"
    return (
        f"{value['value']:.4f}"
        if value["low"] is None
        else f"{value['value']:.4f} ({value['low']:.4f} to {value['high']:.4f})"
    )


def _parts(asked: Asked, source: str) -> Iterator[pa.Table]:
    for found in find_files(source, "--log"):
        with open_parquet(found.address) as parquet:
            names = [*dict.fromkeys([*asked.columns.values(), *asked.where])]
            for name in names:
                if parquet.schema_arrow.get_field_index(name) < 0:
                    part = next((part for part, column in asked.columns.items() if column == name), None)
                    hint = "" if part is None else f"; name another one with --columns {part}=COLUMN"
                    raise BadFile(f"'{found.address}' has no column '{name}'{hint}", found.address)
            table = parquet.read(columns=names)
        yield _checked(asked, table, found.address)


def _checked(asked: Asked, table: pa.Table, address: str) -> pa.Table:
    """The rows that count, their columns by the names of parts. Raises BadFile for a wrong value."""
    kept = np.ones(len(table), bool)
    for name, value in asked.where.items():
        column = table[name].combine_chunks()
        column = column.dictionary_decode() if pt.is_dictionary(column.type) else column
        kept &= pc.fill_null(pc.equal(column.cast(pa.string()), value), False).to_numpy(zero_copy_only=False)
    columns: dict[str, Any] = {}
    for part, name in asked.columns.items():
        given = table[name].combine_chunks()
        if part == "user":
            ids = file_column(address, name, "key", given, None, 0)
            ids = ids.cast(pa.string()) if pt.is_dictionary(ids.type) else ids
            _refuse(address, name, ids.is_null().to_numpy(zero_copy_only=False) & kept, "an id, not null")
            columns[part] = ids.filter(pa.array(kept))
            continue
        values = file_column(address, name, "number", given, None, 0)
        numbers = np.full(len(values), np.nan) if pt.is_null(values.type) else values.to_numpy(zero_copy_only=False)
        _refuse(address, name, _wrong(part, numbers) & kept, _EXPECTED.get(part, "a finite number"))
        columns[part] = numbers[kept]
    return pa.table(columns)


_EXPECTED = {"propensity": "a probability above 0", "target": "a probability, 0 to 1"}


def _wrong(part: str, values: np.ndarray) -> np.ndarray:
    if part == "propensity":
        return ~((values > 0) & (values <= 1))
    if part == "target":
        return ~((values >= 0) & (values <= 1))
    return np.isinf(values) if part.startswith("label_") else ~np.isfinite(values)


def _refuse(address: str, name: str, wrong: np.ndarray, expected: str) -> None:
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise BadFile(f"'{address}': column '{name}' must hold {expected}; row {row:,} does not", address)
