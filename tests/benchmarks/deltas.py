"""python -m tests.benchmarks.deltas [--deltas 1000] [--workers 1]
python -m tests.benchmarks.deltas --sizes data/complete_journey/work/model --config configs/complete_journey.yaml

Is a request lost, or answered by something between two models, while deltas come one after the other? A small model is
served and asked by two callers without a pause. Each new version is made from the one before, nine of ten by other
dense weights and other rows of tables, every tenth by a refresh with a new file of the log; its delta lies beside it in
the folder that the server watches. Every reply has to give the scores of the whole model of the version that it names:
up to the last bits where calls share a pass, and to the bit where one comes alone, which is tried after each delta.

--sizes: of one model, megabytes and seconds of processor time of the whole and of two deltas: a refresh with the log's
last day, and a training that has touched the rows of the ids in that day and kept the trees. Tables are made as of the
day before, and as of its end.

The last line is JSON.
"""

import argparse
import itertools
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mmoe_rec.atomic import atomic_folder
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.features.vocabulary import VocabularyFeature
from mmoe_rec.inference.artifact import DELTA, read_artifact, read_manifest, read_stored, version_of, write_tensors
from mmoe_rec.inference.delta import write_delta
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.inference.writing import copy_files, seal
from mmoe_rec.live.refresh import as_of, renew_tables
from mmoe_rec.log.given import iso_time
from mmoe_rec.log.reader import Log
from mmoe_rec.log.rows import MICROSECONDS_PER_DAY
from mmoe_rec.model.tables import name_weight
from mmoe_rec.settings.load import load_settings
from tests.inference.running_server import free_port, running_program
from tests.inference.small_model import ITEMS, SmallModel
from tests.log.small_logs import DAY, START, random_log, with_column

CALLERS, USERS, REFRESH_EVERY = 2, 8, 10
REQUESTS = [
    {
        "user": {"user": user},
        "context": {"time": iso_time(START + 900 * DAY), "born": None},
        "candidates": {"item": ITEMS},
    }
    for user in range(USERS)
]


class _Caller(threading.Thread):
    """Asks without a pause. replies: of each, the number of the request, the version and the scores; lost: what else
    came."""

    def __init__(self, port: int, number: int) -> None:
        super().__init__(daemon=True)
        self._port, self._number = port, number
        self.replies: list[tuple[int, str, list[float]]] = []
        self.lost: list[str] = []
        self.ending, self.waits, self.may_go_on = threading.Event(), threading.Event(), threading.Event()
        self.may_go_on.set()

    def run(self) -> None:
        connection = HTTPConnection("127.0.0.1", self._port, timeout=60)
        for number in itertools.count(self._number):
            self.waits.set()
            self.may_go_on.wait()
            self.waits.clear()
            if self.ending.is_set():
                break
            try:
                self.replies.append((number % USERS, *ask(connection, number % USERS)))
            except Exception as error:
                self.lost.append(repr(error))
                connection = HTTPConnection("127.0.0.1", self._port, timeout=60)


@contextmanager
def paused(callers: list[_Caller]) -> Iterator[None]:
    """A time in which nobody asks."""
    for each in callers:
        each.may_go_on.clear()
    quiet = 0
    while quiet < 3:  # one that has just gone on does not say at once that it no longer waits
        time.sleep(0.002)
        quiet = quiet + 1 if all(each.waits.is_set() for each in callers) else 0
    yield
    for each in callers:
        each.may_go_on.set()


def ask(connection: HTTPConnection, number: int) -> tuple[str, list[float]]:
    """The version that answers a request, and its scores."""
    body = json.dumps({"inputs": [REQUESTS[number]]})
    connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
    reply = connection.getresponse()
    found = json.loads(reply.read())
    assert reply.status == 200, found
    (ranking,) = found["predictions"]
    return ranking["model"]["version"], ranking["scores"]


