"""A folder of scores: its manifest, the files that it may replace, and the rows that its model has learnt from."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as pt

from mmoe_rec.errors import UserError
from mmoe_rec.log.files import is_remote, local_path, source_includes
from mmoe_rec.log.rows import LogRows
from mmoe_rec.point_in_time.join import in_window
from mmoe_rec.preprocessing.build_inputs import Logs
from mmoe_rec.settings.log_columns import Scalar
from mmoe_rec.settings.sections import Split

FORMAT = 1
_MANIFEST = "_manifest.json"


def part_file_name(number: int) -> str:
    """The name of the file of a part of the log."""
    return f"part-{number:05d}.parquet"


def check_output(folder: Path, source: str) -> None:
    """Raise UserError if the output would be read as input, or the folder holds files that are no scores."""
    if source_includes(source, [folder / part_file_name(0)]):
        raise UserError(f"--input '{source}' takes in the files of --output '{folder}'; give a folder outside it")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output '{folder}' is a file; give a new or empty folder")
    ours = set[str]() if (manifest := read_manifest(folder)) is None else {_MANIFEST, *manifest["parts"]}
    if others := {each.name for each in folder.iterdir()} - ours if folder.exists() else None:
        raise UserError(
            f"--output '{folder}' holds files that are no scores, such as '{min(others)}'; give a new or empty "
            "folder, or one with scores that may be replaced"
        )


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read the manifest of a folder of scores. Returns None if there are no scores."""
    try:
        tree = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_ours = isinstance(tree, dict) and tree.get("format") == FORMAT and isinstance(tree.get("parts"), dict)
    return tree if is_ours and "fingerprint" in tree else None


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest of a folder of scores."""
    (folder / _MANIFEST).write_text(json.dumps({"format": FORMAT, **manifest}, indent=1), encoding="utf-8")


def is_complete(folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether the files of a manifest are there, with as many rows as it says."""
    try:
        return all(pq.read_metadata(folder / name).num_rows == rows for name, rows in manifest["parts"].items())
    except (OSError, pa.ArrowException):
        return False


def read_overlap_warnings(files: Iterable[str]) -> list[str]:
    """What is to be said, after a model's name, of rows that it has learnt from, where `score` wrote them to files."""
    folders = {Path(local_path(each)).parent for each in files if not is_remote(each)}
    sentences = [(read_manifest(each) or {}).get("learnt") for each in sorted(folders)]
    return [each for each in sentences if each is not None]


# Rows that a model was trained on, or its best state chosen by, whose metrics flatter it


def format_split_value(value: Scalar) -> str:
    """A value of a column of splits, so that numbers equal the same as text."""
    return value if isinstance(value, str) else str(int(value))


def has_split(logs: Logs, split: Split) -> bool:
    """Whether the rows of logs say to which split they belong."""
    return split.column is None or split.column in logs.log.uses


def find_training_rows(split: Split, rows: LogRows) -> np.ndarray:
    """Tell which rows a model with this split has learnt from. Returns shape (N,), bool."""
    if split.column is None:
        windows = split.windows()
        return in_window(rows.times(), (windows["train"][0], windows["validation"][1]))
    # As text: a column may hold numbers in one log, and the same as strings in another.
    values, learnt = (
        rows.raw_column(split.column),
        [format_split_value(each) for each in (*split.train, *split.validation)],
    )
    values = (values.cast(pa.int8()) if pt.is_boolean(values.type) else values).cast(pa.string())
    return np.asarray(pc.is_in(values, value_set=pa.array(learnt)).to_numpy(zero_copy_only=False))


def describe_training_overlap(split: Split | None, learnt: int, rows: int) -> str | None:
    """Return the sentence about rows that a model has learnt from, after the model's name. None without such rows."""
    if split is None or not learnt:
        return None
    fix = f"rows with another value in column '{split.column}'"
    if split.column is None:
        assert split.validation_end is not None, "times split the rows"
        fix = f"with --start {split.validation_end.isoformat()}"
    return f"was trained, or its best state chosen, on {learnt:,} of the {rows:,} rows: metrics flatter it; score {fix}"
