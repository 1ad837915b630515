"""mmoe-rec COMMAND ...

Trains and evaluates multi-gate mixture-of-experts ranking models on interaction logs. `mmoe-rec COMMAND --help`
describes a command and all settings.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from mmoe_rec.program import NAMES

_ABOUT = {
    "train": "features, training, and registration of the model",
    "evaluate": "metrics of a model on the test rows",
    "features": "fits features and encodes rows, or adds new days",
    "inspect": "the health of the log and its features",
    "tune": "searches for better settings",
    "plan": "which rank would hold which part of the tables",
    "edit_experts": "adds, masks or removes experts of a model",
    "sweep_experts": "accuracy and speed with fewer experts",
    "doctor": "checks this machine and its packages",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command that the first argument names."""
    words = list(sys.argv[1:] if argv is None else argv)
    given = [name.replace("_", "-") for name in NAMES]
    if not words or words[0] not in given:
        from mmoe_rec import __version__

        commands = "\n".join(f"  {name:14} {_ABOUT[module]}" for name, module in zip(given, NAMES, strict=True))
        parser = argparse.ArgumentParser(
            prog="mmoe-rec",
            description=f"{(__doc__ or '').partition('...')[2].strip()}\n\ncommands:\n{commands}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            usage="mmoe-rec COMMAND ...",
        )
        parser.add_argument("--version", action="version", version=__version__)
        parser.add_argument("command", choices=given, metavar="COMMAND", help="one of those above")
        parser.parse_args(words)
    name, *rest = words
    import_module(f"mmoe_rec.jobs.commands.{name.replace('-', '_')}").main(rest)
