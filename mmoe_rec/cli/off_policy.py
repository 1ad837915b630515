"""mmoe-rec off-policy --log data/shown --tasks clicked --columns target=p_new

What another policy would have gained, from a log of what was shown and with which probability: SNIPS and, where a
model's expectations are there, doubly robust estimates of the mean label, with intervals over users, for weights
clipped at several caps. A row has the `propensity` with which the logging policy chose what it shows, the probability
with which the `target` policy would choose the same, and label_TASK; maybe a `user` (else each row is one),
predicted_TASK, what a model expects of what was shown, and expected_TASK, what it expects of the target's choices.
`--columns` says what they are called, `--where COLUMN=VALUE` which rows count, such as those of a randomised part.

There is no estimate, and a sentence says why, where the log can't have shown what the target shows.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mmoe_rec.atomic import write_text
from mmoe_rec.cli.main import COUNT, FOLDER, command, show
from mmoe_rec.errors import UserError
from mmoe_rec.progress import say

if TYPE_CHECKING:
    import pyarrow as pa

    from mmoe_rec.evaluation.off_policy import PolicyEstimate


@command(__doc__)
@click.option("--log", required=True, metavar="P", help="a folder of Parquet files, one, or a glob")
@click.option("--tasks", multiple=True, required=True, metavar="T...", help="whose mean label is estimated")
@click.option("--columns", multiple=True, metavar="PART=COLUMN...", help="names of columns")
@click.option("--where", multiple=True, metavar="COLUMN=VALUE...", help="the rows that count")
@click.option("--resamples", type=COUNT, default=1000, metavar="N", help="redraws of the users (default: 1000)")
@click.option("--out", type=FOLDER, default="off_policy", metavar="DIR", help="where off_policy.json goes")
def off_policy(
    log: str, tasks: tuple[str, ...], columns: tuple[str, ...], where: tuple[str, ...], resamples: int, out: Path
) -> None:
    from mmoe_rec.report.sentences import estimate_tree
    from mmoe_rec.report.tables import show_estimates

    conditions = {}
    for word in where:
        column, equals, value = word.partition("=")
        if not equals or not column:
            raise UserError(f"--where {word}: expected COLUMN=VALUE, such as policy=random")
        conditions[column] = value
    estimates = estimate_policy(log, tasks, columns, conditions, resamples)
    trees = {task: estimate_tree(each) for task, each in estimates.items()}
    tree = {"log": log, "where": conditions, "tasks": trees}
    write_text(out / "off_policy.json", json.dumps(tree, indent=1))
    show(show_estimates(estimates))
    print(f"estimates: {out / 'off_policy.json'}")


def estimate_policy(
    source: str, tasks: Sequence[str], named: Sequence[str], where: Mapping[str, str], resamples: int
) -> dict[str, PolicyEstimate]:
    """Task -> its estimates from files of a log with propensities, see `mmoe_rec.evaluation.off_policy.estimate`.

    named: PART=COLUMN, where a column is not called as its part; where: column -> value, as text, of the rows that
    count. A model's expectations are used where they are named or all files have them. Raises UserError for a wrong
    part, file, column or value, or where no row is left.
    """
    import numpy as np
    import pyarrow as pa

    from mmoe_rec.evaluation.off_policy import LoggedChoices, estimate
    from mmoe_rec.jobs.prediction_files import name_columns
    from mmoe_rec.log.checks import BadFile
    from mmoe_rec.log.files import find_files
    from mmoe_rec.log.values import columns_of

    parts = ["user", "propensity", "target", *(f"label_{task}" for task in tasks)]
    # What a model expects of what was shown, and of what the target would show.
    of_model = {task: [f"expected_{task}", f"predicted_{task}"] for task in tasks}
    columns = name_columns(named, sorted({*parts, *itertools.chain(*of_model.values())}))
    files = {each.address: columns_of(each.address) for each in find_files(source, "--log")}
    if not any(columns.get("user", "user") in there for there in files.values()) and "user" not in columns:
        parts.remove("user")
        say(
            "the log has no column 'user', so each row counts as a user: where users come back, intervals are too "
            "narrow; name their column with --columns user=COLUMN"
        )
    for names in of_model.values():
        if columns.keys() & {*names} or all({*names} <= there for there in files.values()):
            parts += names
    columns = {part: columns.get(part, part) for part in parts}
    tables = {address: _read(address, there, columns, where) for address, there in files.items()}
    tables = {address: table for address, table in tables.items() if len(table)}
    for address, table in tables.items() if "user" in columns else ():
        first, kind = next(iter(tables.values()))["user"].type, table["user"].type
        if kind != first:
            name = columns["user"]
            raise BadFile(
                f"column '{name}' holds {first} in '{next(iter(tables))}', and {kind} in '{address}'", address
            )
    if not tables:
        conditions = " and ".join(f"{name} = {value}" for name, value in where.items())
        raise UserError(f"'{source}' holds no row{f' with {conditions}' if conditions else ''}")
    rows = pa.concat_tables(list(tables.values())).combine_chunks()
    numbers = {name: rows[name].to_numpy() for name in rows.column_names if name != "user"}
    estimates = {}
    for task in tasks:
        label, model = numbers[f"label_{task}"], [numbers.get(f"{kind}_{task}") for kind in ("predicted", "expected")]
        if np.isin(label[~np.isnan(label)], (0, 1)).all():
            for part in (each for each in of_model[task] if each in numbers):
                if (outside := (numbers[part] < 0) | (numbers[part] > 1)).any():
                    raise UserError(
                        f"column '{columns[part]}' of '{source}' holds {numbers[part][outside][0]:g}; expected "
                        f"probabilities, as the labels of '{task}' are 0 and 1"
                    )
        users = rows["user"].combine_chunks() if "user" in columns else pa.array(np.arange(len(rows)))
        shown = LoggedChoices(users, numbers["propensity"], numbers["target"], label, *model)
        estimates[task] = estimate(shown, resamples)
    return estimates


def _read(address: str, there: set[str], columns: Mapping[str, str], where: Mapping[str, str]) -> pa.Table:
    """The rows of a file that count, their columns by the names of parts. Raises BadFile for a wrong value."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.types as pt

    from mmoe_rec.evaluation.sums import LABELS, PREDICTIONS, Check
    from mmoe_rec.jobs.prediction_files import FileRows
    from mmoe_rec.log.checks import BadFile, open_parquet
    from mmoe_rec.log.values import with_path_values

    names = [*dict.fromkeys([*columns.values(), *where])]
    for name in names:
        if name not in there:
            part = next((part for part, column in columns.items() if column == name), None)
            near = get_close_matches(name, there, 1)
            meant = f"; did you mean '{near[0]}'?" if near else ""
            hint = meant if part is None else f"; name another one with --columns {part}=COLUMN"
            raise BadFile(f"'{address}' has no column '{name}'{hint}", address)
    with open_parquet(address) as parquet:
        table = parquet.read(columns=[name for name in names if name in parquet.schema_arrow.names])
    table = with_path_values(table, address, names)
    kept = np.ones(len(table), bool)
    for name, value in where.items():
        column = table[name].combine_chunks()
        column = column.dictionary_decode() if pt.is_dictionary(column.type) else column
        kept &= pc.fill_null(pc.equal(column.cast(pa.string()), value), False).to_numpy(zero_copy_only=False)
    rows = FileRows(address, table, kept=kept)
    # The squares of what is divided by smaller ones would overflow.
    chosen: Check = ("a probability, 1e-50 to 1", lambda values: (values > 1e-50) & (values <= 1))
    checks = dict.fromkeys(columns, PREDICTIONS["regression"])
    checks |= {part: LABELS["regression"] for part in columns if part.startswith("label_")}
    checks |= {"propensity": chosen, "target": PREDICTIONS["binary"]}
    return pa.table(
        {
            part: rows.read_ids(name) if part == "user" else rows.read_numbers(name, checks[part])
            for part, name in columns.items()
        }
    )
