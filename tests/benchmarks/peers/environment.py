"""The environment of the peers, and what they predict in it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mmoe_rec.settings.sections import Settings

PEERS = {"rechub": "torch-rechub==0.9.0", "deepctr": "deepctr-torch==0.3.0"}
FOLDER = Path(tempfile.gettempdir(), "mmoe_rec_peers")
BATCH = 1024


def peers_environment(folder: Path = FOLDER) -> str:
    """The Python of an environment with the peers and this environment's release of torch."""
    import torch

    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run(["uv", "venv", "--quiet", "--python", sys.executable, str(folder)], check=True)
    # DeepCTR-Torch imports requests and pip, which it does not ask for.
    needed = [*PEERS.values(), "requests", "pip", f"torch=={torch.__version__.partition('+')[0]}"]
    subprocess.run(["uv", "pip", "install", "--quiet", "--python", str(python), *needed], check=True)
    return str(python)


def run(command: Sequence[str], **environment: str) -> Any:
    """What a command prints last, as JSON."""
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=os.environ | environment)
    if finished.returncode != 0:
        raise SystemExit(f"{shlex.join(command)} failed")
    return json.loads(finished.stdout.splitlines()[-1])


def write_rows_once(settings: Settings, folder: Path, *, remembered: bool = True) -> None:
    """Writes the rows of a settings' features for the peers, unless a run before has; see `rows.write_rows`."""
    from mmoe_rec.jobs.places import log_and_place
    from mmoe_rec.preprocessing.prepare import features_in_use
    from tests.benchmarks.peers.rows import write_rows

    if (folder / "inputs.json").is_file():
        return
    made = folder.with_suffix(".tmp")
    with features_in_use(*log_and_place(settings), "a benchmark") as prepared:
        write_rows(prepared, settings.schema_, made, remembered=remembered)
    made.rename(folder)


def predict(python: str, peer: str, rows: Path, out: Path, epochs: int, seed: int = 0, **env: str) -> np.ndarray:
    """(N, T) what a peer predicts of the test rows, trained unless a run before has left its predictions in `out`."""
    if not out.is_file():
        made = out.with_suffix(".tmp.npy")
        words = [peer, str(rows), str(epochs), str(BATCH), str(seed), str(made)]
        told = run([python, "-m", "tests.benchmarks.peers.trained", *words], **env)
        print(peer, out, told, flush=True)
        made.rename(out)
    return np.load(out)
