"""From a log to encoded rows: fits the features, encodes each split, keeps both until what they rest on changes.

    <work>/features/
        manifest.json          fingerprint, log digest, times, files left out, rows and labels of each split
        files.json             the files of the logs that were taken in
        serving/               fitted features, what requests after the log's end can ask for, latest attributes
        counts/                what was counted to fit them, so that days can be added (see `mmoe_rec.features.extend`)
        encoded/layout.json    order of the model's inputs
        encoded/{train,validation,test}/part-00000.parquet

The folder appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow.parquet as pq

from mmoe_rec.atomic import atomic_folder, one_at_a_time
from mmoe_rec.errors import UserError
from mmoe_rec.features.checks import check_classes, check_splits
from mmoe_rec.features.layout import Layout
from mmoe_rec.features.learn import Learnt, Window
from mmoe_rec.features.log import format_time
from mmoe_rec.features.pipeline import FORMAT, FeaturePipeline
from mmoe_rec.features.splits import SplitCounts
from mmoe_rec.features.steps import DEFAULTS, BuildOptions, Logs, Steps
from mmoe_rec.locks import writing
from mmoe_rec.schema import Schema

# For those that come while features are built, and for those who would build them while they are read.
BUILD, ADVICE = "a build of features", "set `data.work` to another folder"


@dataclass(frozen=True)
class Prepared:
    """A folder of fitted features and encoded rows."""

    folder: Path

    @property
    def layout(self) -> Layout:
        """Order of the model's inputs."""
        return Layout.read(self.folder / "encoded")

    @property
    def manifest(self) -> dict:
        """What was built from what."""
        return json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))

    @property
    def serving(self) -> Path:
        """Folder of the fitted features, with what they remember and latest attributes."""
        return self.folder / "serving"

    def split(self, name: str) -> Path:
        """Folder of a split's encoded rows."""
        return self.folder / "encoded" / name

    def is_built_from(self, fingerprint: str) -> bool:
        """Whether the folder is there and of this fingerprint, or was extended to what a build of it would cover."""
        try:
            manifest = self.manifest
            return fingerprint in (manifest["fingerprint"], manifest.get("extends", {}).get("stands_for"))
        except (OSError, ValueError, KeyError, TypeError):
            return False


def prepare(
    log_source: str, schema: Schema, windows: dict[str, Window], work: Path, options: BuildOptions = DEFAULTS
) -> Prepared:
    """Fits and encodes, or takes what is there if log, schema and split are the same.

    Args:
        windows: request times [start, end) in microseconds of each split.

    Raises:
        UserError: the log can't be read, a split is empty, or a binary task has one class in training.
    """
    logs = Logs(log_source, schema, options)
    fingerprint = fingerprint_of(logs, windows)
    prepared = Prepared(work / "features")
    if not prepared.is_built_from(fingerprint):
        with one_at_a_time(prepared.folder), writing(prepared.folder, BUILD, ADVICE, queue=True):
            # Another process may have built them while this one waited.
            if not prepared.is_built_from(fingerprint):
                with atomic_folder(prepared.folder) as folder:
                    _build(logs, windows, folder, fingerprint)
    return prepared


def at_hand(
    log_source: str, schema: Schema, windows: dict[str, Window], work: Path, options: BuildOptions = DEFAULTS
) -> Prepared | None:
    """What `prepare` would give, where it is there already. Raises UserError if the log can't be read."""
    prepared = Prepared(work / "features")
    return prepared if prepared.is_built_from(fingerprint_of(Logs(log_source, schema, options), windows)) else None


def encode_with(state: Path, logs: Logs, windows: dict[str, Window], folder: Path) -> dict[str, SplitCounts]:
    """Encodes splits of a log with features that were fitted to another one, as `folder`/SPLIT.

    state: folder of the fitted features. Counters and histories remember the log that is encoded.
    """
    with atomic_folder(folder) as encoded, Steps(logs, windows, encoded / "scratch") as steps:
        learnt = steps.learn(statistics=False)
        memories = encoded / "scratch" / "compacted"
        memories.mkdir(parents=True)
        last = learnt.last[0]
        steps.answer(FeaturePipeline.load(state, memories=False), memories, end=last + 1, training=None)
        counts = steps.encode(state, encoded, dict.fromkeys(windows, last))
        for name in windows:
            if counts[name].rows == 0:
                raise UserError(
                    f"the {name} split is empty: the log '{logs.log.source}' has no request between "
                    "split.validation_end and split.test_end"
                )
    return counts


