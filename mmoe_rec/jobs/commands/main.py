"""mmoe-rec COMMAND ...

Trains and evaluates multi-gate mixture-of-experts ranking models on interaction logs. `mmoe-rec COMMAND --help`
describes a command and all settings.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

from mmoe_rec.errors import EXIT_CODE, UserError, exit_with_message
from mmoe_rec.program import FOLDERS, NAMES, TEMPLATE

_ABOUT = {
    "train": "features, training, and registration of the model",
    "evaluate": "metrics of a model on the test rows",
    "metrics": "metrics of predictions in Parquet files, of any system",
    "baselines": "popularity and gradient-boosted trees on the same rows",
    "promote": "gives the alias to a version that is shown to be better, or back",
    "tune_weights": "weights of the tasks in the score, for a goal and with a guardrail",
    "off_policy": "what another policy would have gained, from propensities",
    "score": "predictions, scores and ranks of a log or of candidates",
    "serve": "serves a model over HTTP",
    "join_outcomes": "requests that were served and what happened then, as a log",
    "replay": "compares what a server serves with what the log says",
    "features": "fits features and encodes rows, or adds new days",
    "refresh": "new tables for the model that is served, and a training when one is due",
    "inspect": "the health of the log and its features",
    "tune": "searches for better settings",
    "plan": "which rank would hold which part of the tables",
    "edit_experts": "adds, masks or removes experts of a model",
    "sweep_experts": "accuracy and speed with fewer experts",
    "export": "a model in int8, or as an ONNX file",
    "doctor": "checks this machine and its packages",
}

_FOLDERS = {"refresh": "live", "join_outcomes": "live", "replay": "live", **FOLDERS}

_FIRST_STEPS = f"""first steps: adapt a copy of {TEMPLATE}
to your log, then
  mmoe-rec features --config COPY
  mmoe-rec inspect --config COPY
  mmoe-rec train --config COPY
  mmoe-rec evaluate --config COPY --model models:/NAME@champion
"""


@exit_with_message()
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command that the first argument names."""
    words = list(sys.argv[1:] if argv is None else argv)
    modules = {name.replace("_", "-"): ".".join(filter(None, (_FOLDERS.get(name), name))) for name in NAMES}
    if words and words[0] in modules:
        import_module(f"mmoe_rec.jobs.commands.{modules[words[0]]}").main(words[1:])
        return
    parser = _parser()
    if not words:
        parser.print_help(sys.stderr)
        raise SystemExit(EXIT_CODE)
    if not words[0].startswith("-"):
        near = get_close_matches(words[0], modules, 1)
        meant = f"; did you mean '{near[0]}'?" if near else "; mmoe-rec --help lists them"
        raise UserError(f"there is no command '{words[0]}'{meant}")
    parser.parse_args(words)


def _parser() -> argparse.ArgumentParser:
    from mmoe_rec import __version__

    commands = "\n".join(f"  {name.replace('_', '-'):14} {_ABOUT[name]}" for name in NAMES)
    parser = argparse.ArgumentParser(
        prog="mmoe-rec",
        usage="mmoe-rec COMMAND ...",
        description=f"{(__doc__ or '').partition('...')[2].strip()}\n\ncommands:\n{commands}",
        epilog=_FIRST_STEPS.replace("%", "%%"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    return parser
