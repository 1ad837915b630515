"""What is left of background threads."""

import threading


def background_threads() -> list[threading.Thread]:
    """The threads of `Prefetch` and of readers that are alive."""
    return [thread for thread in threading.enumerate() if thread.name.startswith(("prefetch", "reader"))]
