"""Where scores go: a folder that appears whole, and a hidden one beside it in which a run that was cut short goes on.

<output>/_manifest.json            what was scored by which model; the folder is whole if it is there
<output>/part-00000.parquet       the scored rows, in the input's order
.<output>.scoring/                of a run that has not ended: its fingerprint, and what it has done so far
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.atomic import atomic_file, put_folder
from mmoe_rec.errors import UserError
from mmoe_rec.log.columns import zone_rules
from mmoe_rec.log.files import is_remote, local_path, would_find
from mmoe_rec.preprocessing.logs import Logs
from mmoe_rec.progress import say

FORMAT = 1
SCORES, RANKS = "scores", "ranks"  # channels on which rows are sent to be ranked, and sent back


def finished_name(number: int) -> str:
    """The name of the file of a part of the log."""
    return f"part-{number:05d}.parquet"


def scored_file(scored: Path, number: int) -> Path:
    """The file of a part's rows before they are ranked: their keys, predictions and scores."""
    return scored / f"part-{number:05d}.arrow"


@dataclass(frozen=True)
class Output:
    """An output folder and the working folder beside it."""

    folder: Path

    @property
    def work(self) -> Path:
        """What a run that has not ended has done so far."""
        target = Path(os.path.realpath(self.folder))
        return target.with_name(f".{target.name}.scoring")

    @property
    def known(self) -> Path:
        """What counters and histories knew, and the times of requests."""
        return self.work / "known"

    @property
    def scored(self) -> Path:
        """Parts of the log that were scored and are not yet ranked."""
        return self.work / "scored"

    @property
    def finished(self) -> Path:
        """What becomes the output."""
        return self.work / "finished"

    def check(self, source: str) -> None:
        """Raises UserError where the output would be read as input, or the folder holds something else than scores."""
        address = str(self.folder)
        planted = [each / finished_name(0) for each in (self.folder, self.finished)]
        if not is_remote(source) and would_find(local_path(source), planted):
            raise UserError(f"--input '{source}' takes in the files of --output '{address}'; give a folder outside it")
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"--output '{address}' is a file; give a new or empty folder")
        if self.folder.is_dir():
            found = sorted(each.name for each in self.folder.iterdir())
            manifest = self.manifest
            others = [name for name in found if manifest is None or name not in {"_manifest.json", *manifest["parts"]}]
            if others:
                raise UserError(
                    f"--output '{address}' holds something else than scores, such as '{others[0]}'; give a new or "
                    "empty folder, or one with scores that may be replaced"
                )

    @property
    def manifest(self) -> dict[str, Any] | None:
        """What the manifest of a whole folder says, None where there are no scores."""
        try:
            found = json.loads((self.folder / "_manifest.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        is_ours = isinstance(found, dict) and found.get("format") == FORMAT and isinstance(found.get("parts"), dict)
        return found if is_ours and "fingerprint" in found else None

    def is_whole(self, manifest: Mapping[str, Any]) -> bool:
        """Whether the files of a manifest are there, with as many rows as it says."""
        try:
            return all(pq.read_metadata(self.folder / name).num_rows == n for name, n in manifest["parts"].items())
        except (OSError, pa.ArrowException):
            return False

    def begin(self, fingerprint: str) -> None:
        """Makes the working folder, or takes that of a run of the same fingerprint; another one's is removed."""
        begun = self.work / "begun.json"
        if self.work.exists():
            try:
                same = json.loads(begun.read_text(encoding="utf-8")) == fingerprint
            except (OSError, ValueError):
                same = False
            if not same:
                say(
                    f"a run for '{self.folder}' that has not ended was of another input, model or settings, so scoring "
                    "starts anew"
                )
                self.forget()
        for each in (self.scored, self.finished):
            each.mkdir(parents=True, exist_ok=True)
        if not begun.is_file():
            with atomic_file(begun) as path:
                path.write_text(json.dumps(fingerprint), encoding="utf-8")

    def end(self, manifest: dict[str, Any]) -> None:
        """Puts the finished files and their manifest in the output's place."""
        with atomic_file(self.finished / "_manifest.json") as path:
            path.write_text(json.dumps({"format": FORMAT, **manifest}, indent=1), encoding="utf-8")
        put_folder(self.finished, Path(os.path.realpath(self.folder)))
        self.forget()

    def forget(self) -> None:
        """Removes the working folder."""
        shutil.rmtree(self.work, ignore_errors=True)


def learnt_from(files: Iterable[str]) -> list[str]:
    """What is to be said, after a model's name, of rows that it has learnt from, where `score` wrote them to files."""
    folders = {Path(local_path(each)).parent for each in files if not is_remote(each)}
    told = [(Output(each).manifest or {}).get("learnt") for each in sorted(folders)]
    return [each for each in told if each is not None]


def fingerprint_of(logs: Logs, *settings: object) -> str:
    """Changes with the files of the logs, when one is written again, with how they are read, and with the settings."""
    files = [[(file.address, file.bytes, file.version, file.in_path) for file in each.files] for each in logs.all]
    options = [logs.options.duplicates, logs.options.several_times, logs.options.rows_in_memory]
    text = json.dumps([FORMAT, zone_rules(logs.schema), files, logs.schema.identity(), options, settings], default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
