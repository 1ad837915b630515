"""One file a command: its options and what it does. `mmoe-rec COMMAND` runs it."""

from importlib.util import find_spec

import mmoe_rec.jobs  # noqa: F401 - how threads wait is decided before torch is loaded

if find_spec("click") is None:
    raise SystemExit(
        "error: the package click is not installed: pip install 'click>=8.2,<9', or all packages as README.md says"
    )
