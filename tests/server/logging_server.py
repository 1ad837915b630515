"""An application that logs requests, in this process, and what it has logged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from prometheus_client.parser import text_string_to_metric_families

from mmoe_rec.live.request_log import LogOptions
from mmoe_rec.server.app import Application
from mmoe_rec.server.limits import Limits
from mmoe_rec.server.models import Models, Source


@contextmanager
def logging_app(
    model: Path, log: LogOptions, limits: Limits | None = None, journal: Path | None = None
) -> Iterator[Application]:
    """An application that serves the model in a folder; what is to be logged is written when the block ends."""
    limits = limits or Limits()
    models = Models(limits, journal, keeps_seen=True)
    models.load(Source(model, "models:/small/7", "a_run"))
    app = Application(models, limits, log=log)
    try:
        yield app
    finally:
        app.close()


def logged(folder: Path) -> pa.Table:
    """All logged rows, in the order of their files."""
    return pa.concat_tables([pq.read_table(each) for each in sorted(folder.glob("*.parquet"))])


def outcomes(app: Application) -> dict[str, int]:
    """What became of how many replies."""
    text = app.metrics.text().decode()
    families = {each.name: each for each in text_string_to_metric_families(text)}
    samples = families["mmoe_rec_request_log"].samples
    return {each.labels["outcome"]: int(each.value) for each in samples if each.name.endswith("_total")}
