"""mmoe-rec COMMAND ...: finds the command, which is imported when it is called, and words what goes wrong; and what the
commands share: settings with overrides, options that take several values, and `--help`."""

import functools
import math
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
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
    "init": "settings for a log, from its Parquet files",
    "train": "features, training, and registration of the model",
    "evaluate": "metrics of a model on the test rows, or of any system's predictions",
    "compare": "variants of settings, architectures and features over several runs",
    "baselines": "popularity and gradient-boosted trees on the same rows",
    "promote": "gives the alias to a version that is shown to be better, or back",
    "tune-weights": "weights of the tasks in the score, for a goal and with a guardrail",
    "score": "predictions, scores and ranks of a log or of candidates",
    "serve": "serves a model over HTTP",
    "join-labels": "requests that were served and what happened then, as a log",
    "check-skew": "checks for training-serving skew",
    "features": "fits features and encodes rows, or adds new days",
    "refresh": "new tables for the model that is served, and a training when one is due",
    "inspect": "the health of the log and its features",
    "report": "all that is known of the data and the model, on one page",
    "tune": "searches for better settings",
    "plan": "which rank would hold which part of the tables",
    "edit-experts": "adds, masks or removes experts of a model",
    "export": "a model in int8, or as an ONNX file",
    "settings": "lists settings with their defaults",
    "doctor": "checks the packages, the devices, MLflow and the work folder",
}
"""Command -> what it does. Its function and its file have its name, with underscores, unless `COMMAND_FILES` names the
file."""
COMMAND_FILES = {
    **dict.fromkeys(("init", "inspect"), "data"),
    **dict.fromkeys(("baselines", "promote", "tune-weights", "report"), "results"),
}
MODEL = "models:/NAME@ALIAS, runs:/..., or a model's folder"
FOLDER = click.Path(path_type=Path)


