"""A rank that writes down the rows it reads, until it is killed. A module of its own for processes to import."""

import json
import time
from pathlib import Path
from typing import Any

from mmoe_rec.batches.encoded_rows import EncodedRows
from mmoe_rec.batches.order import Position
from mmoe_rec.batches.reader import TrainingReader
from tests.batches.encoded_files import LAYOUT, real


def consume(
    encoded: Path, written: Path, position: dict[str, Any] | None, epochs: int, pause: float, **options: int
) -> None:
    """Appends one line of JSON a batch: its real rows and the position after it; `options` are the reader's."""
    reader = TrainingReader(EncodedRows(encoded, LAYOUT), **options)
    begin = reader.position(0) if position is None else Position.from_dict(position)
    with written.open("a", encoding="utf-8") as file:
        for rows, after in reader.resume(begin, epochs):
            file.write(json.dumps({"rows": real(rows), "position": after.to_dict()}) + "\n")
            file.flush()
            time.sleep(pause)
