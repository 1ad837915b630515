"""Where Parquet files are: local folders and globs, and what fsspec reaches (s3://, gs://, memory://, ...).

An address without `://` is a local path. Settings and credentials of remote places are fsspec's and the vendor's own,
such as AWS_PROFILE, AWS_ENDPOINT_URL or FSSPEC_S3_ANON.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NoReturn
from urllib.parse import unquote

import pyarrow as pa

from mmoe_rec.errors import UserError
from mmoe_rec.log.local_files import MAGIC, find_local, is_hidden, is_hidden_from

FIRST_ANSWER_SECONDS = 15.0
"""A remote place that has not answered by then counts as unreachable, however often its library would try again."""

_PACKAGES = {"s3": ("s3fs", "s3"), "s3a": ("s3fs", "s3"), "gs": ("gcsfs", "gs"), "gcs": ("gcsfs", "gs")}
# From these, read only what is asked for: their libraries would fetch megabytes around a footer.
_READ_BY_RANGE = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "http", "https"}
_VERSION_KEYS = (
    "ETag",
    "etag",
    "generation",
    "md5Hash",
    "mtime",
    "LastModified",
    "last_modified",
    "updated",
    "created",
)


@dataclass(frozen=True)
class FoundFile:
    """A file that was found; `version` changes when it is written again."""

    address: str
    bytes: int
    version: str


def is_remote(address: str) -> bool:
    """Whether an address is not a local path."""
    return "://" in address and _protocol(address) not in ("file", "local")


def find_files(source: str, setting: str = "data.log") -> list[FoundFile]:
    """Parquet files of a folder (also nested), a glob or a single file, sorted by address.

    What writers leave behind is left out, see `is_hidden`; a glob that names hidden files gets them.

    Args:
        setting: the setting that holds `source`, for messages.

    Raises:
        UserError: nothing is there, a folder can't be read, a link leads in a circle, or the place can't be reached.
    """
    found, is_folder = _find_remote(source) if is_remote(source) else _find_local(local_path(source))
    if not found:
        what = "holds no *.parquet file" if is_folder else "does not exist"
        raise UserError(f"the log '{source}' {what}; set `{setting}` to a folder, file or glob of Parquet files")
    return sorted(found, key=lambda file: file.address)


@contextmanager
def open_file(address: str) -> Iterator[pa.NativeFile]:
    """A file as pyarrow reads it; local ones by pyarrow itself, without a memory map.

    Raises:
        UserError: a remote place can't be reached, now or while the file is read.
        OSError: the file can't be opened.
    """
    if not is_remote(address):
        with pa.OSFile(local_path(address), "rb") as file:
            yield file
        return
    system, path = _file_system(address)
    options = {"cache_type": "none"} if _protocol(address) in _READ_BY_RANGE else {}
    with _reaching(address):
        handle = system.open(path, "rb", **options)
    with pa.PythonFile(_RemoteFile(address, handle), mode="r") as file:
        yield file


def path_values(address: str) -> dict[str, str | None]:
    """The columns in a Hive-partitioned folder's path: `day=7/brand=a%2Fb/` is {"day": "7", "brand": "a/b"}."""
    folders = address.replace(os.sep, "/").split("/")[:-1]
    pairs = [folder.partition("=") for folder in folders if "=" in folder]
    null = "__HIVE_DEFAULT_PARTITION__"
    return {unquote(name): None if value == null else unquote(value) for name, _, value in pairs}


def local_path(address: str) -> str:
    """The path of a local address, which may begin with file://."""
    return address.partition("://")[2] if "://" in address else address


def _find_local(source: str) -> tuple[list[FoundFile], bool]:
    found, is_folder = find_local(source)
    return [_local_file(file) for file in found], is_folder


def _local_file(path: Path) -> FoundFile:
    try:
        found = path.stat()
    except OSError:  # such as a broken link: whoever reads the file reports it
        return FoundFile(str(path), 0, "unknown")
    return FoundFile(str(path), found.st_size, str(found.st_mtime_ns))


def _find_remote(source: str) -> tuple[list[FoundFile], bool]:
    if "::" in source:
        raise UserError(f"'{source}' is a chain of addresses; give the address of the log itself")
    system, path = _file_system(source)
    with _reaching(source):
        system.invalidate_cache()
        top = _first_answer(source, lambda: _info(system, path))
        if top is None:
            found = _matches(system, path) if MAGIC & set(path) else []
        elif top["type"] == "directory":
            found = _infos_within(system, path)
        else:
            found = [top]
        files = [
            FoundFile(system.unstrip_protocol(info["name"]), int(info["size"] or 0), _version(system, info))
            for info in found
        ]
    return files, top is not None and top["type"] == "directory"