def fingerprint_of(logs: Logs, windows: dict[str, Window]) -> str:
    """Changes when a file of the logs is written again, even with the same size, and with schema or splits."""
    found = [
        [
            [(file.address, file.bytes, file.version, file.partition) for file in each.files],
            [left.address for left in each.left_out],
        ]
        for each in logs.all
    ]
    text = json.dumps([FORMAT, found, logs.schema.model_dump(mode="json"), windows], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _build(logs: Logs, windows: dict[str, Window], folder: Path, fingerprint: str) -> None:
    _, end = windows["train"]
    assert end is not None
    serving, counts = folder / "serving", folder / "counts"
    for each in (serving, counts):
        each.mkdir()
    save_files(logs, folder)
    with Steps(logs, windows, folder / "scratch") as steps:
        learnt = steps.learn(statistics=True)
        logs = steps.logs
        check_splits(learnt, windows, logs.log.source)
        pipeline = FeaturePipeline(logs.schema)
        pipeline.merge(learnt.counts, learnt.key_types)
        pipeline.finish()
        save_counts(pipeline, counts)
        steps.answer(pipeline, serving, end=learnt.last[0] + 1, training=windows["train"])
        pipeline.finish_answers()
        pipeline.save(serving)
        save_latest(learnt, serving)
        # Training may use only labels that had matured when training ended; judging waits until the log's end.
        known_by = {"train": end, "validation": learnt.last[0], "test": learnt.last[0]}
        splits = steps.encode(serving, folder / "encoded", known_by)
    check_classes(logs.schema, splits["train"])
    manifest = {"fingerprint": fingerprint, **describe(logs, learnt, splits), "vocabularies": vocabularies(pipeline)}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def save_counts(pipeline: FeaturePipeline, folder: Path) -> None:
    """Writes what a pipeline was fitted from, one file each."""
    for name, counts in pipeline.counts.items():
        pq.write_table(counts.to_table(), folder / f"{name}.parquet", compression="zstd")


def load_counts(pipeline: FeaturePipeline, folder: Path) -> None:
    """Adds what `save_counts` wrote to the counts of a pipeline of the same schema."""
    for name, counts in pipeline.counts.items():
        counts.merge(type(counts).from_table(pq.read_table(folder / f"{name}.parquet")))


def save_files(logs: Logs, folder: Path) -> None:
    """Writes which files the interaction log and then each log of events has."""
    found = [[(file.address, file.bytes, file.version, file.partition) for file in each.files] for each in logs.all]
    (folder / "files.json").write_text(json.dumps(found), encoding="utf-8")


def save_latest(learnt: Learnt, folder: Path) -> None:
    """Writes the latest attributes of users and candidates."""
    for name, parts in (("user", learnt.users), ("candidate", learnt.candidates)):
        assert parts is not None
        pq.write_table(parts.finish().table, folder / f"latest.{name}.parquet", compression="zstd")


def describe(logs: Logs, learnt: Learnt, splits: dict[str, SplitCounts]) -> dict:
    """What a manifest says of the logs and of what was encoded."""
    return {
        "log": logs.log.source,
        "digest": logs.log.digest(),
        "files": len(logs.log.files),
        "rows": logs.log.rows,
        "events": {each.name: {"files": len(each.files), "rows": each.rows} for each in logs.events},
        "left_out": [{"file": left.address, "reason": left.reason} for each in logs.all for left in each.left_out],
        "first_request": format_time(learnt.first[0]),
        "last_request": format_time(learnt.last[0]),
        "request_microseconds": [learnt.first[0], learnt.last[0]],
        "splits": {name: asdict(each) for name, each in splits.items()},
    }


def vocabularies(pipeline: FeaturePipeline) -> dict[str, dict[str, int]]:
    """Of each vocabulary, the ids that training rows held and those that have a row of their own."""
    return {
        name: {"distinct": owner.counts.to_table().num_rows, "known": len(owner.vocabulary.known)}
        for name, owner in pipeline.owners.items()
    }
