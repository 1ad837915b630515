"""Folders with a scored log: their manifest, checks before writing, and warnings about rows seen in training."""

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
    """Return the name of the file for part `number` of the log."""
    return f"part-{number:05d}.parquet"


def check_output(folder: Path, source: str) -> None:
    """Raise UserError if the output would be read as input, or the folder contains other files than scores.

    Args:
        folder: Output folder.
        source: Folder, file or glob of the input.
    """
    if source_includes(source, [folder / part_file_name(0)]):
        problem = f"--input '{source}' includes the files of --output '{folder}'"
        raise UserError(f"{problem}. Give an output folder outside the input.")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output '{folder}' is a file. Give a new or empty folder.")
    expected = set[str]() if (manifest := read_manifest(folder)) is None else {_MANIFEST, *manifest["parts"]}
    if unexpected := {file.name for file in folder.iterdir()} - expected if folder.exists() else None:
        raise UserError(
            f"--output '{folder}' contains other files than scores, such as '{min(unexpected)}'. Give a new or empty "
            "folder, or a folder with scores to replace."
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
    """Write the manifest of a folder of scores.

    Args:
        folder: Folder of scores.
        manifest: Contents of the manifest as JSON values.
    """
    (folder / _MANIFEST).write_text(json.dumps({"format": FORMAT, **manifest}, indent=1), encoding="utf-8")


def is_complete(folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Return whether all files of a manifest exist with the right number of rows.

    Args:
        folder: Folder of scores.
        manifest: Manifest of the folder.
    """
    try:
        return all(pq.read_metadata(folder / name).num_rows == rows for name, rows in manifest["parts"].items())
    except (OSError, pa.ArrowException):
        return False


def read_overlap_warnings(files: Iterable[str]) -> list[str]:
    """Return the warnings of `describe_training_overlap` in the manifests of the folders of these files."""
    folders = {Path(local_path(file)).parent for file in files if not is_remote(file)}
    warnings = [(read_manifest(folder) or {}).get("seen_in_training") for folder in sorted(folders)]
    return [warning for warning in warnings if warning is not None]


# Metrics are too optimistic on rows that a model was trained or selected on.


def format_split_value(value: Scalar) -> str:
    """Format a value of a split column as text, so that a number or a bool matches the same value stored as text."""
    return value if isinstance(value, str) else str(int(value))


def has_split(logs: Logs, split: Split) -> bool:
    """Return whether the split of each row is known: times define it, or the log has the split column.

    Args:
        logs: Opened logs.
        split: Section `split` of the settings.
    """
    return split.column is None or split.column in logs.log.uses


def find_training_rows(split: Split, rows: LogRows) -> np.ndarray:
    """Return whether each row is in the training or validation split of a model, (N,) bool.

    Args:
        split: Section `split` of the model's settings.
        rows: N rows of a log.
    """
    if split.column is None:
        windows = split.windows()
        return in_window(rows.times(), (windows["train"][0], windows["validation"][1]))
    # Compare as text, because a column may contain numbers in one log and the same numbers as strings in another.
    values = rows.raw_column(split.column)
    training_values = [format_split_value(value) for value in (*split.train, *split.validation)]
    values = (values.cast(pa.int8()) if pt.is_boolean(values.type) else values).cast(pa.string())
    return np.asarray(pc.is_in(values, value_set=pa.array(training_values)).to_numpy(zero_copy_only=False))


def describe_training_overlap(split: Split | None, training_rows: int, num_rows: int) -> str | None:
    """Return a warning about rows that the model has seen in training, None if there are none.

    Callers put the name of the model before it: "MODEL was trained or selected on 3 of the 10 rows, ...".

    Args:
        split: Section `split` of the model's settings. None gives no warning.
        training_rows: Number of rows seen in training.
        num_rows: Number of all rows.
    """
    if split is None or not training_rows:
        return None
    fix = f"rows with another value in column '{split.column}'"
    if split.column is None:
        assert split.validation_end is not None, "times split the rows"
        fix = f"with --start {split.validation_end.isoformat()}"
    overlap = f"was trained or selected on {training_rows:,} of the {num_rows:,} rows"
    return f"{overlap}, so their metrics are too optimistic. Score {fix}"
