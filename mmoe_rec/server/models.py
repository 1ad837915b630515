"""The served model, its updates from the journal, and its replacement by a newer model.

A new model must rank the example request in its artifact before it replaces the old model. One process loads the model
and writes it to memory that all workers map (`write_shared`).

With a journal, a model ingests the events that its tables of counters and histories lack (`EventIngester`). The
artifact names the journal whose events the tables contain, and the position of their last batch. If the artifact names
a different journal or none, the model ingests only rows later than the tables, which may contain the earlier rows.
"""

import io
import logging
import mmap
import os
import pickle
import re
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmoe_rec.errors import RequestError, UserError, one_line
from mmoe_rec.inference.artifact import ResolvedModel, read_example
from mmoe_rec.inference.ranker import LiveState, Ranker
from mmoe_rec.live.journal import READ_CHUNK_ROWS, Journal
from mmoe_rec.live.journal_rows import MAX_CALL_ROWS, RowValidator, join_by_log
from mmoe_rec.log.rows import LogRows, reject_plain_table
from mmoe_rec.server.options import ServerOptions

_log = logging.getLogger(__name__)
_REGISTERED = re.compile(r"models:/+([^/@]+)/(\d+)")


class IngestOutcome(StrEnum):
    """Outcome of a row that a server received, as a label of the metric `events_ingested`.

    Attributes:
        ACCEPTED: The journal contains the row.
        DUPLICATE: The journal already had the row and skipped it.
        IN_TABLES: The model ignores the row because the model's tables may already contain the row. The row also counts
            as `ACCEPTED`.
    """

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    IN_TABLES = "in_tables"


@dataclass(frozen=True)
class ModelUpdate:
    """New rows of the journal, prepared for the model.

    Attributes:
        prepared: State that the model can switch to.
        position: Position in the journal of the last batch in the state.
        accepted_at: Time at which a server accepted each batch, microseconds since 1970 UTC.
        counts: Number of rows by outcome.
    """

    prepared: LiveState
    position: int
    accepted_at: list[int]
    counts: Mapping[IngestOutcome, int]


