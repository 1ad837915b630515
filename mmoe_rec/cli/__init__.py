"""Command line of mmoe-rec, one file for each command or small group of commands."""

from importlib.util import find_spec

if find_spec("click") is None:
    raise SystemExit(
        "error: the package click is not installed: pip install 'click>=8.2,<9', or read docs/how-to/install.md"
    )
