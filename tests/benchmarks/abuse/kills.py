from pathlib import Path
from typing import Any


def kills(model: Path, folder: Path) -> dict[str, Any]:
    """The part."""
    return {}
