"""Estimates of another policy from files of a log with propensities."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.off_policy import LoggedChoices, PolicyEstimate, estimate
from mmoe_rec.log.checks import BadFile, open_parquet
from mmoe_rec.log.files import find_files
from mmoe_rec.log.values import columns_of, file_column, with_path_values
from mmoe_rec.report.documents import estimate_tree, write_json


@dataclass(frozen=True)
class PolicyQuestion:
    """What is estimated. tasks: names of them, of which the labels are averaged; columns: part -> column of the files;
    where: column -> value, as text, of the rows that count; modelled: tasks for which there is a model's
    expectation."""

    tasks: tuple[str, ...]
    columns: dict[str, str]
    where: dict[str, str] = field(default_factory=dict)
    modelled: frozenset[str] = frozenset()

    @staticmethod
    def of(tasks: Sequence[str], words: Sequence[str], where: Sequence[str]) -> PolicyQuestion:
        """By the words of a command line. Raises UserError for others."""
        columns = {name: name for name in ("user", "propensity", "target")}
        columns |= {f"label_{task}": f"label_{task}" for task in tasks}
        model = {part for task in tasks for part in _of_model(task)}
        for word in words:
            part, equals, column = word.partition("=")
            if not equals or part not in {*columns, *model} or not column:
                raise UserError(
                    f"--columns {word}: expected PART=COLUMN, of the parts {', '.join(sorted({*columns, *model}))}"
                )
            columns[part] = column
        asked = PolicyQuestion(tuple(tasks), columns, dict(_condition(word) for word in where))
        return asked.modelling(task for task in tasks if not columns.keys().isdisjoint(_of_model(task)))

    def modelling(self, tasks: Iterable[str]) -> PolicyQuestion:
        """The same with a model's expectations for these tasks too, by their usual names where nothing was said."""
        modelled = self.modelled.union(tasks)
        more = {part: part for task in sorted(modelled) for part in _of_model(task)}
        return replace(self, columns=more | self.columns, modelled=modelled)


def _of_model(task: str) -> tuple[str, str]:
    """What a model expects of what was shown, and of what the target would show."""
    return f"predicted_{task}", f"expected_{task}"


def _condition(word: str) -> tuple[str, str]:
    column, equals, value = word.partition("=")
    if not equals or not column:
        raise UserError(f"--where {word}: expected COLUMN=VALUE, such as policy=random")
    return column, value


def estimate_policy(asked: PolicyQuestion, source: str, out: Path, resamples: int) -> dict[str, PolicyEstimate]:
    """Task -> its estimates, see `estimate`; writes them to `off_policy.json` in a folder.

    Raises UserError for a wrong file, column or value, or where no row is left.
    """
    files = [(each.address, columns_of(each.address)) for each in find_files(source, "--log")]
    asked = asked.modelling(t for t in asked.tasks if all(there.issuperset(_of_model(t)) for _, there in files))
    parts = [part for part in _parts(asked, files) if len(part)]
    if not parts:
        conditions = " and ".join(f"{name} = {value}" for name, value in asked.where.items())
        raise UserError(f"'{source}' holds no row{f' with {conditions}' if conditions else ''}")
    rows = pa.concat_tables(parts).combine_chunks()
    numbers = {name: rows[name].to_numpy() for name in rows.column_names if name != "user"}
    found = {}
    for task in asked.tasks:
        shown = LoggedChoices(
            rows["user"].combine_chunks(), numbers["propensity"], numbers["target"], numbers[f"label_{task}"]
        )
        if task in asked.modelled:
            _check_model(asked, task, numbers, source)
            shown = replace(shown, predicted=numbers[f"predicted_{task}"], expected=numbers[f"expected_{task}"])
        found[task] = estimate(shown, resamples)
    trees = {task: estimate_tree(each) for task, each in found.items()}
    write_json(out / "off_policy.json", {"log": source, "where": asked.where, "tasks": trees})
    return found


def _check_model(asked: PolicyQuestion, task: str, numbers: Mapping[str, np.ndarray], source: str) -> None:
    """Raises UserError where labels are 0 and 1, and a model expects something else than probabilities of them."""
    labels = numbers[f"label_{task}"]
    if not np.isin(labels[~np.isnan(labels)], (0, 1)).all():
        return
    for part in _of_model(task):
        wrong = (numbers[part] < 0) | (numbers[part] > 1)
        if wrong.any():
            raise UserError(
                f"column '{asked.columns[part]}' of '{source}' holds {numbers[part][wrong][0]:g}, but what a model "
                f"expects of '{task}', whose labels are 0 and 1, is a probability"
            )


def _parts(asked: PolicyQuestion, files: Sequence[tuple[str, set[str]]]) -> Iterator[pa.Table]:
    names = [*dict.fromkeys([*asked.columns.values(), *asked.where])]
    for address, there in files:
        for name in names:
            if name not in there:
                part = next((part for part, column in asked.columns.items() if column == name), None)
                near = get_close_matches(name, there, 1)
                meant = f"; did you mean '{near[0]}'?" if near else ""
                hint = meant if part is None else f"; name another one with --columns {part}=COLUMN"
                raise BadFile(f"'{address}' has no column '{name}'{hint}", address)
        with open_parquet(address) as parquet:
            table = parquet.read(columns=[name for name in names if name in parquet.schema_arrow.names])
        yield _checked(asked, with_path_values(table, address, names), address)


def _checked(asked: PolicyQuestion, table: pa.Table, address: str) -> pa.Table:
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
        wrong = _wrong(part, numbers) & kept
        _refuse(address, name, wrong, _EXPECTED.get(part, "a finite number"), numbers)
        columns[part] = numbers[kept]
    return pa.table(columns)


_EXPECTED = {"propensity": "a probability above 0", "target": "a probability, 0 to 1"}


def _wrong(part: str, values: np.ndarray) -> np.ndarray:
    if part == "propensity":
        return ~((values > 0) & (values <= 1))
    if part == "target":
        return ~((values >= 0) & (values <= 1))
    return np.isinf(values) if part.startswith("label_") else ~np.isfinite(values)


def _refuse(address: str, name: str, wrong: np.ndarray, expected: str, values: np.ndarray | None = None) -> None:
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        found = "null" if values is None or np.isnan(values[row]) else f"{values[row]:g}"
        raise BadFile(f"'{address}': column '{name}' must hold {expected}, found {found} in row {row:,}", address)
