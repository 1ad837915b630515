"""Runs a module as if torchrec and fbgemm were not installed: python -m tests.training.blocked mmoe_rec train ..."""

from __future__ import annotations

import importlib.abc
import runpy
import sys
from collections.abc import Sequence


class Blocked(importlib.abc.MetaPathFinder):
    """Finds nothing of these packages, and lets nobody else find it."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: object = None) -> None:
        """As a package that is not there."""
        if fullname.partition(".")[0] in ("torchrec", "fbgemm_gpu"):
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


if __name__ == "__main__":
    sys.meta_path.insert(0, Blocked())
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
