"""How MLflow is reached: addresses, time limits, and its errors as sentences.

With a SQLite address, such as `sqlite:///mlflow.db`, everything lies beside the database file: runs, metrics and the
registry in the file itself, files of runs and models in `mlartifacts/` in the same folder (MLflow's own default would
be `mlruns/` in whatever folder the command was started from). Any other address is a server's, which has its own place.
"""

import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from mmoe_rec.atomic import atomic_file
from mmoe_rec.errors import UserError
from mmoe_rec.progress import quiet_loggers

_ADDRESSES = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")

# What they say below these levels is about MLflow's insides, such as migrations; a user cannot act on it.
_QUIET_LOGGERS = {
    "alembic": logging.WARNING,
    "mlflow.store.db.utils": logging.CRITICAL,
    "mlflow.tracking.fluent": logging.WARNING,
    "mlflow.pyfunc": logging.ERROR,
    "mlflow.models": logging.ERROR,
    "mlflow.types": logging.ERROR,
    "mlflow.utils.environment": logging.ERROR,
}

# MLflow's client would wait two minutes for a reply, and retry seven times for as long in all: training would stand
# still. The environment's own values win.
SHORT_TIMEOUTS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
# A model may be large, and is stored before the server replies.
MODEL_TIMEOUTS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "300", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
# A server's request to retry in minutes would stop the command for that long; and we print the run's address ourselves.
_ALWAYS = {"MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}


class UnreachableError(UserError):
    """Nobody answers, or not in time, which may pass by itself."""


def read_sqlite_path(tracking_uri: str) -> Path | None:
    """The database file of a SQLite address; None for any other address."""
    parsed = urlparse(tracking_uri)
    # As in SQLAlchemy: three slashes are followed by a relative path, four by an absolute one.
    return Path(parsed.path[1:]) if parsed.scheme == "sqlite" else None


def connect(tracking_uri: str) -> Any:
    """The mlflow module, set to an address."""
    store = read_sqlite_path(tracking_uri)
    if store is not None:
        try:
            store.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"folder '{store.parent}' of the MLflow store can't be made: {error.strerror}") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of MLflow's own imports
        import mlflow
        import mlflow.pyfunc

    # MLflow writes the addresses there, where they would pass for the user's.
    variables = {name: os.environ.get(name) for name in _ADDRESSES}
    mlflow.set_tracking_uri(tracking_uri)
    mlflow.set_registry_uri(tracking_uri)
    _set_variables(variables)
    return mlflow


def make_store(tracking_uri: str) -> None:
    """Makes a SQLite store with all its tables at once, as MLflow can't use one that a kill left half made."""
    store = read_sqlite_path(tracking_uri)
    if store is not None and not store.exists():
        mlflow = connect(tracking_uri)
        with translate_errors(tracking_uri), atomic_file(store, replace=False) as temporary:
            mlflow.MlflowClient(f"sqlite:///{temporary}").search_experiments(max_results=1)


@contextmanager
def translate_errors(tracking_uri: str, model_uri: str | None = None, catch_all: bool = False) -> Iterator[None]:
    """Quiet MLflow; what it raises becomes a UserError. anything: also what MLflow itself does not expect."""
    import sqlalchemy.exc
    from mlflow.exceptions import MlflowException

    place = f"MLflow at '{hide_password(tracking_uri)}'"
    if tracking_uri == os.environ.get("MLFLOW_TRACKING_URI", "").strip():
        place += " (the address in the variable MLFLOW_TRACKING_URI)"
    refusal = f"'{model_uri}' can't be loaded from {place}" if model_uri else f"{place} refuses"
    try:
        with quiet_loggers(_QUIET_LOGGERS), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"mlflow\..*")
            yield
    except UserError:
        raise
    except MlflowException as error:
        status = error.get_http_status_code()
        # 500 is also MLflow's code for whatever has no other one.
        if status == 503 or (status >= 500 and "API request to" in str(error)):
            raise UnreachableError(f"{place} does not answer ({summarize(error)})") from None
        raise UserError(f"{refusal}: {summarize(error).rstrip('.')}") from None
    except (sqlalchemy.exc.OperationalError, OSError) as error:
        raise UnreachableError(f"{place} can't be used: {summarize(error)}") from None
    except sqlalchemy.exc.SQLAlchemyError as error:
        raise UserError(f"{place} can't be used: {summarize(error)}") from None
    except Exception as error:  # of a vendor's library that stores files
        if not catch_all:
            raise
        kind = UnreachableError if re.search("Connect|Timeout", type(error).__name__) else UserError
        raise kind(f"{refusal}: {type(error).__name__}: {summarize(error)}") from None


@contextmanager
def open_client(
    tracking_uri: str, model_uri: str | None = None, timeouts: dict[str, str] = SHORT_TIMEOUTS
) -> Iterator[Any]:
    """MLflow's client, whose errors become sentences. address: of a model that is looked up."""
    mlflow = connect(tracking_uri)
    with client_timeouts(timeouts), translate_errors(tracking_uri, model_uri):
        yield mlflow.MlflowClient()


# What matters in the long errors of requests, urllib3 and SQLAlchemy.
_CAUSES = (
    (r"\[Errno -?\d+\] ([^'\")\]]+)", r"\1"),
    (r"(?i)timed out", "no reply in time"),
    (r"too many (\d+) error responses", r"HTTP status \1"),
    (r"Connection(Reset|Aborted|Refused)Error|Remote end closed", "the connection broke off"),
    (r"\(\w+\.\w*Error\) ([^\n]+)", r"\1"),
)


def summarize(error: Exception) -> str:
    """What is wrong, in a few words."""
    text = str(error)
    for pattern, cause in _CAUSES:
        if found := re.search(pattern, text):
            return hide_password(found.expand(cause).strip())
    return hide_password(text.splitlines()[0][:300] if text.strip() else type(error).__name__)


def hide_password(text: str) -> str:
    """Without the password of an address."""
    return re.sub(r"(://[^:/@\s]*):[^@/\s]*@", r"\1:***@", text)


def truncate_markdown(markdown: str, max_chars: int) -> str:
    """A text of at most so many characters; a block of code that is cut is closed."""
    if len(markdown) <= max_chars:
        return markdown
    cut = markdown[: max_chars - 10].rstrip()
    return f"{cut} …" + ("\n```" if cut.count("```") % 2 else "")


@contextmanager
def client_timeouts(timeouts: dict[str, str]) -> Iterator[None]:
    """How long MLflow's client waits and how often it tries, where the environment does not say so itself."""
    wanted = timeouts | _ALWAYS
    before = {name: os.environ.get(name) for name in wanted}
    ours = {name: value for name, value in wanted.items() if before[name] in (None, SHORT_TIMEOUTS.get(name))}
    _set_variables(dict(ours))
    try:
        yield
    finally:
        _set_variables({name: before[name] for name in ours})


def _set_variables(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        elif os.environ.get(name) != value:
            os.environ[name] = value
