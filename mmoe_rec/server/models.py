"""The model that is served, and how another one takes its place.

A new model answers its own example beside the old one, which goes on serving until then. One process loads it and
writes it to memory that all workers map. Its arrays (tables of counters and histories, weights) are most of a model,
and each worker holds only small objects of its own.

With a journal, a model learns events (`EventIngester`). Its tables hold a part of the journal already, up to a position
that the artifact names; of a journal that it does not name, the rows no later than the tables. It learns the rest in
the journal's order, so that every worker, and a server that starts again, comes to the same.
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


@dataclass(frozen=True)
class ModelUpdate:
    """What was read of the journal and is to be learnt. prepared: what the model can take; position: up to where;
    accepted_at: of the batches, microseconds; counts: rows by outcome."""

    prepared: LiveState
    position: int
    accepted_at: list[int]
    counts: Mapping[str, int]


class EventIngester:
    """What one model learns. `read` and `apply` alternate, in whatever thread. position: up to where the model knows
    the journal; gap: what it does not know of it and can't learn, as a sentence; checks: of rows that are to come.

    Raises UserError for an address that holds no journal.
    """

    def __init__(self, ranker: Ranker, url: str, max_rows: int = MAX_CALL_ROWS) -> None:
        """address: of the journal; most_rows: of a batch to come."""
        self.ranker, self.journal = ranker, Journal(url, create=False)
        self.schema = ranker.pipeline.schema
        reject_plain_table(self.schema, "a journal of events")
        self.validator = RowValidator(ranker.pipeline, max_rows)
        info = ranker.info.journal
        self._is_known = info is not None and info["id"] == self.journal.id
        if info is not None and not self._is_known:
            _log.warning(
                "the model's tables hold another journal than '%s': rows of this one that are no later than the tables "
                "(%s) are taken for known",
                self.journal.name,
                ranker.info.tables_as_of,
            )
        through = int(info["through"]) if info is not None and self._is_known else 0
        self.position = max(through, self.journal.removed_until())
        self.events_failure: str | None = None
        if through < self.position:
            self.events_failure = (
                f"the journal begins after position {self.position}, and the model's tables know it up to "
                f"{through} only: what was removed is in the logs' files, and mmoe-rec refresh --config FILE --model "
                "models:/NAME@ALIAS, without --journal, makes a version that knows it"
            )
            _log.warning("%s", self.events_failure)

    def catch_up(self) -> None:
        """Learns all that there is; for a model that nobody asks yet."""
        while (update := self.read()) is not None:
            self.apply(update)

    def read(self, max_rows: int = READ_CHUNK_ROWS) -> ModelUpdate | None:
        """Reads what is new, and prepares what the model is to take; None where nothing is new.

        Raises UserError where the journal is damaged.
        """
        if not (batches := self.journal.read(self.position, max_rows)):
            return None
        counts, rows = Counter(duplicate=sum(batch.duplicates for batch in batches)), dict[str | None, LogRows]()
        for log_name, new in join_by_log(batches, self.schema).items():
            known = new.rows(self.schema)
            rows[log_name] = known if self._is_known else known.filter(known.times() > self.ranker.tables_as_of_us)
            counts.update(accepted=len(known), in_tables=len(known) - len(rows[log_name]))
        accepted_at = [batch.accepted_at for batch in batches]
        return ModelUpdate(self.ranker.build_state(rows), batches[-1].position, accepted_at, +counts)

    def count_ignored(self, times: np.ndarray) -> int:
        """How many rows of (N,) times, microseconds, the tables may hold, so that they are not learnt."""
        return 0 if self._is_known else int(np.sum(times <= self.ranker.tables_as_of_us))

    def apply(self, update: ModelUpdate) -> None:
        """Has the model take what was prepared; no pass may be under way."""
        self.ranker.set_state(update.prepared)
        self.position = update.position


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A loaded model, ready to answer. example: a request that can be sent as it is; learning: how it learns events,
    None without a journal."""

    ranker: Ranker
    source: ResolvedModel
    example: dict[str, Any]
    ingester: EventIngester | None = None

    def describe(self) -> dict[str, str | None]:
        """What tells this model from others; name and version are those of the registry, where it comes from there, and
        artifact is the version that rankings carry."""
        registered = _REGISTERED.match(self.source.uri)
        info = self.ranker.info
        return {
            "model": registered[1] if registered else info.name,
            "version": registered[2] if registered else None,
            "address": self.source.uri,
            "artifact": self.ranker.version,
            "run_id": self.source.run_id,
            "tables_as_of": info.tables_as_of,
            "matmul_backend": self.ranker.scorer.matmul_backend,
        }


class ModelManager:
    """The current model. failure: why a newer model does not take its place, None if there is none."""

    def __init__(self, options: ServerOptions, first: ResolvedModel | ServedModel) -> None:
        """Opens the first model, unless it is open. Raises UserError as `open` does."""
        self.options = options
        self.reload_failure: str | None = None
        self.current = self.open(first) if isinstance(first, ResolvedModel) else first

    def switch_to(self, served: ServedModel) -> None:
        """Serve a model that was opened, once it has learnt all that the journal holds and the one before knows."""
        before, ingester = self.current.ingester, served.ingester
        if ingester is not None:
            ingester.catch_up()
            # The one before may have taken more meanwhile, and callers may ask for that.
            while before is not None and ingester.position < before.position and (new := ingester.read()) is not None:
                ingester.apply(new)
        self.current = served
        if before is not None:
            before.journal.close()

    def open(self, source: ResolvedModel) -> ServedModel:
        """Load a model; the current one goes on. Raises UserError for one that can't be loaded or can't answer."""
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
            raise UserError(f"the model at '{source.uri}' refuses its own example: {error}") from None
        except UserError:
            raise
        except Exception as error:  # whatever it is, the model before goes on
            raise UserError(f"the model at '{source.uri}' can't be loaded ({one_line(error)})") from error
        return ServedModel(ranker, source, example, ingester)


_ALIGNMENT = 64  # bytes, as numpy, torch and Arrow ask for at most
_LOCKS = {type(lock()): lock for lock in (threading.Lock, threading.RLock)}


class _Pickler(pickle.Pickler):
    """Hands the memory of tensors out, as numpy and Arrow do by themselves, and makes new locks."""

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
    """Write a model to a file for `map_shared`."""
    stream, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
    _Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(served)
    parts = [stream.getbuffer(), *(buffer.raw() for buffer in buffers)]
    with open(path, "wb") as file:
        pickle.dump([part.nbytes for part in parts], file)
        for part in parts:
            file.seek(-file.tell() % _ALIGNMENT, os.SEEK_CUR)
            file.write(part)


def map_shared(path: str) -> ServedModel:
    """Return the model in a file, whose pages all processes share until one of them writes to a page."""
    with open(path, "rb") as file:
        sizes, end = pickle.load(file), file.tell()
        memory = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    parts = []
    for size in sizes:
        start = end + -end % _ALIGNMENT
        end = start + size
        parts.append(memory[start:end])
    return pickle.loads(parts[0], buffers=parts[1:])
