"""Connection to MLflow: URIs, timeouts, and MLflow's errors as short sentences.

With a SQLite URI such as `sqlite:///mlflow.db`, the database file contains runs, metrics and the registry. The folder
`mlartifacts/` next to the database file contains the files of runs and models. With any other URI, an MLflow server
chooses where to store files.
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

_URI_VARIABLES = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")

# Logger -> minimum level of messages to show. Other messages describe MLflow internals that users can't act on.
_QUIET_LOGGERS = {
    "alembic": logging.WARNING,
    "mlflow.store.db.utils": logging.CRITICAL,
    "mlflow.tracking.fluent": logging.WARNING,
    "mlflow.pyfunc": logging.ERROR,
    "mlflow.models": logging.ERROR,
    "mlflow.types": logging.ERROR,
    "mlflow.utils.environment": logging.ERROR,
}

# By default, MLflow's client waits two minutes for a reply and retries seven times, which would block training. Values
# of these variables in the user's environment take precedence.
SHORT_TIMEOUTS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
# Uploads of large models take long, because the server replies after storing them.
MODEL_TIMEOUTS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "300", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
# Ignore Retry-After, which could block the command for minutes. Print no URL, because the command prints it itself.
_ALWAYS = {"MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}


class UnreachableError(UserError):
    """Error that MLflow does not answer, or not in time. The error may be temporary."""


def read_sqlite_path(tracking_uri: str) -> Path | None:
    """Return the database file of a SQLite URI. None for any other URI."""
    parsed = urlparse(tracking_uri)
    # As in SQLAlchemy, three slashes precede a relative path and four an absolute path.
    return Path(parsed.path[1:]) if parsed.scheme == "sqlite" else None


def connect(tracking_uri: str) -> Any:
    """Return the module mlflow, with its tracking and registry URI set."""
    store = read_sqlite_path(tracking_uri)
    if store is not None:
        try:
            store.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"folder '{store.parent}' of the MLflow store can't be created: {error.strerror}") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # MLflow's own imports raise these warnings.
        import mlflow
        import mlflow.pyfunc

    # MLflow writes the URIs to these variables, where they would look like the user's own values.
    variables = {name: os.environ.get(name) for name in _URI_VARIABLES}
    mlflow.set_tracking_uri(tracking_uri)
    mlflow.set_registry_uri(tracking_uri)
    _set_variables(variables)
    return mlflow


def make_store(tracking_uri: str) -> None:
    """Create a missing SQLite store with all its tables atomically. MLflow can't use a partly created store."""
    store = read_sqlite_path(tracking_uri)
    if store is not None and not store.exists():
        mlflow = connect(tracking_uri)
        with translate_errors(tracking_uri), atomic_file(store, replace=False) as temporary:
            mlflow.MlflowClient(f"sqlite:///{temporary}").search_experiments(max_results=1)


@contextmanager
def translate_errors(tracking_uri: str, model_uri: str | None = None, catch_all: bool = False) -> Iterator[None]:
    """Silence MLflow's logs, and turn its exceptions into UserErrors.

    Args:
        tracking_uri: URI of the MLflow server or store.
        model_uri: URI of the model to look up, for messages.
        catch_all: Whether to also translate exceptions of other libraries than MLflow and SQLAlchemy.

    Raises:
        UnreachableError: MLflow does not answer.
        UserError: MLflow refuses the call.
    """
    import sqlalchemy.exc
    from mlflow.exceptions import MlflowException

    server = f"MLflow at '{hide_password(tracking_uri)}'"
    if tracking_uri == os.environ.get("MLFLOW_TRACKING_URI", "").strip():
        server += " (the URI in the variable MLFLOW_TRACKING_URI)"
    refusal = f"'{model_uri}' can't be loaded from {server}" if model_uri else f"{server} refuses"
    try:
        with quiet_loggers(_QUIET_LOGGERS), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"mlflow\..*")
            yield
    except UserError:
        raise
    except MlflowException as error:
        status = error.get_http_status_code()
        # MLflow also gives status 500 to its own errors. Errors of requests to the server have this text.
        if status == 503 or (status >= 500 and "API request to" in str(error)):
            raise UnreachableError(f"{server} does not answer ({summarize(error)})") from None
        raise UserError(f"{refusal}: {summarize(error).rstrip('.')}") from None
    except (sqlalchemy.exc.OperationalError, OSError) as error:
        raise UnreachableError(f"{server} can't be used: {summarize(error)}") from None
    except sqlalchemy.exc.SQLAlchemyError as error:
        raise UserError(f"{server} can't be used: {summarize(error)}") from None
    except Exception as error:  # A storage vendor's library has raised it.
        if not catch_all:
            raise
        kind = UnreachableError if re.search("Connect|Timeout", type(error).__name__) else UserError
        raise kind(f"{refusal}: {type(error).__name__}: {summarize(error)}") from None


@contextmanager
def open_client(
    tracking_uri: str, model_uri: str | None = None, timeouts: dict[str, str] = SHORT_TIMEOUTS
) -> Iterator[Any]:
    """Open an MLflow client whose exceptions become UserErrors.

    Args:
        tracking_uri: URI of the MLflow server or store.
        model_uri: URI of the model to look up, for messages.
        timeouts: Environment variables to set, see `client_timeouts`.
    """
    mlflow = connect(tracking_uri)
    with client_timeouts(timeouts), translate_errors(tracking_uri, model_uri):
        yield mlflow.MlflowClient()


# Pattern of the cause in a long error message of requests, urllib3 or SQLAlchemy, and the text to show instead.
_CAUSES = (
    (r"\[Errno -?\d+\] ([^'\")\]]+)", r"\1"),
    (r"(?i)timed out", "no reply in time"),
    (r"too many (\d+) error responses", r"HTTP status \1"),
    (r"Connection(Reset|Aborted|Refused)Error|Remote end closed", "the connection broke off"),
    (r"\(\w+\.\w*Error\) ([^\n]+)", r"\1"),
)


def summarize(error: Exception) -> str:
    """Return the cause of an error in a few words."""
    text = str(error)
    for pattern, cause in _CAUSES:
        if match := re.search(pattern, text):
            return hide_password(match.expand(cause).strip())
    return hide_password(text.splitlines()[0][:300] if text.strip() else type(error).__name__)


def hide_password(text: str) -> str:
    """Mask the passwords of URIs in a text."""
    return re.sub(r"(://[^:/@\s]*):[^@/\s]*@", r"\1:***@", text)


def truncate_markdown(markdown: str, max_chars: int) -> str:
    """Shorten a Markdown text, and close a code block that is cut.

    Args:
        markdown: The text.
        max_chars: Maximum number of characters.
    """
    if len(markdown) <= max_chars:
        return markdown
    cut = markdown[: max_chars - 10].rstrip()
    return f"{cut} …" + ("\n```" if cut.count("```") % 2 else "")


@contextmanager
def client_timeouts(timeouts: dict[str, str]) -> Iterator[None]:
    """Set environment variables of MLflow's client within the context, except variables that the user has set."""
    variables = timeouts | _ALWAYS
    previous = {name: os.environ.get(name) for name in variables}
    changed = {name: value for name, value in variables.items() if previous[name] in (None, SHORT_TIMEOUTS.get(name))}
    _set_variables(dict(changed))
    try:
        yield
    finally:
        _set_variables({name: previous[name] for name in changed})


def _set_variables(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        elif os.environ.get(name) != value:
            os.environ[name] = value