def _info(system: Any, path: str) -> dict[str, Any] | None:
    try:
        return system.info(path)
    except FileNotFoundError:
        return None


def _infos_within(system: Any, folder: str) -> list[dict[str, Any]]:
    found = system.find(folder, detail=True)
    return [
        info
        for name, info in found.items()
        if name.endswith(".parquet") and not is_hidden(PurePath(name[len(folder.rstrip("/")) + 1 :]))
    ]


def _matches(system: Any, pattern: str) -> list[dict[str, Any]]:
    try:
        matches = system.glob(pattern, detail=True)
    except FileNotFoundError:
        return []
    found: dict[str, dict[str, Any]] = {}
    for name, info in matches.items():
        within = _infos_within(system, name) if info["type"] == "directory" else [info]
        found |= {each["name"]: each for each in within if not is_hidden_from(pattern, each["name"])}
    return list(found.values())


def _version(system: Any, info: dict[str, Any]) -> str:
    found = next((info[key] for key in _VERSION_KEYS if info.get(key)), None)
    return str(found if found is not None else system.ukey(info["name"]))


def _protocol(address: str) -> str:
    return address.partition("://")[0].lower()


def _file_system(address: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and the path in it."""
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]

    protocol = _protocol(address)
    try:
        return url_to_fs(address, **(_s3_defaults() if protocol in ("s3", "s3a") else {}))
    except ImportError as error:
        cause = first_line(error.__cause__ or error)
        if protocol not in _PACKAGES:
            raise UserError(f"'{address}' needs a package that is missing: {first_line(error)} ({cause})") from None
        package, extra = _PACKAGES[protocol]
        raise UserError(
            f"'{address}' needs the package {package} ({cause}); `pip install {package}`, or install mmoe-rec with "
            f"its extra `{extra}`"
        ) from None
    except ValueError as error:
        raise UserError(f"'{address}' is not an address that can be read: {first_line(error)}") from None
    except Exception as error:
        _raise_unreachable(address, error)


def _s3_defaults() -> dict[str, Any]:
    """Fewer and shorter tries than botocore's, where the user has set nothing."""
    from fsspec.config import conf  # type: ignore[import-untyped]

    given: dict[str, Any] = {}
    for protocol in ("s3", "s3a"):
        given |= conf.get(protocol, {}).get("config_kwargs") or {}
    ours: dict[str, Any] = {"connect_timeout": 3}
    if not {"AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"} & os.environ.keys():
        ours["retries"] = {"mode": "standard", "total_max_attempts": 3}
    return {"config_kwargs": ours | given}


def _first_answer(address: str, ask: Callable[[], Any]) -> Any:
    """What `ask` returns, or a UserError after `FIRST_ANSWER_SECONDS`."""
    answers: list[Any] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            answers.append(ask())
        except Exception as error:
            errors.append(error)

    # A daemon: a library that keeps trying must not keep the process alive.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(FIRST_ANSWER_SECONDS)
    if errors:
        raise errors[0]
    if not answers:
        raise UserError(
            f"'{address}' did not answer within {FIRST_ANSWER_SECONDS:g} seconds; check the network and the endpoint"
        )
    return answers[0]


class _RemoteFile:
    """A file whose reads fail with a UserError, to tell a place that fails from a damaged file."""

    def __init__(self, address: str, handle: Any) -> None:
        self._address, self._handle = address, handle
        self.seek, self.tell, self.close = handle.seek, handle.tell, handle.close

    @property
    def closed(self) -> bool:
        return self._handle.closed

    def read(self, size: int = -1) -> bytes:
        with _reaching(self._address):
            return self._handle.read(size)


@contextmanager
def _reaching(address: str) -> Iterator[None]:
    """Errors in reaching a remote place become UserErrors; that a file is gone passes."""
    try:
        yield
    except (UserError, FileNotFoundError):
        raise
    except Exception as error:
        _raise_unreachable(address, error)


def _raise_unreachable(address: str, error: Exception) -> NoReturn:
    name, reason = type(error).__name__, first_line(error)
    if "Credential" in name:
        what = f"cannot be read without credentials ({reason})"
        to_do = {
            "s3fs": "set AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or FSSPEC_S3_ANON=true for "
            "public data",
            "gcsfs": "run `gcloud auth application-default login`, or set FSSPEC_GS_TOKEN=anon for public data",
        }.get(_PACKAGES.get(_protocol(address), ("", ""))[0], "provide them")
    elif isinstance(error, PermissionError):
        what, to_do = f"may not be read ({reason})", "check the bucket's name, its permissions and the credentials"
    else:
        what, to_do = f"cannot be reached ({name}: {reason})", "check the address, the network and the endpoint"
    raise UserError(f"'{address}' {what}; {to_do}") from None


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