class EventIngester:
    """Updates one model with the events of a journal. Apply each update before the next `read`, in any thread.

    Attributes:
        ranker: Ranker of the model.
        journal: The open journal.
        schema: Schema of the model.
        position: Position in the journal of the last batch that the model includes.
        events_failure: Why the model will always lack some events, as a sentence. None if the model can ingest all.
        validator: Checks of the rows that callers send for the journal.
    """

    def __init__(self, ranker: Ranker, url: str, max_rows: int = MAX_CALL_ROWS) -> None:
        """Open the journal of a model.

        Args:
            ranker: Ranker of the model.
            url: URL of the journal.
            max_rows: Maximum number of rows in one call of `/events`.

        Raises:
            UserError: There is no journal at the URL, or the model's settings don't support one.
        """
        self.ranker, self.journal, self.schema = ranker, Journal(url, create=False), ranker.pipeline.schema
        reject_plain_table(self.schema, "a journal of events")
        self.validator = RowValidator(ranker.pipeline, max_rows)
        info = ranker.info.journal
        self._is_in_tables = info is not None and info["id"] == self.journal.id
        if info is not None and not self._is_in_tables:
            problem = f"the model's tables contain events of another journal than '{self.journal.name}'"
            ignored = f"events of this journal up to the time of the tables ({ranker.info.tables_as_of})"
            _log.warning("%s. The server therefore ignores %s.", problem, ignored)
        through = int(info["through"]) if info is not None and self._is_in_tables else 0
        self.position = max(through, self.journal.removed_until())
        self.events_failure: str | None = None
        if through < self.position:
            self.events_failure = (
                f"the journal begins after position {self.position}, and the model's tables include only positions up "
                f"to {through}. The removed events are in the logs' files. Run mmoe-rec refresh --config FILE --model "
                "models:/NAME@ALIAS, without --journal, to register a version that includes them."
            )
            _log.warning("%s", self.events_failure)

    def catch_up(self) -> None:
        """Ingest all new events. Call this only before the model is in use."""
        while (update := self.read()) is not None:
            self.apply(update)

    def read(self, max_rows: int = READ_CHUNK_ROWS) -> ModelUpdate | None:
        """Prepare the model's next state from new rows, None without any. Raise UserError for a damaged journal."""
        if not (batches := self.journal.read(self.position, max_rows)):
            return None
        rows = dict[str | None, LogRows]()
        counts = Counter({IngestOutcome.DUPLICATE: sum(batch.duplicates for batch in batches)})
        for log_name, new in join_by_log(batches, self.schema).items():
            log_rows = new.to_log_rows(self.schema)
            later_than = self.ranker.tables_as_of_us
            rows[log_name] = log_rows if self._is_in_tables else log_rows.filter(log_rows.times() > later_than)
            counts[IngestOutcome.ACCEPTED] += len(log_rows)
            counts[IngestOutcome.IN_TABLES] += len(log_rows) - len(rows[log_name])
        accepted_at = [batch.accepted_at for batch in batches]
        return ModelUpdate(self.ranker.build_state(rows), batches[-1].position, accepted_at, +counts)

    def count_ignored(self, times: np.ndarray) -> int:
        """Count the rows that the model ignores because its tables may include them. `times`: (N,) microseconds."""
        return 0 if self._is_in_tables else int(np.sum(times <= self.ranker.tables_as_of_us))

    def apply(self, update: ModelUpdate) -> None:
        """Switch the model to a prepared state. Call this only while no batch is being ranked."""
        self.ranker.set_state(update.prepared)
        self.position = update.position


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A loaded model that is ready to rank.

    Attributes:
        ranker: Ranker of the model.
        source: Location of the model.
        example: A request that the model can rank.
        ingester: Updates from the journal. None without a journal.
    """

    ranker: Ranker
    source: ResolvedModel
    example: dict[str, Any]
    ingester: EventIngester | None = None

    def describe(self) -> dict[str, str | None]:
        """Return the model's identity for replies and metrics.

        `model` and `version` are the registered name and version. If the model's URI has no version number, they are
        the artifact's name and None. `artifact` is the version that replies contain.
        """
        registered, info = _REGISTERED.match(self.source.uri), self.ranker.info
        return {
            "model": registered[1] if registered else info.name,
            "version": registered[2] if registered else None,
            "uri": self.source.uri,
            "artifact": self.ranker.version,
            "run_id": self.source.run_id,
            "tables_as_of": info.tables_as_of,
            "matmul_backend": self.ranker.scorer.matmul_backend,
        }


class ModelManager:
    """Holder of the served model, which can switch to newer models.

    Attributes:
        options: Options of the server.
        current: The served model.
        reload_failure: Why the newest model could not be loaded, None if it is served.
    """

    def __init__(self, options: ServerOptions, first: ResolvedModel | ServedModel) -> None:
        """Open the first model.

        Args:
            options: Options of the server.
            first: The first model, or its location.

        Raises:
            UserError: The model can't be loaded, as in `open`.
        """
        self.options = options
        self.reload_failure: str | None = None
        self.current = self.open(first) if isinstance(first, ResolvedModel) else first

    def switch_to(self, served: ServedModel) -> None:
        """Serve an opened model, once it has ingested all events that the previous model has ingested."""
        previous, ingester = self.current.ingester, served.ingester
        if ingester is not None:
            ingester.catch_up()
            # The previous model may have ingested more events in the meantime. A caller who was given a later position
            # must not get a ranking from a model that lacks these events.
            while previous is not None and ingester.position < previous.position and (update := ingester.read()):
                ingester.apply(update)
        self.current = served
        if previous is not None:
            previous.journal.close()

    def open(self, source: ResolvedModel) -> ServedModel:
        """Load a model while the current one serves. Raise UserError if the model can't be loaded or can't rank."""
        try:
            ranker = Ranker.load(source.folder)
            ranker.apply_serving_settings(self.options.setting_overrides)
            ranker.apply_matmul_backend()
            ranker.keep_inputs = self.options.request_log is not None
            example = read_example(source.folder)
            ingester = None
            if self.options.journal is not None:
                ingester = EventIngester(ranker, self.options.journal, self.options.limits.max_events)
                ingester.catch_up()
            ranker.rank(**example)
        except RequestError as error:
            raise UserError(f"the model at '{source.uri}' rejects its own example request: {error}") from None
        except UserError:
            raise
        except Exception as error:  # Whatever the error is, the previous model keeps serving.
            raise UserError(f"the model at '{source.uri}' can't be loaded ({one_line(error)})") from error
        return ServedModel(ranker, source, example, ingester)


_ALIGNMENT = 64  # Bytes. This is the largest alignment that numpy, torch or Arrow requires.
_LOCKS = {type(lock()): lock for lock in (threading.Lock, threading.RLock)}


class _Pickler(pickle.Pickler):
    """Pickler that puts tensors into separate buffers, as numpy does with arrays, and replaces locks by new ones."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) in _LOCKS:
            return _LOCKS[type(value)], ()
        if isinstance(value, nn.Parameter):
            return nn.Parameter, (value.data, value.requires_grad)
        if isinstance(value, Tensor):
            content = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            return _make_tensor, (content, value.dtype, value.shape)
        return NotImplemented


def _make_tensor(content: np.ndarray, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    return torch.from_numpy(content).view(dtype).reshape(shape)


def write_shared(served: ServedModel, path: str) -> None:
    """Write a model to a file, for processes that share its arrays in memory (`map_shared`).

    Args:
        served: Model to write.
        path: Path of the file.
    """
    stream, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
    _Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(served)
    parts = [stream.getbuffer(), *(buffer.raw() for buffer in buffers)]
    with open(path, "wb") as file:
        pickle.dump([part.nbytes for part in parts], file)
        for part in parts:
            file.seek(-file.tell() % _ALIGNMENT, os.SEEK_CUR)
            file.write(part)


def map_shared(path: str) -> ServedModel:
    """Map the model in a file of `write_shared`. Processes share all memory that none of them writes to."""
    with open(path, "rb") as file:
        sizes, end = pickle.load(file), file.tell()
        memory = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    parts = []
    for size in sizes:
        start = end + -end % _ALIGNMENT
        end = start + size
        parts.append(memory[start:end])
    return pickle.loads(parts[0], buffers=parts[1:])
