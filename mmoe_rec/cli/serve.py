"""mmoe-rec serve --model models:/complete_journey@champion

Serves a model over HTTP: POST /invocations ranks, as MLflow's server does; GET /health, /version, /metrics and
/openapi.json tell about it; mmoe_rec/server/README.md is its guide. It ends with SIGTERM, SIGHUP or Ctrl-C, once what
was accepted is answered. --drain-seconds S makes /health answer 503 for S seconds before that, in which callers are
still served, so that a load balancer can send them elsewhere.

--log-requests writes a share of requests and replies into a folder, as Parquet, from which `mmoe-rec join-labels`
makes a log to train on. --poll S looks every S seconds whether the alias has moved, and takes the new model up.

Where MMOE_REC_TOKEN stands in the environment, or --token-file is given, callers must send
`Authorization: Bearer TOKEN`. Without a token, a server on 127.0.0.1 refuses unknown names in the header Host.
--allow-host adds names.

Settings of section serving are the model's own; overrides may follow.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mmoe_rec.cli.main import COUNT, FOLDER, NumberBetween, command, model_option, overrides_argument, tracking_option
from mmoe_rec.errors import UserError, require_packages
from mmoe_rec.settings.load import load_settings, parse_overrides
from mmoe_rec.settings.sections import Serving

if TYPE_CHECKING:
    from mmoe_rec.inference.artifact import ResolvedModel

TOKEN_VARIABLE = "MMOE_REC_TOKEN"
_OF_MODELS = ("max_candidates", "stale_after_days", "matmul_backend")  # settings that each model has for itself
_READ = (".json", ".parquet", ".safetensors", ".yaml")  # what an artifact consists of, and loading reads or refuses


@command(__doc__, section="serving")
@model_option
@tracking_option
@click.option("--host", default="127.0.0.1", metavar="H", help="default: 127.0.0.1, this machine alone; 0.0.0.0 is all")
@click.option("--port", type=click.IntRange(0, 65_535), default=8000, metavar="P", help="default: 8000; 0: a free one")
@click.option("--workers", type=COUNT, default=1, metavar="N", help="processes that share the model (default: 1)")
@click.option("--poll", type=NumberBetween(0, 86_400), default=0.0, metavar="S", help="seconds between looks (0: none)")
@click.option(
    "--grace",
    type=NumberBetween(1, 3_600),
    default=10.0,
    metavar="S",
    help="seconds to end in, after the drain (10)",
)
@click.option(
    "--drain-seconds",
    type=NumberBetween(0, 3_600),
    default=0.0,
    metavar="S",
    help="seconds of failing /health before the port closes (default: 0)",
)
@click.option("--journal", metavar="A", help="take events into a journal, such as sqlite:///journal.db")
@click.option("--token-file", metavar="F", help="file with the token that callers must send (default: MMOE_REC_TOKEN)")
@click.option("--allow-host", multiple=True, metavar="NAME", help="further name in header Host, such as a proxy's")
@click.option("--log-requests", type=FOLDER, metavar="DIR", help="log requests and replies there (default: not)")
@click.option("--log-fraction", type=NumberBetween(0, 1), metavar="S", help="share of requests that are logged (0.1)")
@click.option("--log-seconds", type=NumberBetween(1, 86_400), metavar="S", help="seconds between files (default: 300)")
@overrides_argument
def serve(
    model: str,
    tracking_uri: str | None,
    host: str,
    port: int,
    workers: int,
    poll: float,
    grace: float,
    drain_seconds: float,
    journal: str | None,
    token_file: str | None,
    allow_host: tuple[str, ...],
    log_requests: Path | None,
    log_fraction: float | None,
    log_seconds: float | None,
    overrides: tuple[str, ...],
) -> None:
    """Runs the command. Its exit code is 0 if all that was accepted was answered."""
    for keys, _ in parse_overrides(overrides):
        if keys[0] != "serving":
            raise UserError(f"'--{'.'.join(keys)}' is no option of serve, nor a setting of section serving; see --help")
    require_packages("mmoe-rec serve", "serve", "uvicorn", "starlette", "orjson", "httptools", "prometheus_client")
    from mmoe_rec.live.request_log import RequestLogOptions, check_log_folder
    from mmoe_rec.server.options import ServerOptions, bind_socket, log_to_stderr
    from mmoe_rec.settings.sections import Tracking

    given: dict[str, Any] = {"fraction": log_fraction, "flush_seconds": log_seconds}
    given = {name: value for name, value in given.items() if value is not None}
    if given and log_requests is None:
        raise UserError("--log-fraction and --log-seconds need --log-requests DIR, which is missing")
    token = read_token(token_file)
    log = None if log_requests is None else RequestLogOptions(log_requests.resolve(), **given)
    finder = UriFinder(model, Tracking(uri=tracking_uri).resolved_uri)
    # Before the model is fetched and loaded, which may take minutes.
    bound = bind_socket(host, port)
    log_to_stderr()
    is_local = ip_address(bound.getsockname()[0]).is_loopback
    if token is None and not is_local:
        sentence = "whoever reaches this machine may rank, send events and reload, as there is no token"
        logging.getLogger(__name__).warning("--host %s: %s. Set %s.", host, sentence, TOKEN_VARIABLE)
    # A web page may give this machine a name of the page's own, but not one of these.
    names = frozenset(name.lower() for name in ("localhost", "127.0.0.1", "::1", host, *allow_host))
    hosts = names if is_local or allow_host else None
    if journal is not None:
        _open_journal(journal)
    if log is not None:
        check_log_folder(log.folder)
    known, source = finder.fingerprint(), finder.find()
    limits, setting_overrides = read_serving_settings(source.folder, list(overrides))
    options = ServerOptions(limits, setting_overrides, grace, token, journal, log, hosts, drain_seconds)
    from mmoe_rec.server.workers import serve_by_workers

    raise SystemExit(serve_by_workers(source, known, finder, bound, options, poll, workers))


@dataclass(frozen=True)
class UriFinder:
    """The model at an address, which MLflow at `uri` knows; a `ModelFinder`."""

    model_uri: str
    tracking_uri: str

    def fingerprint(self) -> str | None:
        """Name and version that an alias stands for; of a folder, its manifest, and size and time of all its files; of
        other addresses, None.

        Of all, as a copy that is under way may be looked at: its last file changes the state once more.
        """
        from mmoe_rec.inference.artifact import MANIFEST_FILE
        from mmoe_rec.tracking.registry import fetch_model, pin_model_uri

        permanent = pin_model_uri(self.model_uri, self.tracking_uri)
        if not Path(permanent).exists():
            return permanent if permanent.startswith("models:/") else None
        folder, state = fetch_model(permanent, self.tracking_uri), hashlib.sha256()
        with suppress(OSError):
            state.update((folder / MANIFEST_FILE).read_bytes())  # files of two models may have the same sizes and times
        for path in sorted(folder.rglob("*")):
            with suppress(OSError):  # it has just been removed
                if path.suffix in _READ and (found := path.stat()):
                    state.update(f"\n{path} {found.st_size} {found.st_mtime_ns}".encode(errors="surrogateescape"))
        return f"{permanent} {state.hexdigest()}"

    def find(self) -> ResolvedModel:
        """The model with its files on this machine."""
        from mmoe_rec.tracking.registry import resolve_model

        found = resolve_model(self.model_uri, self.tracking_uri)
        return replace(found, folder=found.folder.resolve())


def _open_journal(uri: str) -> None:
    """Makes the journal unless it is there. Raises UserError where events can't be written to it."""
    from mmoe_rec.live.journal import Journal

    journal, log = Journal(uri), logging.getLogger(__name__)
    if last_position := journal.last_position():
        log.info("going on with the journal '%s', %s, at position %s", journal.name, journal.id, last_position)
    else:  # a mistyped address would become another journal, without what the model has learnt so far
        log.info("the journal '%s', %s, is empty: it begins now", journal.name, journal.id)
    journal.close()


def read_serving_settings(folder: Path, overrides: Sequence[str]) -> tuple[Serving, dict[str, Any]]:
    """The section `serving` of the settings that a model was trained with, and of overrides; and what these alone say
    of settings that each model has for itself, which goes for models that are loaded later, too. Raises UserError."""
    serving, given = load_settings(folder / "settings.yaml", overrides).serving, set[str]()
    for (_, *name), value in parse_overrides(overrides):
        given.update(name or value)  # or the whole section
    return serving, {name: getattr(serving, name) for name in _OF_MODELS if name in given}


def read_token(file: str | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """The token in a file, else in the environment; None where there is neither.

    It is no argument of the command, as any user of the machine can list those. Raises UserError for a file that can't
    be read, and for an empty token.
    """
    if file is None:
        token, where = environment.get(TOKEN_VARIABLE), TOKEN_VARIABLE
    else:
        where = f"'{file}'"
        try:
            token = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"the token file '{file}' can't be read: {error}") from None
    if token is not None and not token.strip():
        raise UserError(f"the token in {where} is empty; give one, or leave it out to let everybody in")
    return None if token is None else token.strip()
