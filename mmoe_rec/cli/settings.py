"""Command `settings`, which lists the settings."""

import os
import sys

import click

from mmoe_rec.cli.main import command
from mmoe_rec.settings.load import describe_settings
from mmoe_rec.settings.sections import Settings


@command()
@click.argument("section", required=False, type=click.Choice(list(Settings.model_fields)), metavar="[SECTION]")
def settings(section: str | None) -> None:
    """mmoe-rec settings
    mmoe-rec settings training

    List the settings with their types, defaults and descriptions. Name a section to list only its settings. Write a
    setting into the YAML file, or override it as --SECTION.KEY VALUE.
    """
    try:
        print(describe_settings(section), flush=True)
    except BrokenPipeError:  # A reader such as `head` has ended. Prevent Python's error message at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
