"""How a command is started by whoever reads about it: as `python -m pipelines.NAME`, or as `mmoe-rec NAME`."""

import re
import sys
from pathlib import Path

NAMES = (
    "train",
    "evaluate",
    "metrics",
    "promote",
    "baselines",
    "tune_weights",
    "off_policy",
    "score",
    "serve",
    "join_outcomes",
    "replay",
    "features",
    "refresh",
    "inspect",
    "tune",
    "plan",
    "edit_experts",
    "sweep_experts",
    "export",
    "doctor",
)
"""The commands of the package. Those that make the logs of data sets are in the repository alone."""
FOLDERS = dict.fromkeys(("metrics", "promote", "baselines", "tune_weights", "off_policy"), "evaluation")
"""Where those of the repository's commands lie that have a folder: `python -m pipelines.FOLDER.NAME`."""
_INSTALLED = Path(__file__).parent / "settings" / "template.yaml"
TEMPLATE = str(_INSTALLED) if _INSTALLED.is_file() else "configs/template.yaml"
"""The settings file to start from: an installed package has it, the repository keeps it with its other ones."""
_MODULE = re.compile(rf"(python\s+)?-m\s+pipelines\.(?:(?:{'|'.join({*FOLDERS.values()})})\.)?({'|'.join(NAMES)})\b")


def is_installed_command() -> bool:
    """Whether this process was started as `mmoe-rec` or `python -m mmoe_rec`."""
    started = Path(sys.argv[0])
    return started.stem == "mmoe-rec" or (started.name == "__main__.py" and started.parent.name == "mmoe_rec")


def spelled(text: str) -> str:
    """A text that names commands by their modules, as the reader would start them."""
    if not is_installed_command():
        return text

    def command(match: re.Match[str]) -> str:
        name = match[2].replace("_", "-")
        return f"mmoe-rec {name}" if match[1] else f"-m mmoe_rec {name}"

    return _MODULE.sub(command, text)
