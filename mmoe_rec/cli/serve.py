"""mmoe-rec serve --model models:/complete_journey@champion

Serve a model over HTTP. POST /invocations ranks candidates, as in MLflow's server. GET /health, /version, /metrics and
/openapi.json describe the server. For details, see docs/how-to/serve-with-mmoe-rec.md. SIGTERM, SIGHUP and Ctrl-C end
the server once it has answered all accepted calls. --drain-seconds S first makes /health answer 503 for S seconds while
the server still answers calls. A load balancer can then send calls elsewhere.

--log-requests writes a fraction of requests and replies to a folder, as Parquet. `mmoe-rec join-labels` turns the
folder into a log for training. --poll S checks every S seconds whether the alias has moved, and loads the new model.

If MMOE_REC_TOKEN is set or --token-file is given, callers must send `Authorization: Bearer TOKEN`. Without a token, a
server on 127.0.0.1 rejects unknown names in the header Host. --allow-host adds names.

Settings of section serving come from the model. Override them on the command line.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
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
_MODEL_SETTINGS = ("max_candidates", "stale_after_days", "matmul_backend")  # Each model has values of its own.
_ARTIFACT_SUFFIXES = (".json", ".parquet", ".safetensors", ".yaml")  # Files that loading an artifact reads or rejects.


@command(__doc__, section="serving")
@model_option
@tracking_option
@click.option("--host", default="127.0.0.1", metavar="H", help="address, 0.0.0.0 for all (default: 127.0.0.1)")
@click.option("--port", type=click.IntRange(0, 65_535), default=8000, metavar="P", help="port, 0: any (default: 8000)")
@click.option("--workers", type=COUNT, default=1, metavar="N", help="number of processes (default: 1)")
@click.option("--poll", type=NumberBetween(0, 86_400), default=0.0, metavar="S", help="seconds between checks (0: off)")
@click.option(
    "--grace",
    type=NumberBetween(1, 3_600),
    default=10.0,
    metavar="S",
    help="seconds to finish accepted calls after the drain (default: 10)",
)
@click.option(
    "--drain-seconds",
    type=NumberBetween(0, 3_600),
    default=0.0,
    metavar="S",
    help="seconds during which /health fails before the port closes (default: 0)",
)
@click.option("--journal", metavar="A", help="URI of a journal of events, such as sqlite:///journal.db")
@click.option("--token-file", metavar="F", help="file with the callers' token (default: MMOE_REC_TOKEN)")
@click.option("--allow-host", multiple=True, metavar="NAME", help="accepted name in header Host, such as a proxy's")
@click.option("--log-requests", type=FOLDER, metavar="DIR", help="folder for logged requests and replies")
@click.option(
    "--log-fraction", type=NumberBetween(0, 1), metavar="S", help="fraction of requests to log (default: 0.1)"
)
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
    """Run the command, which exits with code 0 if all accepted calls were answered."""
    for keys, _ in parse_overrides(overrides):
        if keys[0] != "serving":
            raise UserError(f"'--{'.'.join(keys)}' is neither an option nor a setting of section serving. See --help.")
    require_packages("mmoe-rec serve", "serve", "uvicorn", "starlette", "orjson", "httptools", "prometheus_client")
    from mmoe_rec.live.request_log import RequestLogOptions, check_log_folder
    from mmoe_rec.server.options import ServerOptions, bind_socket, log_to_stderr
    from mmoe_rec.settings.sections import Tracking

    log_options: dict[str, Any] = {"fraction": log_fraction, "flush_seconds": log_seconds}
    log_options = {name: value for name, value in log_options.items() if value is not None}
    if log_options and log_requests is None:
        raise UserError("--log-fraction and --log-seconds require --log-requests. Add --log-requests DIR.")
    token = _read_token(token_file)
    log = None if log_requests is None else RequestLogOptions(log_requests.resolve(), **log_options)
    finder = UriFinder(model, Tracking(uri=tracking_uri).resolved_uri)
    # Bind the port before loading the model, which may take minutes.
    bound = bind_socket(host, port)
    log_to_stderr()
    is_local = ip_address(bound.getsockname()[0]).is_loopback
    if token is None and not is_local:
        warning = "without a token, anyone who reaches this machine can rank, send events and reload"
        logging.getLogger(__name__).warning("--host %s: %s. Set %s.", host, warning, TOKEN_VARIABLE)
    # Prevent DNS rebinding. Accept only these names in the header Host.
    local_names = frozenset(name.lower() for name in ("localhost", "127.0.0.1", "::1", host, *allow_host))
    allowed_hosts = local_names if is_local or allow_host else None
    if journal is not None:
        _open_journal(journal)
    if log is not None:
        check_log_folder(log.folder)
    fingerprint, source = finder.fingerprint(), finder.find()
    limits, setting_overrides = read_serving_settings(source.folder, list(overrides))
    options = ServerOptions(limits, setting_overrides, grace, token, journal, log, allowed_hosts, drain_seconds)
    from mmoe_rec.server.workers import serve_by_workers

    raise SystemExit(serve_by_workers(source, fingerprint, finder, bound, options, poll, workers))


@dataclass(frozen=True)
class UriFinder:
    """`ModelFinder` for the model at a URI, which may be in a registry."""

    model_uri: str
    tracking_uri: str

    def fingerprint(self) -> str | None:
        """Return a string that changes when the model at the URI changes.

        For an alias, the string is the version. For a folder, it's a hash of the manifest, and of the size and time of
        all files, so that each file of a running copy changes it. For other URIs, it's None.
        """
        from mmoe_rec.inference.artifact import MANIFEST_FILE
        from mmoe_rec.tracking.registry import fetch_model, pin_model_uri

        pinned_uri = pin_model_uri(self.model_uri, self.tracking_uri)
        if not Path(pinned_uri).exists():
            return pinned_uri if pinned_uri.startswith("models:/") else None
        folder, digest = fetch_model(pinned_uri, self.tracking_uri), hashlib.sha256()
        with suppress(OSError):
            digest.update((folder / MANIFEST_FILE).read_bytes())  # Two models may have files of equal size and time.
        for path in sorted(folder.rglob("*")):
            with suppress(OSError):  # The file was just removed.
                if path.suffix in _ARTIFACT_SUFFIXES and (status := path.stat()):
                    digest.update(f"\n{path} {status.st_size} {status.st_mtime_ns}".encode(errors="surrogateescape"))
        return f"{pinned_uri} {digest.hexdigest()}"

    def find(self) -> ResolvedModel:
        """Return the model with its files on this machine."""
        from mmoe_rec.tracking.registry import resolve_model

        model = resolve_model(self.model_uri, self.tracking_uri)
        return replace(model, folder=model.folder.resolve())


def _open_journal(uri: str) -> None:
    """Create the journal if it is missing, or raise UserError if events can't be written to it."""
    from mmoe_rec.live.journal import Journal

    journal, log = Journal(uri), logging.getLogger(__name__)
    if last_position := journal.last_position():
        log.info("continuing journal '%s' (%s) at position %s", journal.name, journal.id, last_position)
    else:  # Report it, since a mistyped URI creates another journal, without earlier events.
        log.info("journal '%s' (%s) is empty", journal.name, journal.id)
    journal.close()


def read_serving_settings(folder: Path, overrides: Sequence[str]) -> tuple[Serving, dict[str, Any]]:
    """Return the section `serving` for a model and the overrides that apply to later models too.

    Args:
        folder: Folder of the model, whose settings the overrides change.
        overrides: Options that override settings.

    Returns:
        The section, and the overridden values of the settings that otherwise differ by model.

    Raises:
        UserError: An override is invalid.
    """
    serving, overridden = load_settings(folder / "settings.yaml", overrides).serving, set[str]()
    for (_, *name), value in parse_overrides(overrides):
        overridden.update(name or value)  # An override without a name replaces the whole section.
    return serving, {name: getattr(serving, name) for name in _MODEL_SETTINGS if name in overridden}


def _read_token(file: str | None) -> str | None:
    """Return the token from the file or else the environment, if any. An option would be visible in process lists."""
    if file is None:
        token, source = os.environ.get(TOKEN_VARIABLE), TOKEN_VARIABLE
    else:
        source = f"'{file}'"
        try:
            token = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"the token file '{file}' can't be read: {error}") from None
    if token is not None and not token.strip():
        raise UserError(f"the token in {source} is empty. Set a token, or remove {source} to allow all callers.")
    return None if token is None else token.strip()
