"""Ends of a command that are not the program's fault: one clear sentence and an exit code, never a traceback; and
requests to stop, by a cluster's SIGTERM, by Ctrl-C or by a terminal that closes.
"""

import errno
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.util import find_spec
from types import FrameType
from typing import Any

EXIT_CODE = 2
STOPPED_EXIT_CODE = 75  # "temporary failure, try again" of sysexits.h


class UserError(Exception):
    """One sentence for the user: which file, column, setting or row, what was expected, what was found, what to do."""


class RequestError(UserError):
    """One sentence for the caller: which column, option or row, what was expected, what was found."""


class StoppedError(Exception):
    """One sentence when the user, or a cluster, has asked the command to stop: what was kept, how to go on."""


MAX_QUOTE_CHARS = 60


def quoted(value: object) -> str:
    """A name or value of the caller's as a sentence gives it, in quotes if it is text: enough of it to find it by."""
    text = value if isinstance(value, str) else str(value)
    text = text if len(text) <= MAX_QUOTE_CHARS else f"{text[:MAX_QUOTE_CHARS]}..."
    return repr(text) if isinstance(value, str) else text


def suggest(name: str, names: Iterable[str]) -> str:
    """The end of a sentence about a name that there is not: the nearest one that there is, or all of them."""
    valid = list(names)
    near = get_close_matches(name[:100], valid, 1)
    return f"did you mean '{near[0]}'?" if near else f"valid are {', '.join(valid) or 'none'}"


def one_line(error: BaseException) -> str:
    """What is told of an error that was not written for people: its kind and its words, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def require_packages(purpose: str, extra: str, *modules: str) -> None:
    """Raises UserError where modules that come with an extra of this package are not installed."""
    if missing := [name for name in modules if find_spec(name) is None]:
        raise UserError(
            f"{purpose} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            f"install the extra {extra}, as in `pip install 'mmoe-rec[{extra}]'`"
        )


@contextmanager
def exit_with_message() -> Iterator[None]:
    """Turn a `UserError`, or a full disk, into one line on stderr and exit code 2, `StoppedError` into one and code 75;
    any other exception passes with its traceback. Works as a decorator of a command's `main`, and as a context."""
    try:
        yield
    except UserError as error:
        one_line = " ".join(str(error).splitlines())
        print(f"error: {one_line}", file=sys.stderr)
        raise SystemExit(EXIT_CODE) from None
    except StoppedError as stopped:
        print(f"stopped: {stopped}", file=sys.stderr)
        raise SystemExit(STOPPED_EXIT_CODE) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" where '{error.filename}' is written" if error.filename else ""
        print(f"error: the disk is full{where}: make room there, and try it again", file=sys.stderr)
        raise SystemExit(EXIT_CODE) from None


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that ask a command to stop."""

Handler = Callable[[int, FrameType | None], object]


def catch_stop_signals(handle: Handler) -> dict[signal.Signals, Any]:
    """Call a function at each signal that asks to stop. Only the main thread can catch signals; others catch none.

    SIGHUP stays ignored if it was, as under `nohup`. After the first signal it is ignored, because the kernel and the
    shell each send it when a terminal closes.

    Returns:
        The handlers that were replaced.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}

    def catch(number: int, frame: FrameType | None) -> None:
        handle(number, frame)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    caught = [kind for kind in STOP_SIGNALS if kind != signal.SIGHUP or not is_ignored]
    return {kind: signal.signal(kind, catch) for kind in caught}


class StopRequest:
    """A note of the first signal that asks to stop, so that a loop can end cleanly. A second signal acts at once.

    Attributes:
        signal: Name of the signal, None before it came. Outside the main thread none comes.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        self._before = catch_stop_signals(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)
        self._before = {}
