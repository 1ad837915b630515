"""What the server counts, for Prometheus.

With several workers the numbers of each lie in files of one folder, which prometheus-client knows by the environment's
PROMETHEUS_MULTIPROC_DIR when it is imported; whichever worker is asked then adds them all up.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, values
from prometheus_client.multiprocess import MultiProcessCollector

METRICS_FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """The counters of one worker.

    name: under which its numbers lie in files, where there are several workers; one that another one had goes on with
    that one's numbers.
    """

    def __init__(self, name: str | None = None) -> None:
        if name is not None:
            values.ValueClass = values.MultiProcessValue(lambda: name)
        self._own = CollectorRegistry()
        counter = partial(Counter, namespace="mmoe_rec", registry=self._own)
        gauge = partial(Gauge, namespace="mmoe_rec", registry=self._own, multiprocess_mode="livesum")
        histogram = partial(Histogram, namespace="mmoe_rec", registry=self._own, buckets=_SECONDS)
        stages = "Time of a call by stage: read, parse, wait, score, write, and total; of a call of /events: events"
        self.stages = histogram("stage_seconds", stages, ["stage"])
        self.replies = counter("replies", "Replies to /invocations by status", ["status"])
        self.elements = counter("elements", "Elements of calls that were parsed")
        self.candidates = counter("candidates", "Candidates of calls that were parsed")
        self.unknown_ids = counter(
            "unknown_ids", "Ids of ranked elements that the model knows nothing of, by role", ["role"]
        )
        self.errors = counter("errors", "Wrong calls by kind: body, element, model", ["kind"])
        self.refusals = counter(
            "refusals", "Calls refused for what they cost, or without a token, by reason", ["reason"]
        )
        self.reloads = counter("reloads", "Attempts to take up another model by outcome", ["outcome"])
        self.events = counter("events", "Rows of events that were accepted, by log of events", ["log"])
        self.events_refused = counter("events_refused", "Calls of /events that were refused, by reason", ["reason"])
        self.events_ingested = counter(
            "events_ingested", "Rows of events that each worker has learnt, by outcome", ["outcome"]
        )
        self.event_visible_seconds = histogram(
            "event_visible_seconds", "Time from the acceptance of a batch of events until a worker's replies know of it"
        )
        self.live_rows = gauge("live_rows", "Rows of events beside its tables that a worker's model holds now")
        self.logged_replies = counter(
            "request_log", "Replies by what became of their log: written, unsampled, dropped, failed", ["outcome"]
        )
        self.calls_per_batch = histogram(
            "calls_per_batch", "Calls ranked in one pass", buckets=(1, 2, 4, 8, 16, 32, 64)
        )
        self.calls = gauge("calls", "Calls being read, waiting or scored now")
        self.waiting = gauge("waiting", "Calls waiting for a pass now")
        self._model = gauge(
            "model_info", "Workers that serve this model", ["model", "version", "run_id", "tables_as_of"]
        )
        self._shown: tuple[str, ...] | None = None

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Counts the time of a block as that of a stage."""
        started = perf_counter()
        try:
            yield
        finally:
            self.stages.labels(stage).observe(perf_counter() - started)

    def set_model(self, about: Mapping[str, str | None]) -> None:
        """Says which model this worker serves from now on."""
        if self._shown is not None:
            self._model.labels(*self._shown).set(0)
        self._shown = tuple(about[name] or "" for name in ("model", "version", "run_id", "tables_as_of"))
        self._model.labels(*self._shown).set(1)

    def text(self) -> bytes:
        """The numbers of all workers in Prometheus' text format."""
        if METRICS_FOLDER_VARIABLE not in os.environ:
            return generate_latest(self._own)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        return generate_latest(registry)
