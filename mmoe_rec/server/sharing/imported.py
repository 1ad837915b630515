"""What the process imports that a server's other processes are forked from; nobody else imports this.

It leaves SIGTERM, which may reach all processes of a service, to the parent: it has to outlast the workers, of which it
tells the parent how they ended, and ends with the parent.
"""

import gc
import os
import signal

# What they would import later, at a first request or while a model is loaded, is imported here too.
import orjson  # noqa: F401
import pandas  # noqa: F401
import prometheus_client.multiprocess  # noqa: F401
import pyarrow.parquet  # noqa: F401
import safetensors.torch  # noqa: F401


def _end_at_sigterm() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.register_at_fork(after_in_child=_end_at_sigterm)
gc.collect()
gc.freeze()  # collecting garbage in a worker would write to the pages of all that was imported, and so copy them
