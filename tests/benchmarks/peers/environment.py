"""The environment of the peers, and what a process in it prints."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PEERS = {"rechub": "torch-rechub==0.9.0", "deepctr": "deepctr-torch==0.3.0"}
FOLDER = Path(tempfile.gettempdir(), "mmoe_rec_peers")


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
