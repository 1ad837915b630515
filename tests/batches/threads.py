"""What is left of background threads."""

import threading


def prefetch_threads() -> list[threading.Thread]:
    """The threads of `Prefetch` that are alive."""
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]