class NumberBetween(click.FloatRange):
    """A number between two others, both included, for the `type` of an option. click itself takes NaN."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"'{value}' is no number", param, ctx)
        return float(number)


COUNT = click.IntRange(min=1)

model_option = click.option("--model", required=True, metavar="M", help=MODEL)
tracking_option = click.option("--tracking.uri", "tracking_uri", metavar="U", help="MLflow's address, as in settings")
slices_option = click.option("--slices", multiple=True, metavar="S...", help="parts by COLUMN or 'bucket(COLUMN, N)'")
overrides_argument = click.argument("overrides", nargs=-1, type=click.UNPROCESSED, metavar="[--SECTION.KEY VALUE]...")


class Command(click.Command):
    """Takes `--option A B` as `--option A --option B` where an option may be repeated, and prints its text as it is.

    section: the section of settings that may be overridden, "" for all of them, None for none.
    """

    def __init__(self, *arguments: Any, section: str | None = None, **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.section = section

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if self.section is not None:  # click checks the options of a command without settings
            check_option_names(args, [name.lstrip("-") for each in self.get_params(ctx) for name in each.opts])
        return super().parse_args(ctx, list(self._repeat_options(args)))

    def _repeat_options(self, words: Iterable[str]) -> Iterator[str]:
        repeated = {name for each in self.params if getattr(each, "multiple", False) for name in each.opts}
        option: str | None = None
        rest = iter(words)
        for word in rest:
            if word in repeated:
                option = word
                yield word
                yield from islice(rest, 1)  # its value, whatever that begins with
            else:
                option = None if word.startswith("-") else option
                yield from (word,) if option is None else (option, word)

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write(f"\n{self.help}")

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.section is not None:
            named = f" {self.section}" if self.section else " [SECTION]"
            formatter.write(
                f"\nOverride a setting with --SECTION.KEY VALUE. List the settings: mmoe-rec settings{named}\n"
            )


def command(doc: str | None = None, section: str | None = None) -> Callable[[Callable[..., None]], click.Command]:
    """Makes a command of a function. doc: text of `--help` (default: the function's); section: as for `Command`.

    With a section, the command takes words that are no options of its own, as `overrides_argument`.
    """
    context = {"help_option_names": ["-h", "--help"], "max_content_width": 120}
    any_option = {"ignore_unknown_options": section is not None}
    return click.command(cls=Command, help=doc, section=section, context_settings={**context, **any_option})


def out_option(default: str, what: str = "where the report goes") -> Callable[[Any], Any]:
    """`--out DIR`, a folder that is `default` if it is not given."""
    return click.option("--out", type=FOLDER, metavar="DIR", help=f"{what} (default: {default})")


@dataclass(frozen=True)
class Configuration:
    """A settings file and what overrides it, as they were typed, and the settings."""

    file: str
    overrides: Sequence[str]
    settings: Settings

    def options(self, *words: str) -> str:
        """The options that give another command the same settings, with `words` among them, quoted for a shell."""
        return shlex.join(["--config", self.file, *words, *self.overrides])


def settings_command(doc: str | None = None, needs_file: bool = True) -> Callable[[Callable[..., None]], click.Command]:
    """Makes a command of a function, whose first argument becomes the `Configuration` of `--config` and overrides; None
    without `--config`, where the command needs no settings file."""

    def decorate(function: Callable[..., None]) -> click.Command:
        @functools.wraps(function)
        def run(
            config: str | None, overrides: tuple[str, ...], engine: str | None, skip_bad_files: bool, **options: Any
        ) -> None:
            overrides += ("--data.engine", engine) if engine else ()
            overrides += ("--data.skip_bad_files", "true") if skip_bad_files else ()
            if config is None and overrides:
                raise UserError(f"'{overrides[0]}' is no option; where it is a setting, --config is missing")
            opened = None if config is None else Configuration(config, overrides, load_settings(config, overrides))
            return function(opened, **options)

        for option in (
            click.option("--skip-bad-files", is_flag=True, help="short for --data.skip_bad_files true"),
            click.option("--engine", metavar="E", help="short for --data.engine: local or ray"),
            overrides_argument,
            click.option("--config", required=needs_file, metavar="C", help=f"settings file, such as {TEMPLATE}"),
        ):
            run = option(run)
        return command(doc, section="")(run)

    return decorate


def show(parts: Iterable[Any]) -> None:
    """Print sentences, one a line however long, and tables of rich."""
    console = open_console()
    for part in parts:
        if isinstance(part, str):
            print(part)
        else:
            console.print(part, soft_wrap=isinstance(part, Text))


def show_report(report: Report) -> None:
    """Print the tables and sentences of a report."""
    show(to_terminal(report))


class Commands(click.Group):
    """Imports a command's file when the command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        if cmd_name not in COMMANDS:
            near = get_close_matches(cmd_name, COMMANDS, 1)
            meant = f"; did you mean '{near[0]}'?" if near else "; mmoe-rec --help lists them"
            raise UserError(f"there is no command '{cmd_name}'{meant}")
        name = cmd_name.replace("-", "_")
        command: click.Command = getattr(import_module(f"mmoe_rec.cli.{COMMAND_FILES.get(cmd_name, name)}"), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write("""
First steps: settings for your log, and a model that is served
  mmoe-rec init LOG --out NAME.yaml
  mmoe-rec train --config NAME.yaml
  mmoe-rec evaluate --config NAME.yaml --model models:/NAME@champion
  mmoe-rec serve --model models:/NAME@champion
""")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="mmoe-rec", message="%(version)s")
def commands() -> None:
    """Trains and evaluates multi-gate mixture-of-experts ranking models on interaction logs.

    `mmoe-rec COMMAND --help` describes a command, and `mmoe-rec settings` the settings.
    """


@exit_with_message()
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command that the first argument names."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with commands.make_context("mmoe-rec", words) as context:  # `commands.main` would hide KeyboardInterrupt
            commands.invoke(context)
    except click.exceptions.Exit as end:
        raise SystemExit(end.exit_code) from None
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        raise SystemExit(EXIT_CODE) from None
    except click.ClickException as error:
        message = error.format_message().rstrip(".")
        raise UserError(
            f"{message[:1].lower()}{message[1:]}; --help lists the options, `mmoe-rec settings` the settings"
        ) from None
