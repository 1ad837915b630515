"""Entry point of `mmoe-rec`, and the parts that commands share: settings with overrides, repeated options, `--help`."""

import functools
import math
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from inspect import cleandoc
from itertools import islice
from pathlib import Path
from typing import Any

import click
from rich.text import Text

from mmoe_rec.errors import EXIT_CODE, UserError, exit_with_message
from mmoe_rec.progress import open_console
from mmoe_rec.report.parts import Report, to_terminal
from mmoe_rec.settings.load import TEMPLATE, check_option_names, load_settings
from mmoe_rec.settings.sections import Settings

COMMANDS = {
    "init": "Draft a settings file from a log's Parquet files",
    "train": "Build features, train a model and register it",
    "evaluate": "Measure a model, or any system's predictions, on the test rows",
    "compare": "Compare variants of settings, architectures and features over several runs",
    "baselines": "Train popularity and gradient-boosted trees for comparison",
    "promote": "Give the alias to a version that is significantly better, or roll back",
    "tune-weights": "Choose the weights of the tasks in the score, for a goal and with a guardrail",
    "score": "Write predictions, scores and ranks for a log or candidate lists",
    "serve": "Serve a model over HTTP",
    "join-labels": "Build training rows from logged requests and later events",
    "check-skew": "Check for training-serving skew",
    "features": "Fit features and encode rows, or add new days",
    "refresh": "Update the served model's tables from new log files",
    "inspect": "Report the health of the log and its features",
    "report": "Combine all results into one HTML page",
    "tune": "Search for better settings",
    "plan": "Estimate the memory and step time of sharded tables",
    "edit-experts": "Add, mask or remove experts of a trained model",
    "export": "Convert a model to int8 or ONNX",
    "settings": "List settings with their defaults",
    "doctor": "Check the packages, the devices, MLflow and the work folder",
}
"""Command -> summary. Function and file have the command's name, with underscores. `COMMAND_FILES` lists exceptions."""
COMMAND_FILES = {
    **dict.fromkeys(("init", "inspect"), "data"),
    **dict.fromkeys(("baselines", "promote", "tune-weights", "report"), "results"),
}
MODEL = "URI (models:/NAME@ALIAS, runs:/...) or folder of the model"
FOLDER = click.Path(path_type=Path)


