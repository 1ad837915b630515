"""What the ingest commands share: drawing negatives, writing a log file, the closing table."""

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
    """Draw positions uniformly and without replacement from 0 .. count - 1, less those taken.

    Args:
        count: number of candidates.
        taken: (T,) distinct positions, ascending.
        wanted: how many to draw; all that are free, if there are fewer.
        entropy: non-negative integers that alone decide the draw, so that neither the order of requests nor which of
            them are read changes it.

    Returns:
        (min(wanted, count - T),) positions, in no particular order.
    """
    free = count - len(taken)
    drawn = min(wanted, free)
    if drawn == 0:
        return np.empty(0, dtype=np.int64)
    ranks = np.random.default_rng(list(entropy)).choice(free, drawn, replace=False, shuffle=False)
    # taken[i] - i free positions lie before taken[i]: a rank moves up by the number of taken positions it passes.
    return ranks + np.searchsorted(taken - np.arange(len(taken)), ranks, side="right")


def write_log_file(table: pa.Table, path: Path) -> None:
    """Write one Parquet file of the log: zstd, row groups of at most 65,536 rows."""
    pq.write_table(table, path, compression="zstd", row_group_size=ROW_GROUP_ROWS)


def command_parser(command: str, doc: str | None) -> argparse.ArgumentParser:
    """The parser of a command, as it is typed; doc: its docstring, which `--help` shows."""
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
    """Run what makes a log by the options of a command line, and tell what the log holds."""
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    counts = ingest(options)
    print_summary(title, {**counts, "seconds": time.perf_counter() - started}, options.out / "log", next_command)


def print_summary(title: str, values: Mapping[str, int | float], log: Path, next_command: str | None = None) -> None:
    """Print a table of counts and seconds (floats), then where the log is and what to type next."""
    from rich.table import Table

    from mmoe_rec.progress import open_console

    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    for name, value in values.items():
        table.add_row(name, f"{value:,.1f}" if isinstance(value, float) else f"{value:,}")
    open_console().print(table)
    # Plain lines, which a narrow terminal wraps without breaking a copied path or command.
    print(f"log:  {log}")
    if next_command:
        print(f"next: {next_command}")
