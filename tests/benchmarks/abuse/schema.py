"""Schemathesis, a program from an environment of its own, against the server's own schema."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

from tests.benchmarks.abuse.server import served

_EXAMPLES = "200"
# The schema can't say which columns a model has, and with `partial` a wrong element is no refusal.
_LEFT_OUT = "positive_data_acceptance,negative_data_rejection"


def schema(model: Path, folder: Path, program: str) -> dict[str, Any]:
    """The part's counts."""
    with served(model, folder) as running:
        words = [program, "run", f"http://127.0.0.1:{running.port}/openapi.json", "--max-examples", _EXAMPLES]
        words += ["--exclude-checks", _LEFT_OUT, "--no-color"]
        done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=folder, timeout=1_200)
    print(done.stdout[-6_000:])
    found = re.findall(r"(\d+) (generated|passed|failures?|unique failures?|skipped|errored)", done.stdout)
    return {"exit_code": done.returncode, **{word.replace(" ", "_"): int(count) for count, word in found}}
