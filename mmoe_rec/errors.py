"""Errors for the user, which end a command with a clear message and an exit code instead of a traceback.

The module also handles requests to stop: SIGTERM from a cluster, Ctrl-C, or a terminal that closes.
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
STOPPED_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h, a temporary failure that is worth another try.


class UserError(Exception):
    """An error that the user can fix. The message names the file, column, setting or row, the problem and the fix."""


class RequestError(UserError):
    """An error in a request to the server or the Python API. The message names the column, option or row."""


class StoppedError(Exception):
    """The end of a command after a request to stop. The message says what was saved and how to resume."""


MAX_QUOTE_CHARS = 60


def quoted(value: object) -> str:
    """Return a caller's value for use in a message. It is cut to `MAX_QUOTE_CHARS`, and text gets quotes."""
    text = value if isinstance(value, str) else str(value)
    text = text if len(text) <= MAX_QUOTE_CHARS else f"{text[:MAX_QUOTE_CHARS]}..."
    return repr(text) if isinstance(value, str) else text


def suggest(name: str, names: Iterable[str]) -> str:
    """Return a message part that suggests the valid name most similar to an unknown name.

    If no valid name is similar, the message part lists all valid names.

    Args:
        name: The unknown name.
        names: All valid names.
    """
    valid = list(names)
    near = get_close_matches(name[:100], valid, 1)
    return f"did you mean '{near[0]}'?" if near else f"valid are {', '.join(valid) or 'none'}"


def one_line(error: BaseException) -> str:
    """Return an error's type and message as one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if the message is empty."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def require_packages(purpose: str, extra: str, *modules: str) -> None:
    """Raise an error if modules of an optional extra of this package are not installed.

    Args:
        purpose: Feature that needs the modules, such as "an ONNX export".
        extra: Extra that installs the modules.
        *modules: Names of the modules.

    Raises:
        UserError: A module is missing.
    """
    if missing := [name for name in modules if find_spec(name) is None]:
        raise UserError(
            f"{purpose} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed. "
            f"Install the extra {extra}: pip install 'mmoe-rec[{extra}]'"
        )


@contextmanager
def exit_with_message() -> Iterator[None]:
    """Print expected errors as one line on stderr, as a context manager or as a decorator of a command's `main`.

    `UserError` and a full disk exit with code 2, `StoppedError` with code 75. Other exceptions keep their traceback.
    """
    try:
        yield
    except UserError as error:
        print("error:", *str(error).splitlines(), file=sys.stderr)
        raise SystemExit(EXIT_CODE) from None
    except StoppedError as stopped:
        print(f"stopped: {stopped}", file=sys.stderr)
        raise SystemExit(STOPPED_EXIT_CODE) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" where '{error.filename}' is written" if error.filename else ""
        print(f"error: the disk is full{where}. Free some space and try again.", file=sys.stderr)
        raise SystemExit(EXIT_CODE) from None


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that ask a command to stop."""

Handler = Callable[[int, FrameType | None], object]


def catch_stop_signals(handle: Handler) -> dict[signal.Signals, Any]:
    """Call `handle` at each signal that asks to stop, and return the replaced handlers.

    Outside the main thread, which alone gets signals, the function does nothing. If SIGHUP was ignored before, as under
    `nohup`, it stays ignored. After the first signal, SIGHUP is ignored too, because both the kernel and the shell send
    it when a terminal closes.
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
    """Record of the first signal that asks to stop, so that a loop can end cleanly.

    A second signal has its usual effect, so it ends the process at once.

    Attributes:
        signal: Name of the signal, None until a signal arrives. Outside the main thread, it stays None.
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
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