def publish(model: SmallModel, before: Path, made: Path, number: int) -> float:
    """Writes the next version with its delta; gives the seconds that the delta took."""
    random = np.random.default_rng(number)
    if number % REFRESH_EVERY == 0:
        rows = random_log(number, rows=6, days=0.5)
        times = rows["time"].cast(pa.int64()).to_numpy() + (12 + number // REFRESH_EVERY) * DAY + np.arange(6)
        rows = with_column(rows, "time", pa.array(times).cast(rows["time"].type))
        pq.write_table(rows, Path(model.settings.data.log) / f"{number:05}.parquet")
        renew_tables(before, model.settings, made)
    else:
        made.mkdir()
        copy_files(before, made)
        weights = read_stored(before / "weights.safetensors")
        for name, weight in weights.items():
            touched: Any = slice(None)
            if name.startswith("tables."):
                touched = torch.from_numpy(random.integers(0, len(weight), 2))
            weight[touched] += torch.from_numpy(random.normal(0, 0.003, weight[touched].shape)).float()
        write_tensors(weights, made / "weights.safetensors")
        seal(made)
    start = time.perf_counter()
    write_delta(before, made)
    return time.perf_counter() - start


def publish_all(deltas: int, workers: int, scratch: Path) -> dict[str, Any]:
    """Publishes deltas one after the other, and gives what came of it."""
    model = SmallModel(scratch / "work")
    watched, current = scratch / "watched", model.folder
    shutil.copytree(current, watched)
    expected = {version_of(current): scores_of(current)}
    port, log = free_port(), scratch / "server.log"
    words = [sys.executable, "-m", "mmoe_rec", "serve", "--model", str(watched), "--port", str(port)]
    words += ["--workers", str(workers)]
    seconds: dict[str, list[float]] = {"write": [], "take_up": [], "load_whole": []}
    sizes: dict[str, list[int]] = {"delta": [], "whole": []}
    order, unequal = list(expected), 0
    with running_program(words, f"http://127.0.0.1:{port}/health", log, cwd=Path(), env=dict(os.environ)):
        callers = [_Caller(port, number) for number in range(CALLERS)]
        for each in callers:
            each.start()
        control = HTTPConnection("127.0.0.1", port, timeout=120)
        for number in range(1, deltas + 1):
            made = scratch / f"made-{number}"
            seconds["write"].append(publish(model, current, made, number))
            version = version_of(made)
            start = time.perf_counter()
            expected[version] = scores_of(made)
            seconds["load_whole"].append(time.perf_counter() - start)
            order.append(version)
            sizes["delta"].append(size(made / DELTA))
            sizes["whole"].append(sum(each.bytes for each in read_manifest(made).values()))
            with atomic_folder(watched) as folder:
                shutil.copytree(made, folder, dirs_exist_ok=True)
            start = time.perf_counter()
            control.request("POST", "/reload", headers={"Content-Type": "application/json"})
            reply = control.getresponse()
            told = json.loads(reply.read())
            seconds["take_up"].append(time.perf_counter() - start)
            assert (reply.status, told["artifact"]) == (200, version), told
            with paused(callers):
                for each in range(USERS):
                    alone = ask(HTTPConnection("127.0.0.1", port, timeout=60), each)
                    unequal += alone != (version, expected[version][each])
            if current != model.folder:
                shutil.rmtree(current)
            current = made
            if number % 50 == 0:
                print(f"{number} deltas, {sum(len(each.replies) for each in callers):,} replies", flush=True)
        for each in callers:
            each.ending.set()
            each.join(60)
    lines = log.read_text()
    replies = [reply for each in callers for reply in each.replies]
    places = {version: place for place, version in enumerate(order)}
    backwards = sum(
        places[two[1]] < places[one[1]] for each in callers for one, two in itertools.pairwise(each.replies)
    )
    return {
        "deltas": deltas,
        "workers": workers,
        "taken_up": deltas - lines.count("no delta is taken up"),
        "replies": len(replies),
        "lost": sum(len(each.lost) for each in callers),
        "versions_seen": len({version for _, version, _ in replies}),
        "asked_alone": deltas * USERS,
        "unequal_bits": unequal,
        "other_scores": sum(
            not np.allclose(scores, expected[version][number], rtol=1e-5, atol=0) for number, version, scores in replies
        ),
        "backwards": backwards,
        "kinds": dict(Counter("refresh" if n % REFRESH_EVERY == 0 else "weights" for n in range(1, deltas + 1))),
        "median_bytes": {name: median(each) for name, each in sizes.items()},
        "median_ms": {name: round(1000 * median(each), 1) for name, each in seconds.items()},
        "largest_ms_take_up": round(1000 * max(seconds["take_up"])),
    }


def scores_of(folder: Path) -> list[list[float]]:
    """The scores of each request by the whole model, as JSON carries them."""
    ranker = Ranker.load(folder)
    return [json.loads(json.dumps(ranker.rank(**each).scores)) for each in REQUESTS]


def size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(each.stat().st_size for each in folder.rglob("*") if each.is_file())


# One model


def measure_sizes(model: Path, config: str, scratch: Path) -> dict[str, Any]:
    """Megabytes, and seconds of processor time, of the whole model and of deltas of a day."""
    settings = load_settings(Path(config), [])
    end = as_of(read_artifact(model))
    before, after, trained = (scratch / name for name in ("before", "after", "trained"))
    print("making tables as of the day before, and as of the end", flush=True)
    renew_tables(model, settings, before, until=end - MICROSECONDS_PER_DAY)
    renew_tables(model, settings, after, until=end + 1)
    found: dict[str, Any] = {"whole_mb": round(sum(each.bytes for each in read_manifest(after).values()) / 1e6, 1)}
    for name, one, other in (("refresh", before, after), ("training", after, touch(after, settings, end, trained))):
        start = time.process_time()
        write_delta(one, other)
        wrote = time.process_time() - start
        rankers, seconds = Ranker.load(one), dict[str, list[float]](whole=[], delta=[])
        for _ in range(5):
            for what, take_up in (
                ("whole", lambda: Ranker.load(other)),  # noqa: B023
                ("delta", lambda: rankers.with_delta(other / DELTA)),  # noqa: B023
            ):
                start = time.process_time()
                made = take_up()
                seconds[what].append(time.process_time() - start)
        assert made.version == version_of(other)
        example = json.loads((other / "example_request.json").read_text())["inputs"][0]
        assert made.rank(**example).scores == Ranker.load(other).rank(**example).scores
        found[name] = {
            "delta_mb": round(size(other / DELTA) / 1e6, 2),
            "write_s": round(wrote, 2),
            **{f"{what}_s": round(min(each), 3) for what, each in seconds.items()},
        }
        print(name, found[name], flush=True)
    return found


def touch(model: Path, settings: Any, end: int, made: Path) -> Path:
    """The model after steps on the rows of the last day, which change dense weights and the rows of their ids."""
    copy_to = made
    copy_to.mkdir()
    copy_files(model, copy_to)
    pipeline = FeaturePipeline.load(model / "features", memories=False)
    weights = read_stored(model / "weights.safetensors")
    touched = {name: set[int]() for name in pipeline.vocabularies}
    for rows in last_day(settings, pipeline, end):
        for name, vocabulary in pipeline.vocabularies.items():
            feature = pipeline.schema.features[name]
            if isinstance(feature, VocabularyFeature) and rows.has(feature.column):
                touched[name].update(np.unique(vocabulary.encode(rows.column(feature.column))).tolist())
    for name, weight in weights.items():
        rows_of = next((each for each in touched if name == name_weight(each)), None)
        if rows_of is not None:
            weight[sorted(touched[rows_of])] += 1e-3
        elif not name.startswith("tables."):
            weights[name] = weight + 1e-4
    write_tensors(weights, copy_to / "weights.safetensors")
    seal(copy_to)
    return copy_to


def last_day(settings: Any, pipeline: FeaturePipeline, end: int) -> Iterator[Any]:
    """Rows of the log's last day, some at a time."""
    for rows in Log(settings.data.log, pipeline.schema).stream():
        inside = rows.times() > end - MICROSECONDS_PER_DAY
        if inside.any():
            yield rows.filter(inside)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deltas", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--sizes", type=Path, metavar="MODEL")
    parser.add_argument("--config", metavar="FILE")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        if given.sizes is not None:
            print(json.dumps(measure_sizes(given.sizes, given.config, Path(scratch))))
        else:
            print(json.dumps(publish_all(given.deltas, given.workers, Path(scratch))))


if __name__ == "__main__":
    main()
