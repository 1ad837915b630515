"""mmoe-rec settings [SECTION]: list the settings."""

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

    List each setting with its type, default and meaning. A setting stands in the YAML file, or overrides the file as
    --SECTION.KEY VALUE. Name a section to list its settings alone.
    """
    try:
        print(describe_settings(section), flush=True)
    except BrokenPipeError:  # a reader such as `head` ended: Python would complain at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
