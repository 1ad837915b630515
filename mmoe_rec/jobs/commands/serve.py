"""python -m pipelines.serve --model models:/complete_journey@champion

Serves a model over HTTP: POST /invocations ranks, as MLflow's server does; GET /health, /version, /metrics and
/openapi.json tell about it; mmoe_rec/server/README.md is its guide. It ends with SIGTERM or Ctrl-C, once what was
accepted is answered.

--log-requests writes a share of requests and replies into a folder, as Parquet, from which `python -m
pipelines.join_outcomes` makes a log to train on.

Where MMOE_REC_TOKEN stands in the environment, or --token-file is given, callers must send
`Authorization: Bearer TOKEN`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmoe_rec.errors import UserError, exit_with_message
from mmoe_rec.jobs.commands.command import SentenceParser, count, number_between
from mmoe_rec.program import spelled
from mmoe_rec.settings.help import describe
from mmoe_rec.settings.load import parse_overrides

if TYPE_CHECKING:
    from mmoe_rec.request_log.folder import LogOptions


@exit_with_message()
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    arguments, overrides = _parser().parse_known_args(sys.argv[1:] if argv is None else argv)
    for keys, _ in parse_overrides(overrides):
        if keys[0] != "serving":
            raise UserError(
                f"'--{'.'.join(keys)}' is no argument of serve, nor a setting of section serving; see --help"
            )
    from mmoe_rec.jobs.serve import serve_model
    from mmoe_rec.server.options import end_process
    from mmoe_rec.server.security import read_token
    from mmoe_rec.settings.sections import Tracking

    code = serve_model(
        arguments.model,
        Tracking(uri=arguments.tracking_uri).address,
        host=arguments.host,
        port=arguments.port,
        workers=arguments.workers,
        poll=arguments.poll,
        grace=arguments.grace,
        token=read_token(arguments.token_file),
        journal=arguments.journal,
        log=_log_options(arguments),
        overrides=overrides,
    )
    end_process(code)


def _parser() -> argparse.ArgumentParser:
    doc = spelled(__doc__ or "")
    settings = "settings, which else are those that the model was trained with:\n" + describe("serving")
    parser = SentenceParser(
        prog=spelled(" ".join((__doc__ or "").split()[:3])),
        description=doc,
        epilog=spelled(settings),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="M", help="models:/NAME@ALIAS, runs:/..., or a model's folder")
    add(
        "--tracking.uri",
        dest="tracking_uri",
        metavar="U",
        help="MLflow's address (default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db)",
    )
    add("--host", default="127.0.0.1", metavar="H", help="default: %(default)s, this machine alone; 0.0.0.0 is all")
    add("--port", type=_port, default=8000, metavar="P", help="default: %(default)s; 0 takes a free one")
    add("--workers", type=count, default=1, metavar="N", help="processes that share the model (default: %(default)s)")
    day = number_between(0, 86_400)
    add(
        "--poll",
        type=day,
        default=0.0,
        metavar="S",
        help="look every S seconds whether the alias has moved, and take up the new model (default: 0, never)",
    )
    add(
        "--grace",
        type=number_between(1, 3_600),
        default=10.0,
        metavar="S",
        help="seconds from SIGTERM to the end, whatever is under way (default: 10)",
    )
    add(
        "--journal",
        metavar="A",
        help="address of a journal, such as sqlite:///journal.db, made if it is not there: take events (POST /events), "
        "which the model learns live",
    )
    add("--token-file", metavar="F", help="file with the token that callers must send (default: MMOE_REC_TOKEN)")
    add("--log-requests", metavar="DIR", help="log requests and replies there (default: they are not)")
    add("--log-share", type=number_between(0, 1), metavar="S", help="share of requests that are logged (default: 0.1)")
    add("--log-seconds", type=number_between(1, 86_400), metavar="S", help="seconds between files (default: 300)")
    size = number_between(0.001, 1e6)
    add("--log-gib", type=size, metavar="G", help="remove the oldest files beyond this size, GiB (default: keep all)")
    return parser


def _log_options(arguments: argparse.Namespace) -> LogOptions | None:
    from mmoe_rec.request_log.folder import LogOptions

    given = {name: getattr(arguments, f"log_{name}") for name in ("share", "seconds", "gib")}
    given = {name: value for name, value in given.items() if value is not None}
    if arguments.log_requests is None:
        if given:
            raise UserError(f"--log-{next(iter(given))} says how requests are logged: give --log-requests DIR as well")
        return None
    most = {"most_bytes": round(given.pop("gib") * 2**30)} if "gib" in given else {}
    return LogOptions(Path(arguments.log_requests).resolve(), **given, **most)


def _port(text: str) -> int:
    return int(number_between(0, 65_535)(text))
