"""What features cost in serving: milliseconds of a request, and bytes in memory."""

import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mmoe_rec.devices import limit_threads
from mmoe_rec.features.pipeline import remembered_bytes
from mmoe_rec.inference.artifact import read_example
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.inference.reader import Request
from mmoe_rec.model.tables import PlainTables

ROUNDS = 15


@dataclass(frozen=True)
class Cost:
    """milliseconds: of one thread, to encode a request's features and look up their rows, that are saved without the
    features, and the standard error of that; bytes: of what counters and histories remember, and of tables."""

    milliseconds: float
    error_milliseconds: float
    bytes: int


def measure_costs(
    ranker: Ranker, folder: Path, parts: Mapping[str, Sequence[str]], candidates: int, ids: Iterable[object] = ()
) -> dict[str, Cost]:
    """What is saved in a request without some features: they are encoded after all others, so that what they share with
    these, such as hashes of keys, is there already.

    folder: the artifact; parts: name -> features that are left out together; candidates: of the request, which is the
    artifact's example; ids: of candidates that it takes, where the log has such.
    """
    pipeline, reader, layout = ranker.pipeline, ranker.reader, ranker.layout
    request = _longer_example(ranker, folder, min(candidates, ranker.about.max_candidates), ids)
    taken = {name: list[float]() for name in ("", *parts)}
    with limit_threads(1), torch.inference_mode():  # as in the server
        given = pipeline.request_inputs(reader.rows([request]))
        for _ in range(ROUNDS):
            for name, seconds in taken.items():
                features = parts.get(name, ())  # at first none, which takes its time too
                others = [each for each in pipeline.encoders if each not in features]
                inputs = {each.name for each in (*layout.ids, *layout.dense) if each.feature not in features}
                own, matrix = pipeline.without(others), ranker.request_inputs.without(inputs)
                rows = reader.rows([request])
                pipeline.without(features).request_inputs(rows)
                started = time.thread_time()  # in which other processes do not count
                own.request_inputs(rows)
                matrix.matrix(*given, rows.of)
                seconds.append(time.thread_time() - started)
    milliseconds = {name: 1000 * np.array(seconds) for name, seconds in taken.items()}
    remembered, held = remembered_bytes(folder / "features"), dict[str, int]()
    tables = ranker.model.tables
    assert isinstance(tables, PlainTables)
    owners = {each.table: each.feature for each in reversed(layout.ids)}
    owners |= {name: name for name in pipeline.encoders if name in owners}
    for name, owner in owners.items():
        bag = tables.embedding_bags[name]
        size = sum(each.numel() * each.element_size() for each in itertools.chain(bag.parameters(), bag.buffers()))
        held[owner] = held.get(owner, 0) + size
    found = {}
    for name, features in parts.items():
        saved = milliseconds[name] - milliseconds[""]
        middle = float(np.median(saved))
        # Of a median, by the median distance from it, which is 0.67 deviations.
        error = float(np.median(np.abs(saved - middle))) / 0.6745 * 1.2533 / ROUNDS**0.5
        found[name] = Cost(middle, error, sum(remembered.get(each, 0) + held.get(each, 0) for each in features))
    return found


def _longer_example(ranker: Ranker, folder: Path, candidates: int, ids: Iterable[object]) -> Request:
    """The artifact's example with so many candidates, whose values come again and again, but for ids that are given."""
    example = read_example(folder)
    columns = dict(example["candidates"])
    if (own := list(ids)) and ranker.pipeline.schema.columns.candidate in columns:
        columns[ranker.pipeline.schema.columns.candidate] = own
    example["candidates"] = {
        name: list(itertools.islice(itertools.cycle(values), candidates)) for name, values in columns.items()
    }
    return Request.of(example)
