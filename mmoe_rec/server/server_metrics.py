"""Metrics of the server in Prometheus' format.

Each worker writes its metrics to files in a folder that all workers share. prometheus-client reads the path of this
folder from PROMETHEUS_MULTIPROC_DIR when it is imported. The worker that answers `/metrics` sums the metrics of all
workers.
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
_MODEL_LABELS = ("model", "version", "run_id", "tables_as_of")
_CALLS = (1, 2, 4, 8, 16, 32, 64)
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Metrics of one worker."""

    def __init__(self, name: str | None = None) -> None:
        """Set up the metrics.

        Args:
            name: Name for this worker's metric files. The counters of an earlier worker with this name continue. None
                keeps the metrics in memory.
        """
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
        unseen = "IDs of ranked elements that the model's features have never seen, by role"
        self.unknown_ids = counter("unknown_ids", unseen, ["role"])
        self.errors = counter("errors", "Invalid or failed calls by kind: body, element, model", ["kind"])
        self.refusals = counter("refusals", "Calls refused for their cost or for missing rights, by reason", ["reason"])
        self.reloads = counter("reloads", "Attempts to load a newer model by outcome", ["outcome"])
        self.events = counter("events", "Accepted rows of events by log", ["log"])
        self.events_refused = counter("events_refused", "Refused calls of /events by reason", ["reason"])
        ingested = "Rows of events that each worker has ingested, by outcome"
        self.events_ingested = counter("events_ingested", ingested, ["outcome"])
        visible = "Time from the acceptance of a batch of events until a worker's replies include it"
        self.event_visible_seconds = histogram("event_visible_seconds", visible)
        self.live_rows = gauge("live_rows", "Rows of events that a worker's model has beside its tables now")
        logged = "Replies by outcome in the request log: written, unsampled, dropped, failed"
        self.logged_replies = counter("request_log", logged, ["outcome"])
        self.calls_per_batch = histogram("calls_per_batch", "Calls ranked in one batch", buckets=_CALLS)
        self.calls = gauge("calls", "Calls being read, waiting or scored now")
        self.waiting = gauge("waiting", "Calls waiting for a batch now")
        self._model = gauge("model_info", "Workers that serve this model", _MODEL_LABELS)
        self._model_labels: tuple[str, ...] | None = None

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Measure the time within the context, and add it to the times of a stage."""
        started = perf_counter()
        try:
            yield
        finally:
            self.stages.labels(stage).observe(perf_counter() - started)

    def set_model(self, model: Mapping[str, str | None]) -> None:
        """Report the model that this worker serves from now on."""
        if self._model_labels is not None:
            self._model.labels(*self._model_labels).set(0)
        self._model_labels = tuple(model[name] or "" for name in _MODEL_LABELS)
        self._model.labels(*self._model_labels).set(1)

    def text(self) -> bytes:
        """Return the metrics of all workers in Prometheus' text format."""
        if METRICS_FOLDER_VARIABLE not in os.environ:
            return generate_latest(self._own)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        return generate_latest(registry)
