"""Functions that the ingest commands share: sampling of negatives, log files, and the printed summary."""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

IntArray = npt.NDArray[np.int64]

ROW_GROUP_ROWS = 65_536
REQUEST_TIME = pa.timestamp("us", tz="UTC")


def sample_negatives(count: int, taken: IntArray, wanted: int, entropy: Sequence[int]) -> IntArray:
    """Draw indices from 0 to count - 1 uniformly and without replacement, leaving out given indices.

    Args:
        count: Number of candidates.
        taken: The T indices to leave out, distinct and in ascending order, shape (T,).
        wanted: Number of indices to draw. If fewer are left, all of them are drawn.
        entropy: Seed, as non-negative integers. With a seed for each request, requests can be read in any order.

    Returns:
        Indices in no particular order, shape (min(wanted, count - T),).
    """
    free = count - len(taken)
    drawn = min(wanted, free)
    if drawn == 0:
        return np.empty(0, dtype=np.int64)
    ranks = np.random.default_rng(list(entropy)).choice(free, drawn, replace=False, shuffle=False)
    # A rank is the position of a drawn index among the free indices. There are taken[i] - i free indices before
    # taken[i], so the drawn index is its rank plus the number of taken indices below it.
    return ranks + np.searchsorted(taken - np.arange(len(taken)), ranks, side="right")


def write_log_file(table: pa.Table, path: Path) -> None:
    """Write a Parquet file of the log, with zstd and row groups of at most 65,536 rows.

    Args:
        table: Rows of the file.
        path: Path of the file.
    """
    pq.write_table(table, path, compression="zstd", row_group_size=ROW_GROUP_ROWS)


def command_parser(command: str, doc: str | None) -> argparse.ArgumentParser:
    """Return the argument parser of a command.

    Args:
        command: Command as the user types it.
        doc: Docstring of the command's module, which `--help` prints.
    """
    form = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=command, description=doc, formatter_class=form, allow_abbrev=False)


def non_negative(text: str) -> int:
    """Read a command-line integer of at least zero."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, found {text!r}")
    return int(text)


def run_ingest(
    title: str,
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    ingest: Callable[[argparse.Namespace], Mapping[str, int]],
    next_command: str | None = None,
) -> None:
    """Parse the command line, write a log and print a summary.

    Args:
        title: Title of the summary.
        parser: Parser of the command.
        arguments: Arguments of the command line. None stands for those of the process.
        ingest: Function that writes the log for the parsed options and returns counts.
        next_command: Command to suggest next.
    """
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    counts = ingest(options)
    print_summary(title, {**counts, "seconds": time.perf_counter() - started}, options.out / "log", next_command)


def print_summary(title: str, values: Mapping[str, int | float], log: Path, next_command: str | None = None) -> None:
    """Print a table of values, the path of the log and the next command.

    Args:
        title: Title of the table.
        values: Counts, and seconds as floats, by name.
        log: Path of the log.
        next_command: Command to suggest next.
    """
    from rich.table import Table

    from mmoe_rec.progress import open_console

    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    for name, value in values.items():
        table.add_row(name, f"{value:,.1f}" if isinstance(value, float) else f"{value:,}")
    open_console().print(table)
    # Print plain lines, because a narrow terminal wraps them without breaking a copied path or command.
    print(f"log:  {log}")
    if next_command:
        print(f"next: {next_command}")
