"""What the commands share: reading `--config C` with overrides, and a `--help` that documents every setting."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from mmoe_rec.errors import UserError
from mmoe_rec.program import TEMPLATE, spelled
from mmoe_rec.settings.help import describe
from mmoe_rec.settings.load import load_settings
from mmoe_rec.settings.sections import Settings

_WIDE = 160  # columns
SLICES = "parts of the rows that are measured too: by the values of a COLUMN, or 'bucket(COLUMN, N)' of a number"


def read_command(
    doc: str, argv: Sequence[str] | None = None, add_arguments: Callable[[argparse.ArgumentParser], None] | None = None
) -> tuple[argparse.Namespace, Settings]:
    """Parses `--config C`, the command's own arguments and overrides such as `--model.experts.count 16`.

    As `parsed` does; raises UserError for a wrong setting.
    """
    arguments = parsed(doc, argv, add_arguments)
    return arguments, load_settings(arguments.config, arguments.overrides)


def parsed(
    doc: str,
    argv: Sequence[str] | None = None,
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    config: bool = True,
    engine: bool = False,
    log: bool = True,
) -> argparse.Namespace:
    """The arguments of a command, whose settings are not read yet.

    doc: the command's docstring, which begins with `python -m MODULE`, shown by `--help` above all settings. config:
    whether `--config` must be given; overrides without it are an error. engine: whether the command takes `--engine`
    itself where no settings are given; log: whether it reads a log, of which files may be left out. The parsed
    arguments hold the overrides, as they were written, in `overrides`.
    """
    parser = SentenceParser(
        prog=spelled(" ".join(doc.split()[:3])),
        description=spelled(doc),
        epilog=spelled("settings (in the YAML file, or as overrides):\n" + describe()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    template = TEMPLATE.replace("%", "%%")
    parser.add_argument("--config", required=config, metavar="C", help=f"settings file, such as {template}")
    if add_arguments is not None:
        add_arguments(parser)
    parser.add_argument("--engine", metavar="E", help="short for --data.engine: local or ray")
    if log:
        parser.add_argument("--skip-bad-files", action="store_true", help="short for --data.skip_bad_files true")
    arguments, overrides = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    if arguments.engine and not (engine and arguments.config is None):
        overrides += ["--data.engine", arguments.engine]
    overrides += ["--data.skip_bad_files", "true"] if log and arguments.skip_bad_files else []
    if overrides and arguments.config is None:
        parser.error(f"'{overrides[0]}' is no argument of this command, or a setting, for which --config is missing")
    arguments.overrides = overrides
    return arguments


class SentenceParser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists all arguments and settings")


def show(parts: Iterable[Any]) -> None:
    """Prints sentences, one a line however long, and tables of rich."""
    from rich.console import Console

    # A table in a file or a pipe is not cut as on a narrow terminal.
    console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _WIDE)
    for part in parts:
        if isinstance(part, str):
            print(part)
        else:
            console.print(part)


def count(text: str) -> int:
    """A whole number from 1 on, for an argument's `type`."""
    return int(_checked(text, int, 1, None, "a whole number, 1 or more"))


def at_least(least: int) -> Callable[[str], int]:
    """Gives the `type` of an argument that is a whole number from another one on."""
    return lambda text: int(_checked(text, int, least, None, f"{least:,} or more"))


def number_between(low: float, high: float) -> Callable[[str], float]:
    """Gives the `type` of an argument that is a number between two others, the ends included."""
    return lambda text: _checked(text, float, low, high, f"a number between {low:,g} and {high:,g}")


def _checked(text: str, kind: type[int] | type[float], low: float, high: float | None, what: str) -> float:
    try:
        number = kind(text)
    except ValueError:
        number = math.nan
    if not low <= number <= (math.inf if high is None else high):
        raise argparse.ArgumentTypeError(f"must be {what}, found '{text}'")
    return number
