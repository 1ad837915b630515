"""python -m tests.benchmarks.executed_files

Through how many files of the package does a reader go who follows one trip? On a small synthetic log: an encoded batch
from settings with one counter, a training, an evaluation with its report, and `POST /invocations`. A file counts if one
of its functions is called, here or in a thread, outside of imports. Of a training, also how often what `train_model` is
written in calls another room before the first step, each place of a call once.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

import mmoe_rec

PACKAGE = Path(mmoe_rec.__file__).parent
SETTINGS = "configs/synthetic.yaml"


class Trip:
    """What a trip has called so far."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.is_in_loop = False
        self.calls: set[tuple[str, int, str]] = set()

    def note(self, frame: FrameType, event: str, _: Any) -> None:
        """For `sys.setprofile`."""
        name = frame.f_code.co_filename
        is_function = frame.f_code.co_flags & CO_OPTIMIZED  # bodies of modules and classes run at imports
        if event != "call" or not name.startswith(f"{PACKAGE}/") or not is_function:
            return
        self.files.add(_within(name))
        self.is_in_loop |= name.endswith("/training/loop.py") and frame.f_code.co_name == "_train"
        back = frame.f_back
        if self.is_in_loop or back is None or _room(name) == "jobs":
            return
        if back.f_code.co_filename.startswith(f"{PACKAGE}/jobs/"):
            self.calls.add((back.f_code.co_filename, back.f_lineno, _within(name)))


def _within(name: str) -> str:
    return str(Path(name).relative_to(PACKAGE))


def _room(name: str) -> str:
    return Path(name).relative_to(PACKAGE).parts[0]


@contextmanager
def travelling() -> Iterator[Trip]:
    """Notes what is called in a block."""
    trip = Trip()
    threading.setprofile(trip.note)
    sys.setprofile(trip.note)
    try:
        yield trip
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]


def measure(folder: Path) -> dict[str, int]:
    """Files of each trip, and calls of other rooms on the way to the training loop."""
    from mmoe_rec.batches.batch import make_batch
    from mmoe_rec.batches.encoded_rows import EncodedRows
    from mmoe_rec.batches.reader import TrainingReader
    from mmoe_rec.inference.artifact import EXAMPLE, Source
    from mmoe_rec.server.app import Application
    from mmoe_rec.server.models import Models
    from mmoe_rec.server.options import Options
    from mmoe_rec.settings.load import load_settings
    from pipelines import make_synthetic_log
    from tests.server.asking import ask

    make_synthetic_log.main(["--out", f"{folder}/log", "--rows", "30000"])
    words = ["--data.log", f"{folder}/log", "--tracking.uri", f"sqlite:///{folder}/mlflow.db"]
    tree = yaml.safe_load(Path(SETTINGS).read_text(encoding="utf-8"))
    tree["features"] = {"user_clicked": tree["features"]["user_clicked"]}
    (folder / "counter.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    with travelling() as counter:
        settings = load_settings(folder / "counter.yaml", [*words, "--data.work", f"{folder}/counter"])
        prepared = mmoe_rec.build_features(settings)
        rows = EncodedRows(prepared.split("train"), prepared.layout)
        reader = TrainingReader(rows, batch_size=64, shuffle_window=1024, seed=1)
        first, position = next(reader.resume(reader.position(0), 1))
        make_batch(first.encoded, prepared.layout, first.labels, position, torchrec=False)
    settings = load_settings(SETTINGS, [*words, "--data.work", f"{folder}/work", "--training.epochs", "1"])
    with travelling() as training:
        trained = mmoe_rec.train(settings)
    with travelling() as evaluation:
        mmoe_rec.evaluate(settings, trained.address, folder / "evaluation")
    models = Models(Options(), Source(Path(trained.artifact), trained.address, None))
    body = {"inputs": [json.loads((Path(trained.artifact) / EXAMPLE).read_bytes())]}
    assert ask(Application(models), body).status == 200
    with travelling() as request:  # a new application, as threads that run already are not seen
        assert ask(Application(models), body).status == 200
    trips = {"counter": counter, "train": training, "evaluate": evaluation, "invocations": request}
    return {name: len(trip.files) for name, trip in trips.items()} | {"calls_before_the_loop": len(training.calls)}


def main() -> None:
    """Prints the figures as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder))))


if __name__ == "__main__":
    main()
