"""One file a command: its options and what it does. `mmoe-rec COMMAND` runs it."""

import mmoe_rec.jobs  # noqa: F401 - how threads wait is decided before torch is loaded
