from pathlib import Path
from typing import Any


def slow(model: Path, folder: Path) -> dict[str, Any]:
    """The part."""
    return {}
