"""What tests of scoring share."""

import signal
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.inference.batch_scoring import ScoredLog, score_log
from tests.fork_server import run_command


def write_finely(folder: Path, *tables: pa.Table) -> Path:
    """One Parquet file a table, in row groups of few rows."""
    folder.mkdir(parents=True)
    for index, table in enumerate(tables):
        pq.write_table(table, folder / f"{index}.parquet", row_group_size=30)
    return folder


def read(folder: Path) -> pd.DataFrame:
    """The scored rows, in order."""
    return pd.concat([pq.read_table(path).to_pandas() for path in sorted(folder.glob("part-*.parquet"))])


def scored(*arguments: Any, **options: Any) -> tuple[pd.DataFrame, ScoredLog]:
    """The rows that `score_log` writes."""
    done = score_log(*arguments, **options)
    return read(done.folder), done


_KILLED = """
import os, signal, sys
from mmoe_rec.inference import scored_files as score_files
from mmoe_rec.inference import batch_scoring as score
from mmoe_rec.preprocessing import build_steps as steps
if __name__ == "__main__":
    model, log, output, place, calls = sys.argv[1:]
    steps.ROWS_PER_PART = 40
    module, name = {
        "look_up": (score.Steps, "look_up"),
        "score": (score, "scored_table"),
        "rank": (score, "rank_rows"),
        "finish": (score.np, "load"),
        "put": (score_files, "put_folder"),
    }[place]
    left, before = int(calls), getattr(module, name)
    def killed(*arguments, **options):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return before(*arguments, **options)
    setattr(module, name, killed)
    score.score_log(model, log, output, overrides=["--data.workers", "1"])
"""


def killed_run(scratch: Path, model: Path, log: Path, output: Path, place: str, calls: int) -> None:
    """A run that is killed by SIGKILL at a place in the program, when it has come by there so many times."""
    script = scratch / "killed.py"
    script.write_text(_KILLED, encoding="utf-8")
    done = run_command(str(script), *map(str, (model, log, output, place, calls)))
    assert done.returncode == -signal.SIGKILL, done.stderr
