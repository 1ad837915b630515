"""A process that ranks, as others see it."""

from contextlib import suppress
from multiprocessing.connection import Connection

from mmoe_rec.server.sharing.passes import Mark, Passes


def rank(mark: Mark, pipe: Connection) -> None:
    """A worker that ranks until it is told to end."""
    own = Passes(mark)
    own.begin()
    pipe.send("ranks")
    with suppress(EOFError):
        pipe.recv()
    own.end()
