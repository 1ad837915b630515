"""Serving a model of the registry, or of a folder, by our own server."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmoe_rec.inference.artifact import MANIFEST
from mmoe_rec.tracking.registry import fetch_model, find_model, pin_address

if TYPE_CHECKING:
    from mmoe_rec.live.request_log import LogOptions
    from mmoe_rec.server.limits import Limits
    from mmoe_rec.server.models import Source

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AtAddress:
    """The model at an address, which MLflow at `uri` knows; a `Finder`."""

    address: str
    uri: str

    def state(self) -> str:
        """Name and version that an alias stands for; of a folder, its manifest, and size and time of all its files.

        Of all, as a copy that is under way may be looked at: its last file changes the state once more.
        """
        permanent = pin_address(self.address, self.uri)
        return f"{permanent} {_state_of(fetch_model(permanent, self.uri))}" if Path(permanent).exists() else permanent

    def find(self) -> Source:
        """The model with its files on this machine."""
        from mmoe_rec.server.models import Source

        found = find_model(self.address, self.uri)
        return Source(found.folder.resolve(), found.address, found.run_id)


_READ = (".json", ".parquet", ".safetensors", ".yaml")  # what an artifact consists of, and loading reads or refuses


def _state_of(folder: Path) -> str:
    """What changes with an artifact folder: 64 hexadecimal digits."""
    state = hashlib.sha256()
    with suppress(OSError):
        state.update((folder / MANIFEST).read_bytes())  # files of two models may have the same sizes and times
    for path in sorted(folder.rglob("*")):
        with suppress(OSError):  # it has just been removed
            if path.suffix in _READ and (found := path.stat()):
                state.update(f"\n{path} {found.st_size} {found.st_mtime_ns}".encode(errors="surrogateescape"))
    return state.hexdigest()


def serve_model(
    address: str,
    uri: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    workers: int = 1,
    poll: float = 0.0,
    grace: float = 10.0,
    token: str | None = None,
    journal: str | None = None,
    log: LogOptions | None = None,
    overrides: Sequence[str] = (),
) -> int:
    """Serves until SIGTERM or SIGINT. Gives the exit code: 0 if all that was accepted was answered.

    Args:
        address: as `mmoe_rec.tracking.registry.find_model` takes it, at MLflow's `uri`.
        port: 0 takes a free one.
        poll: seconds between looks at whether the alias has moved; 0 does not look.
        grace: seconds from SIGTERM to the end at the latest.
        token: which callers have to show; None lets everybody in.
        journal: address of the journal that takes events and that the model learns from; None takes none.
        log: how requests are logged; None does not.
        overrides: settings of section `serving`, such as `--serving.max_elements 10`, before those of the model.

    Raises:
        UserError: an address without a model, a model that can't be loaded, a host and port that can't be taken, or a
            folder where requests can't be logged.
    """
    from mmoe_rec.live.request_log import check_folder
    from mmoe_rec.server.options import Options, listening_socket, log_to_stderr

    finder = AtAddress(address, uri)
    # Before the model is fetched and loaded, which may take minutes.
    bound = listening_socket(host, port)
    log_to_stderr()
    if journal is not None:
        _open_journal(journal)
    if log is not None:
        check_folder(log.folder)
    known = finder.state()
    source = finder.find()
    options = Options(limits_of(source.folder, overrides), grace, token, journal, log)
    if workers == 1:
        from mmoe_rec.server.running import serve

        serve(source, known, finder, bound, options, poll)
        return 0
    from mmoe_rec.server.workers import serve_by_workers

    return serve_by_workers(source, known, finder, bound, options, poll, workers)


def _open_journal(address: str) -> None:
    """Makes the journal unless it is there. Raises UserError where events can't be written to it."""
    from mmoe_rec.live.journal import Journal

    journal = Journal(address)
    if end := journal.end():
        _log.info("going on with the journal '%s', %s, at position %s", journal.name, journal.id, end)
    else:  # a mistyped address would become another journal, without what the model has learnt so far
        _log.info("the journal '%s', %s, is empty: it begins now", journal.name, journal.id)
    journal.close()


def limits_of(folder: Path, overrides: Sequence[str]) -> Limits:
    """The limits in the settings that a model was trained with, and in what overrides them. Raises UserError."""
    from mmoe_rec.server.limits import Limits
    from mmoe_rec.settings.load import load_settings, parse_overrides

    settings = load_settings(folder / "settings.yaml", overrides)
    given = set[str]()
    for (_, *name), value in parse_overrides(overrides):
        given.update(name or value)  # or the whole section
    return Limits.of(settings, given)
