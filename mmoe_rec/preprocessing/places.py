"""Names and folders of a command's results."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mmoe_rec.errors import UserError
from mmoe_rec.log.files import is_remote
from mmoe_rec.settings.sections import Settings


def short_names(addresses: Sequence[str]) -> dict[str, str]:
    """Addresses with names for files and folders, by the ends of their paths that tell them apart; other addresses are
    names. Raises UserError where one comes twice."""
    if twice := next((each for each in addresses if addresses.count(each) > 1), None):
        raise UserError(f"'{twice}' is given twice, and would be compared with itself; give --against another one")
    parts = [[each] if ":" in each else each.rstrip("/").split("/") for each in addresses]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return dict(zip(addresses, names, strict=True))
    return {each: each for each in addresses}


def check_out(out: Path, settings: Settings | None = None) -> None:
    """Raises UserError for a folder of results that is a file, or lies where the log or what is made of it lies."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out '{out}' is a file; name a folder")
    if settings is None:
        return
    real, work = Path(os.path.realpath(out)), Path(settings.data.work)
    sources = [settings.data.log, *(each.path for each in settings.data.events.values())]
    taken = [Path(each) for each in sources if not is_remote(each) and Path(each).is_dir()]
    ours = ("features", "checkpoints", "model", "comparison", "tuning", "unsent")
    taken += [work / name for name in ours]
    inside = next((each for each in taken if real.is_relative_to(os.path.realpath(each))), None)
    if inside is not None or real == Path(os.path.realpath(work)):
        raise UserError(f"--out '{out}' lies in '{inside or work}', which holds other things; name another folder")
