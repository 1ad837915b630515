from pathlib import Path
from typing import Any


def sigterm(model: Path, folder: Path) -> dict[str, Any]:
    """The part."""
    return {}
