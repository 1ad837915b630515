"""What the commands share: settings with overrides, options that take several values, and `--help`."""

from __future__ import annotations

import functools
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from mmoe_rec.cli.main import command
from mmoe_rec.errors import UserError
from mmoe_rec.settings.load import TEMPLATE, load_settings
from mmoe_rec.settings.sections import Settings

_WIDE = 160  # columns
MODEL = "models:/NAME@ALIAS, runs:/..., or a model's folder"
FOLDER = click.Path(path_type=Path)
COUNT = click.IntRange(min=1)

model_option = click.option("--model", required=True, metavar="M", help=MODEL)
slices_option = click.option(
    "--slices",
    multiple=True,
    metavar="S...",
    help="parts of the rows that are measured too: by the values of a COLUMN, or 'bucket(COLUMN, N)' of a number",
)
overrides_argument = click.argument("overrides", nargs=-1, type=click.UNPROCESSED, metavar="[--SECTION.KEY VALUE]...")


def out_option(default: str, what: str = "where the report goes") -> Callable[[Any], Any]:
    """`--out DIR`, a folder that is `default` if it is not given."""
    return click.option("--out", type=FOLDER, metavar="DIR", help=f"{what} (default: {default})")


@dataclass(frozen=True)
class Configuration:
    """A settings file and what overrides it, as they were typed."""

    file: str
    overrides: Sequence[str] = ()

    @functools.cached_property
    def settings(self) -> Settings:
        """The settings. Raises UserError for a wrong one."""
        return load_settings(self.file, self.overrides)

    def options(self, *words: str) -> str:
        """The options that give another command the same settings, with `words` among them, quoted for a shell."""
        return shlex.join(["--config", self.file, *words, *self.overrides])


def settings_command(doc: str | None, required: bool = True) -> Callable[[Callable[..., None]], click.Command]:
    """Makes a command of a function, whose first argument becomes the `Configuration` of `--config` and overrides.

    required: whether `--config` must be given. Without it, the first argument is None and overrides are refused.
    """

    def decorate(function: Callable[..., None]) -> click.Command:
        @functools.wraps(function)
        def run(config: str | None, overrides: tuple[str, ...], **options: Any) -> None:
            if config is None:
                if overrides:
                    raise UserError(f"'{overrides[0]}' is no option; where it is a setting, --config is missing")
                return function(None, **options)
            if required and (engine := options.pop("engine")):
                overrides = (*overrides, "--data.engine", engine)
            if required and options.pop("skip_bad_files"):
                overrides = (*overrides, "--data.skip_bad_files", "true")
            configuration = Configuration(config, overrides)
            if required:
                _ = configuration.settings  # a wrong setting is told before anything else
            return function(configuration, **options)

        if required:
            run = click.option("--skip-bad-files", is_flag=True, help="short for --data.skip_bad_files true")(run)
            run = click.option("--engine", metavar="E", help="short for --data.engine: local or ray")(run)
        file = click.option("--config", required=required, metavar="C", help=f"settings file, such as {TEMPLATE}")
        return command(doc, section="")(file(overrides_argument(run)))

    return decorate


class NumberBetween(click.FloatRange):
    """A number between two others, the ends included, for an option's `type`."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__(low, high)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"'{value}' is no number", param, ctx)
        return float(number)


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
