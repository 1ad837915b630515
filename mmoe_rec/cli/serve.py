"""mmoe-rec serve --model models:/complete_journey@champion

Serves a model over HTTP: POST /invocations ranks, as MLflow's server does; GET /health, /version, /metrics and
/openapi.json tell about it; mmoe_rec/server/README.md is its guide. It ends with SIGTERM or Ctrl-C, once what was
accepted is answered.

--log-requests writes a share of requests and replies into a folder, as Parquet, from which `mmoe-rec join-outcomes`
makes a log to train on.

Where MMOE_REC_TOKEN stands in the environment, or --token-file is given, callers must send
`Authorization: Bearer TOKEN`. Settings of section serving are those that the model was trained with; overrides may
follow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mmoe_rec.cli.command import COUNT, FOLDER, NumberBetween, model_option, overrides_argument
from mmoe_rec.cli.main import command
from mmoe_rec.errors import UserError, require_packages
from mmoe_rec.settings.load import parse_overrides


@command(__doc__, section="serving")
@model_option
@click.option(
    "--tracking.uri",
    "tracking_uri",
    metavar="U",
    help="MLflow's address (default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db)",
)
@click.option("--host", default="127.0.0.1", metavar="H", help="default: 127.0.0.1, this machine alone; 0.0.0.0 is all")
@click.option(
    "--port", type=click.IntRange(0, 65_535), default=8000, metavar="P", help="default: 8000; 0 takes a free one"
)
@click.option("--workers", type=COUNT, default=1, metavar="N", help="processes that share the model (default: 1)")
@click.option(
    "--poll",
    type=NumberBetween(0, 86_400),
    default=0.0,
    metavar="S",
    help="look every S seconds whether the alias has moved, and take up the new model (default: 0, never)",
)
@click.option(
    "--grace",
    type=NumberBetween(1, 3_600),
    default=10.0,
    metavar="S",
    help="seconds from SIGTERM to the end, whatever is under way (default: 10)",
)
@click.option(
    "--journal",
    metavar="A",
    help="address of a journal, such as sqlite:///journal.db, made if it is not there: take events (POST /events), "
    "which the model learns live",
)
@click.option("--token-file", metavar="F", help="file with the token that callers must send (default: MMOE_REC_TOKEN)")
@click.option("--log-requests", type=FOLDER, metavar="DIR", help="log requests and replies there (default: not)")
@click.option(
    "--log-share", type=NumberBetween(0, 1), metavar="S", help="share of requests that are logged (default: 0.1)"
)
@click.option("--log-seconds", type=NumberBetween(1, 86_400), metavar="S", help="seconds between files (default: 300)")
@click.option(
    "--log-gib",
    type=NumberBetween(0.001, 1e6),
    metavar="G",
    help="remove the oldest files beyond this size, GiB (default: keep all)",
)
@overrides_argument
def serve(
    model: str,
    tracking_uri: str | None,
    host: str,
    port: int,
    workers: int,
    poll: float,
    grace: float,
    journal: str | None,
    token_file: str | None,
    log_requests: Path | None,
    log_share: float | None,
    log_seconds: float | None,
    log_gib: float | None,
    overrides: tuple[str, ...],
) -> None:
    """Runs the command."""
    for keys, _ in parse_overrides(overrides):
        if keys[0] != "serving":
            raise UserError(f"'--{'.'.join(keys)}' is no option of serve, nor a setting of section serving; see --help")
    require_packages("mmoe-rec serve", "serve", "uvicorn", "fastapi", "orjson", "httptools", "prometheus_client")
    from mmoe_rec.jobs.serve import serve_model
    from mmoe_rec.live.request_log import LogOptions
    from mmoe_rec.server.options import end_process, read_token
    from mmoe_rec.settings.sections import Tracking

    given: dict[str, Any] = {
        "share": log_share,
        "seconds": log_seconds,
        "most_bytes": log_gib and round(log_gib * 2**30),
    }
    given = {name: value for name, value in given.items() if value is not None}
    if given and log_requests is None:
        raise UserError("--log-share, --log-seconds and --log-gib need --log-requests DIR, which is missing")
    code = serve_model(
        model,
        Tracking(uri=tracking_uri).address,
        host=host,
        port=port,
        workers=workers,
        poll=poll,
        grace=grace,
        token=read_token(token_file),
        journal=journal,
        log=None if log_requests is None else LogOptions(log_requests.resolve(), **given),
        overrides=list(overrides),
    )
    end_process(code)