class NumberBetween(click.FloatRange):
    """Option type for a number in a closed interval. Unlike click's type, it rejects NaN."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"'{value}' is not a number", param, ctx)
        return float(number)


COUNT = click.IntRange(min=1)

model_option = click.option("--model", required=True, metavar="M", help=MODEL)
tracking_option = click.option("--tracking.uri", "tracking_uri", metavar="U", help="URI of MLflow, as in settings")
slices_option = click.option("--slices", multiple=True, metavar="S...", help="groups by COLUMN or 'bucket(COLUMN, N)'")
overrides_argument = click.argument("overrides", nargs=-1, type=click.UNPROCESSED, metavar="[--SECTION.KEY VALUE]...")


class _Command(click.Command):
    """Command that accepts `--option A B` for a repeated option and prints its help text unchanged."""

    def __init__(self, *arguments: Any, section: str | None = None, **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.section = section

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if self.section is not None:  # click itself checks the options of commands without settings.
            check_option_names(args, [name.lstrip("-") for param in self.get_params(ctx) for name in param.opts])
        return super().parse_args(ctx, list(self._repeat_options(args)))

    def _repeat_options(self, arguments: Iterable[str]) -> Iterator[str]:
        repeated = {name for param in self.params if getattr(param, "multiple", False) for name in param.opts}
        option: str | None = None
        rest = iter(arguments)
        for argument in rest:
            if argument in repeated:
                option = argument
                yield argument
                yield from islice(rest, 1)  # The first value may begin with a dash.
            else:
                option = None if argument.startswith("-") else option
                yield from (argument,) if option is None else (option, argument)

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write(f"\n{cleandoc(self.help or '')}\n")

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.section is not None:
            section = f" {self.section}" if self.section else " [SECTION]"
            formatter.write(
                f"\nOverride a setting with --SECTION.KEY VALUE. List the settings: mmoe-rec settings{section}\n"
            )


def command(doc: str | None = None, section: str | None = None) -> Callable[[Callable[..., None]], click.Command]:
    """Return a decorator that turns a function into a command.

    Args:
        doc: Text of `--help`, None for the function's docstring.
        section: Section of settings that options may override, "" for all sections, None for no section. With a
            section, the function needs `overrides_argument`.
    """
    context = {"help_option_names": ["-h", "--help"], "max_content_width": 120}
    any_option = {"ignore_unknown_options": section is not None}
    return click.command(cls=_Command, help=doc, section=section, context_settings={**context, **any_option})


def out_option(default: str, description: str = "folder for the report") -> Callable[[Any], Any]:
    """Return the option `--out DIR`.

    Args:
        default: Default folder to show in the help. The command itself sets the default.
        description: Content of the folder.
    """
    return click.option("--out", type=FOLDER, metavar="DIR", help=f"{description} (default: {default})")


@dataclass(frozen=True)
class Configuration:
    """Settings with the file and the overrides as typed."""

    file: str
    overrides: Sequence[str]
    settings: Settings

    def options(self, *options: str) -> str:
        """Return options that give another command the same settings and `options`, quoted for a shell."""
        return shlex.join(["--config", self.file, *options, *self.overrides])


def settings_command(doc: str | None = None, needs_file: bool = True) -> Callable[[Callable[..., None]], click.Command]:
    """Return a decorator that turns a function of a `Configuration` and options into a command with `--config`.

    Args:
        doc: Text of `--help`, None for the function's docstring.
        needs_file: Whether `--config` is required. Without a file, the function gets None.
    """

    def decorate(function: Callable[..., None]) -> click.Command:
        @functools.wraps(function)
        def run(
            config: str | None, overrides: tuple[str, ...], engine: str | None, skip_bad_files: bool, **options: Any
        ) -> None:
            overrides += ("--data.engine", engine) if engine else ()
            overrides += ("--data.skip_bad_files", "true") if skip_bad_files else ()
            if config is None and overrides:
                raise UserError(f"'{overrides[0]}' is not an option. To override a setting, add --config.")
            opened = None if config is None else Configuration(config, overrides, load_settings(config, overrides))
            return function(opened, **options)

        for option in (
            click.option("--skip-bad-files", is_flag=True, help="short form of --data.skip_bad_files true"),
            click.option("--engine", metavar="E", help="local or ray (short form of --data.engine)"),
            overrides_argument,
            click.option("--config", required=needs_file, metavar="C", help=f"settings file, such as {TEMPLATE}"),
        ):
            run = option(run)
        return command(doc, section="")(run)

    return decorate


def show(parts: Iterable[Any]) -> None:
    """Print sentences, one per line without wrapping, and rich tables."""
    console = open_console()
    for part in parts:
        if isinstance(part, str):
            print(part)
        else:
            console.print(part, soft_wrap=isinstance(part, Text))


def show_report(report: Report) -> None:
    """Print the tables and sentences of a report."""
    show(to_terminal(report))


class _CommandGroup(click.Group):
    """Group that imports a command's file when the command runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        if cmd_name not in COMMANDS:
            near = get_close_matches(cmd_name, COMMANDS, 1)
            meant = f"; did you mean '{near[0]}'?" if near else ". Run `mmoe-rec --help` to list commands."
            raise UserError(f"there is no command '{cmd_name}'{meant}")
        name = cmd_name.replace("-", "_")
        command: click.Command = getattr(import_module(f"mmoe_rec.cli.{COMMAND_FILES.get(cmd_name, name)}"), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write("""
First steps: draft settings for your log, then train and serve a model
  mmoe-rec init LOG --out NAME.yaml
  mmoe-rec train --config NAME.yaml
  mmoe-rec evaluate --config NAME.yaml --model models:/NAME@champion
  mmoe-rec serve --model models:/NAME@champion
""")


@click.group(cls=_CommandGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="mmoe-rec", message="%(version)s")
def commands() -> None:
    """Train, evaluate and serve multi-gate mixture-of-experts ranking models on interaction logs.

    `mmoe-rec COMMAND --help` describes a command. `mmoe-rec settings` lists the settings.
    """


@exit_with_message()
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the first argument names."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with commands.make_context("mmoe-rec", arguments) as context:  # `commands.main` would hide KeyboardInterrupt.
            commands.invoke(context)
    except click.exceptions.Exit as end:
        raise SystemExit(end.exit_code) from None
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        raise SystemExit(EXIT_CODE) from None
    except click.ClickException as error:
        message = error.format_message().rstrip(".")
        hint = "Run the command with --help to list options, or `mmoe-rec settings` to list settings."
        raise UserError(f"{message[:1].lower()}{message[1:]}. {hint}") from None
