"""A replay: a period of the log through a running server, and all that is served beside the offline values."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from mmoe_rec.atomic import atomic_file
from mmoe_rec.errors import StoppedError, UserError
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.inference.artifact import read_artifact, version_of
from mmoe_rec.jobs.places import logs_for
from mmoe_rec.jobs.replay.client import Client
from mmoe_rec.jobs.replay.comparing import TOLERANCE, Comparison
from mmoe_rec.jobs.replay.feeding import CANDIDATES_AT_A_TIME, Feeder, Requests, steps
from mmoe_rec.jobs.replay.offline import read_period, score_period
from mmoe_rec.jobs.replay.own_server import OwnServer
from mmoe_rec.locks import writing
from mmoe_rec.log.checks import format_time
from mmoe_rec.log.given import microseconds
from mmoe_rec.log.stand_ins import require_all
from mmoe_rec.progress import say
from mmoe_rec.server.security import read_token
from mmoe_rec.settings.sections import Settings
from mmoe_rec.tracking.registry import FoundModel, find_model

REPORT, MISMATCHES = "replay.json", "mismatches.parquet"
Between = Callable[[int, OwnServer | None], None]
"""Called before each step of a replay with its number and the replay's own server; tests kill there."""


@dataclass(frozen=True)
class Asked:
    """What to replay.

    start, end: request times of the period, microseconds, the end exclusive; model: an address, or a folder; workers:
    of the replay's own server; url: of a running server instead, None for an own one; keep: a folder for the report;
    ids_only: whether requests leave attributes out; token_file: with the token of a server at `url`.
    """

    start: int
    end: int
    model: str
    workers: int = 2
    url: str | None = None
    keep: Path | None = None
    ids_only: bool = False
    token_file: str | None = None


def replay(settings: Settings, asked: Asked, between: Between | None = None) -> dict[str, Any]:
    """Replays a period; gives what `replay.json` says.

    Raises UserError for a log, a model, a period or a server that can't be used.
    """
    if asked.start >= asked.end:
        span = f"--from {format_time(asked.start)} is not before --to {format_time(asked.end)}"
        raise UserError(f"{span}, which is the end of the period and not part of it")
    require_all(settings.schema_, "a replay")
    token = read_token(asked.token_file)
    found = find_model(asked.model, settings.tracking.address)
    read_artifact(found.folder)  # which says what is wrong with a damaged one
    folder = Path(settings.data.work) / "replay"
    with writing(folder, "a replay", "set `data.work` to another folder"), _ended_by_sigterm():
        shutil.rmtree(folder, ignore_errors=True)  # what a killed one has left
        folder.mkdir(parents=True)
        try:
            return _Replay(settings, asked, found, folder, token, between).run()
        except KeyboardInterrupt:
            raise StoppedError("nothing of this replay is kept") from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class _Replay:
    """One run. folder: of its own, empty."""

    def __init__(
        self,
        settings: Settings,
        asked: Asked,
        found: FoundModel,
        folder: Path,
        token: str | None,
        between: Between | None,
    ) -> None:
        self.settings, self.asked, self.found = settings, asked, found
        self.folder, self.token, self.between = folder, token, between

    def run(self) -> dict[str, Any]:
        from mmoe_rec.inference.loaded import LoadedRanker

        pipeline = FeaturePipeline.load(self.found.folder / "features", memories=False)
        window = self.asked.start, self.asked.end
        period = read_period(logs_for(self.settings, pipeline), pipeline, window, self._new("offline"))
        shutil.rmtree(self.folder / "offline")
        ranker = LoadedRanker.read(self.found.folder)
        predictions, scores = score_period(ranker, period.rows)
        layout, most = ranker.layout, min(CANDIDATES_AT_A_TIME, ranker.about.max_candidates)
        del ranker
        requests = Requests(period, pipeline.schema, self.asked.ids_only, most)
        for column, count in requests.differing().items():
            say(
                f"note: the rows of {count:,} requests differ in column '{column}', of which a request has one value: "
                "that of its first row is sent"
            )
        for column, (ids, rows) in requests.changed().items():
            say(
                f"note: in {rows:,} rows column '{column}' holds another value than in the row of the same {ids} "
                "before, the one that a server knows: what it decides will differ there"
            )
        with ExitStack() as stack:
            server, url = None, self.asked.url
            if url is None:
                server = stack.enter_context(self._server())
                url = server.url
            client = stack.enter_context(Client(url, self.token, check=None if server is None else server.check))
            version = client.version()
            if (known := version.get("tables_as_of")) is not None and microseconds("", known) >= self.asked.start:
                raise UserError(
                    f"the tables of the server at {url} are as of {known}, after {format_time(self.asked.start)}, with "
                    "which the period begins: they know its future, so nothing was sent"
                )
            report = stack.enter_context(self._kept(MISMATCHES))
            comparison = stack.enter_context(Comparison(pipeline, layout, period, predictions, scores, report))
            feeder = Feeder(client, requests, comparison, self.asked.workers, self._hook(server))
            began = time.monotonic()
            with _telling(server):
                feeder.feed(steps(period), len(period.rows))
            seconds = time.monotonic() - began
        tree = {
            "model": self.found.address,
            "model_version": version_of(self.found.folder),
            "server": version,
            "from": format_time(self.asked.start),
            "to": format_time(self.asked.end),
            "ids_only": self.asked.ids_only,
            "requests": len(period.times),
            "rows": len(period.rows),
            "events": {log.name: len(log.times) for log in period.events},
            "sent": vars(feeder.sent),
            "sent_again": client.again,
            "seconds": round(seconds, 3),
            "tolerance": TOLERANCE,
            **comparison.to_dict(),
        }
        if self.asked.keep is not None:
            with atomic_file(self.asked.keep / REPORT) as path:
                path.write_text(json.dumps(tree, indent=1, ensure_ascii=False), encoding="utf-8")
        return tree

    def _new(self, name: str) -> Path:
        folder = self.folder / name
        folder.mkdir()
        return folder

    def _server(self) -> OwnServer:
        from mmoe_rec.jobs.refreshing.new_tables import tables_from_log

        frozen = self.folder / "model"
        tables_from_log(self.found.folder, self.settings, self.asked.start, frozen)
        journal = self._new("journal")
        return OwnServer(frozen, journal, self.folder / "server.log", self.asked.workers)

    def _hook(self, server: OwnServer | None) -> Callable[[int], None]:
        def called(step: int) -> None:
            if self.between is not None:
                self.between(step, server)
            if server is not None:
                server.check()

        return called

    @contextmanager
    def _kept(self, name: str) -> Iterator[Path | None]:
        if self.asked.keep is None:
            yield None
            return
        self.asked.keep.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.asked.keep / name) as path:
            yield path


@contextmanager
def _telling(server: OwnServer | None) -> Iterator[None]:
    """Adds to an error what the replay's own server has said last, as nothing of it is kept."""
    try:
        yield
    except UserError as error:
        if server is None:
            raise
        raise UserError(f"{error}; {server.told()}") from None


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends what is within as Ctrl-C does, so that the server is ended too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
