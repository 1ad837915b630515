"""python -m pipelines.ingest_census_income --source census --out data/census_income

Convert the two files of Census-Income (KDD), as published by UCI, into a plain table with one row for each person:
`OUT/log/train.parquet` and `OUT/log/test.parquet`. The source folder must have census-income.data and
census-income.test, optionally compressed as .gz or .bz2.

The labels follow the mixture-of-experts paper (Ma et al., KDD 2018). The paper predicts pairs of labels: income with
never_married, and college with never_married.

income         more than 50,000 dollars a year.
college        education of some college or more.
never_married  never married.

The column `split` is train for the rows of the first file. Half of the rows of the second file, drawn with --seed, have
validation, and the remaining rows have test.
"""

import bz2
import csv
import gzip
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from mmoe_rec.atomic import atomic_folder
from mmoe_rec.errors import UserError, exit_with_message
from pipelines.data_sets.ingest_common import command_parser, non_negative, run_ingest, write_log_file

COLUMNS: dict[str, pa.DataType] = {
    "age": pa.int64(),
    "class_of_worker": pa.string(),
    "industry_code": pa.int64(),
    "occupation_code": pa.int64(),
    "education": pa.string(),
    "wage_per_hour": pa.int64(),
    "enrolled": pa.string(),
    "marital_status": pa.string(),
    "industry": pa.string(),
    "occupation": pa.string(),
    "race": pa.string(),
    "hispanic_origin": pa.string(),
    "sex": pa.string(),
    "union_member": pa.string(),
    "unemployment_reason": pa.string(),
    "employment": pa.string(),
    "capital_gains": pa.int64(),
    "capital_losses": pa.int64(),
    "dividends": pa.int64(),
    "tax_filer": pa.string(),
    "previous_region": pa.string(),
    "previous_state": pa.string(),
    "household_and_family": pa.string(),
    "household_summary": pa.string(),
    "instance_weight": pa.float64(),
    "migration_msa": pa.string(),
    "migration_region": pa.string(),
    "migration_within_region": pa.string(),
    "same_house": pa.string(),
    "migration_sunbelt": pa.string(),
    "employer_size": pa.int64(),
    "parents_present": pa.string(),
    "father_birth_country": pa.string(),
    "mother_birth_country": pa.string(),
    "birth_country": pa.string(),
    "citizenship": pa.string(),
    "own_business": pa.int64(),
    "veterans_questionnaire": pa.string(),
    "veterans_benefits": pa.int64(),
    "weeks_worked": pa.int64(),
    "year": pa.int64(),
}
"""Columns of the source files, in order. One more column follows: the income."""

COLLEGE = frozenset(
    {
        "Some college but no degree",
        "Associates degree-occup /vocational",
        "Associates degree-academic program",
        "Bachelors degree(BA AB BS)",
        "Masters degree(MA MS MEng MEd MSW MBA)",
        "Prof school degree (MD DDS DVM LLB JD)",
        "Doctorate degree(PhD EdD)",
    }
)
"""Values of `education` that mean some college or more."""

_INCOMES = {"- 50000.": 0, "50000+.": 1}
_MISSING = "?"
_OPEN: dict[str, Callable[..., IO[str]]] = {"": open, ".gz": gzip.open, ".bz2": bz2.open}

LOG = pa.schema(
    [
        *(pa.field(name, kind) for name, kind in COLUMNS.items()),
        *(pa.field(name, pa.int8()) for name in ("income", "college", "never_married")),
        pa.field("split", pa.string()),
    ]
)
"""Columns of the table, in order, as described in data/README.md."""


def find_file(folder: Path, name: str) -> Path:
    """Return the path of a source file, with or without compression.

    Args:
        folder: Source folder.
        name: Name of the file without the suffix of a compression.

    Raises:
        UserError: There is no such file.
    """
    for suffix in _OPEN:
        if (path := folder / f"{name}{suffix}").is_file():
            return path
    raise UserError(
        f"'{folder / name}' is missing (also as .gz and .bz2). Put both files of UCI into the source folder."
    )


def read_people(path: Path) -> pa.Table:
    """Read a source file as a table with the columns of `LOG` without `split`. The text ? becomes null.

    Raises:
        UserError: The file can't be read, or a line is invalid. The message names the file and the line.
    """
    columns: dict[str, list[Any]] = {name: [] for name in (*COLUMNS, "income")}
    for number, fields in _lines(path):
        if len(fields) != len(columns):
            raise UserError(f"'{path}', line {number}: expected {len(columns)} fields, found {len(fields)}")
        for (name, values), text in zip(columns.items(), fields, strict=True):
            try:
                values.append(_value(name, text.strip()))
            except (ValueError, KeyError):
                raise UserError(f"'{path}', line {number}: {name} can't be {text.strip()!r}") from None
    if not columns["income"]:
        raise UserError(f"'{path}' has no rows")
    columns["college"] = [int(education in COLLEGE) for education in columns["education"]]
    columns["never_married"] = [int(status == "Never married") for status in columns["marital_status"]]
    return pa.table({name: pa.array(values, LOG.field(name).type) for name, values in columns.items()})


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    try:
        with _OPEN[path.suffix if path.suffix in _OPEN else ""](path, "rt", encoding="utf-8", newline="") as file:
            for number, fields in enumerate(csv.reader(file), start=1):
                if fields:
                    yield number, fields
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"'{path}' can't be read: {error}") from None


def _value(name: str, text: str) -> Any:
    if name == "income":
        return _INCOMES[text]
    if pa.types.is_integer(COLUMNS[name]):
        return int(text)
    if pa.types.is_floating(COLUMNS[name]):
        return float(text)
    if not text:
        raise ValueError(text)
    return None if text == _MISSING else text


def ingest(source: Path, out: Path, seed: int) -> dict[str, int]:
    """Write the table to `out`/log, replacing an existing table. Return numbers of rows by split and positive labels.

    Args:
        source: Folder of both source files.
        out: Folder for the table.
        seed: Seed of the random choice of validation rows in the second file.

    Raises:
        UserError: A source file is missing or invalid.
    """
    train, held_out = (read_people(find_file(source, f"census-income.{name}")) for name in ("data", "test"))
    with atomic_folder(out / "log") as folder:
        counts = {"train": len(train)}
        write_log_file(_split(train, np.full(len(train), "train")), folder / "train.parquet")
        split = np.full(len(held_out), "test", object)
        split[np.random.default_rng(seed).permutation(len(held_out))[: len(held_out) // 2]] = "validation"
        write_log_file(_split(held_out, split), folder / "test.parquet")
        counts |= {name: int((split == name).sum()) for name in ("validation", "test")}
    for label in ("income", "college", "never_married"):
        counts[label] = sum(int(np.sum(table[label].to_numpy())) for table in (train, held_out))
    return counts


def _split(table: pa.Table, split: np.ndarray[Any, Any]) -> pa.Table:
    return table.append_column("split", pa.array(split, pa.string())).select(LOG.names).cast(LOG)


@exit_with_message()
def main(arguments: list[str] | None = None) -> None:
    """Run the command with `arguments`. None stands for the arguments of the process."""
    parser = command_parser("python -m pipelines.ingest_census_income", __doc__)
    add = parser.add_argument
    add("--source", type=Path, required=True, help="folder with census-income.data and census-income.test")
    add("--out", type=Path, required=True, help="folder in which log/ is written or replaced")
    add("--seed", type=non_negative, default=17, help="seed of the halves of the test file (default: %(default)s)")
    run_ingest("Census-Income", parser, arguments, lambda options: ingest(options.source, options.out, options.seed))


if __name__ == "__main__":
    main()
