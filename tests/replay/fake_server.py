"""A server in this process that learns events: a ranker whose memories are extended by each batch, as a build would."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pyarrow as pa

from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.inference.loaded import LoadedRanker
from mmoe_rec.inference.ranking import Ranking
from mmoe_rec.inference.requests.envelope import ranked
from mmoe_rec.log.columns import canonical, event_uses
from mmoe_rec.log.reader import EventRows, Log
from mmoe_rec.log.rows import LogRows
from mmoe_rec.settings.columns import EVENT
from tests.inference.small_model import SmallModel
from tests.log.small_logs import log_rows

Trouble = Callable[[str], int | None]
"""The status with which a page is refused; 0 closes the connection once all was done, None answers."""


class FakeServer:
    """Serves a model that knows the log's rows and events before a moment, and learns what it is sent.

    trouble: asked before each reply; spoil: changes a ranking before it is sent; seen: pages that were asked for.
    """

    def __init__(self, small: SmallModel, start: int) -> None:
        self.ranker = LoadedRanker.read(small.folder)
        self.pipeline, self.schema = self.ranker.pipeline, self.ranker.pipeline.schema
        fresh = FeaturePipeline(self.schema).memory_encoders
        for name, encoder in self.pipeline.memory_encoders.items():
            encoder.memory = fresh[name].memory.with_room(encoder.memory.units) if encoder.label else fresh[name].memory
        log = Log(small.settings.data.log, small.settings.schema_)
        for rows in log.stream():
            self._learn(None, rows.filter(rows.times() < start))
        for name in self.schema.events:
            for rows in EventRows(name, log).stream():
                self._learn(name, rows.filter(rows.times() < start))
        self.trouble: Trouble = lambda page: None
        self.spoil: Callable[[dict[str, Any]], None] = lambda ranking: None
        self.events, self.seen, self._known, self._lock = 0, [], set(), threading.Lock()

    def _learn(self, source: str | None, rows: LogRows) -> None:
        for encoder in self.pipeline.memory_encoders.values():
            if encoder.source == source and len(rows):
                encoder.memory = encoder.extended(encoder.memory, encoder.events(rows))

    def post(self, page: str, kind: str, body: bytes) -> dict[str, Any]:
        """The reply to a call."""
        parts = urlsplit(page)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        with self._lock:
            if parts.path == "/events":
                assert kind == "application/vnd.apache.arrow.stream"
                table = pa.ipc.open_stream(body).read_all()
                self._take(query.get("log"), table)
                return {"accepted": len(table), "late": 0, "out_of_order": 0, "position": f"1-{self.events}"}
            # Nothing is asked for before all that was accepted is known.
            assert query.get("after") in (None, f"1-{self.events}")
            tree = json.loads(body)
            (ranking,) = ranked(self.ranker, tree["inputs"], tree["params"])
            assert isinstance(ranking, Ranking), ranking
            found = ranking.to_dict()
            self.spoil(found)
            return {"predictions": [found]}

    def _take(self, log: str | None, table: pa.Table) -> None:
        """Learns rows that are new."""
        if log is None:
            rows = log_rows(table, self.schema)
            keys = list(
                zip(rows.request_hashes().tolist(), table[self.schema.columns.candidate].to_pylist(), strict=True)
            )
        else:
            named = {name: canonical(name, use, table[name]) for name, use in event_uses(self.schema, log).items()}
            named[self.schema.columns.time] = named.pop(self.schema.events[log].time)
            rows = LogRows(pa.table({**named, EVENT.label: pa.array([1.0] * len(table))}), self.schema)
            keys = [(log, each) for each in table["event_id"].to_pylist()]
        new = [place for place, key in enumerate(keys) if key not in self._known]
        self._known |= set(keys)
        self._learn(log, LogRows(rows.table.take(pa.array(new, pa.int64())), self.schema))
        self.events += len(table)


@contextmanager
def served(fake: FakeServer) -> Iterator[str]:
    """The address at which a fake server answers."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(200, {"model": "small"})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            fake.seen.append(self.path)
            status = fake.trouble(self.path)
            if status:
                return self._send(status, {"message": "in a sentence"})
            try:
                found = fake.post(self.path, self.headers["Content-Type"], body)
            except Exception as error:  # which the client tells
                return self._send(400, {"message": repr(error)})
            if status == 0:
                self.close_connection = True
                self.connection.close()
                return None
            return self._send(200, found)

        def _send(self, status: int, tree: Any) -> None:
            body = json.dumps(tree).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
