"""Where Parquet files are: local folders and globs, and what fsspec reaches (s3://, gs://, memory://, ...).

An address without `://` is a local path. Settings and credentials of remote places are fsspec's and the vendor's own,
such as AWS_PROFILE, AWS_ENDPOINT_URL or FSSPEC_S3_ANON.

Local folders and globs are searched by this module, through links to folders, so that no file is left out silently:
Python's own `glob` and `Path.rglob` skip folders that can't be read, and the latter also links to folders.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any, NoReturn
from urllib.parse import unquote

import pyarrow as pa

from mmoe_rec.errors import UserError

MAGIC = frozenset("*?[")
_Identity = tuple[int, int]  # of a file or folder, by whatever path: device and inode


def is_hidden(path: PurePath) -> bool:
    """Whether a file is one that writers leave behind: `_temporary/...`, `.log.1a2b.tmp/...`; not Hive's `__`."""
    return path.name.startswith((".", "_")) or any(map(_is_hidden_folder, path.parts))


def is_hidden_from(pattern: str, path: str) -> bool:
    """Whether the part of `path` that a glob leaves open is hidden, and the glob names no hidden part itself."""
    parts = PurePath(pattern).parts
    fixed = next((i for i, part in enumerate(parts) if MAGIC & set(part)), len(parts))
    if any(part.startswith((".", "_")) for part in parts[fixed:]):
        return False
    return is_hidden(PurePath(*PurePath(path).parts[fixed:]))


def _is_hidden_folder(name: str) -> bool:
    return name.startswith(".") or name == "_temporary"


def find_local(source: str) -> tuple[list[Path], bool]:
    """The Parquet files of a folder, a glob or a single file, and whether `source` is a folder.

    Raises:
        UserError: a folder can't be read, a link leads nowhere or back to a folder that it lies in, or two paths lead
            to the same file.
    """
    found, is_folder = _Tree().find(source)
    seen: dict[_Identity, Path] = {}
    for file in sorted(found):
        identity = _identity(file)
        other = file if identity is None else seen.setdefault(identity, file)
        if other != file and os.path.realpath(other) == os.path.realpath(file):
            raise UserError(
                f"'{other}' and '{file}' are the same file, by a link: its rows would count twice; remove one of them"
            )
    return found, is_folder


def would_find(source: str, files: Sequence[Path]) -> bool:
    """Whether a folder or glob would include any of these files if they existed. Raises UserError as `find_local`."""
    planted = {os.path.realpath(file) for file in files}
    names = {file.name for file in files}
    found, _ = _Tree(tuple(planted)).find(source)
    return any(file.name in names and os.path.realpath(file) in planted for file in found)


@dataclass(frozen=True)
class _Entry:
    path: Path
    is_folder: bool


class _Tree:
    """The local file system, as if the files `planted` (real paths) existed."""

    def __init__(self, planted: tuple[str, ...] = ()) -> None:
        self.planted = planted

    def find(self, source: str) -> tuple[list[Path], bool]:
        """See `find_local`."""
        path = Path(source)
        try:
            if self._is_folder(path):
                return list(self._within(path)), True
            if path.is_file():
                return [path], False
            parts = path.parts
            first = next((i for i, part in enumerate(parts) if MAGIC & set(part)), None)
            if first is None:
                return [], False
            files: set[Path] = set()
            for match in self._matches(Path(*parts[:first]), parts[first:]):
                files.update(self._within(match.path) if match.is_folder else [match.path])
            return [file for file in files if not is_hidden_from(source, str(file))], False
        except OSError as error:
            place = source if error.filename is None else error.filename
            raise UserError(
                f"'{place}' may not be read ({error.strerror}), and there may be files of '{source}' in it; get "
                "permission to read it, or move it elsewhere"
            ) from None

    def _within(self, folder: Path, above: tuple[_Identity, ...] = ()) -> Iterator[Path]:
        above = _entered(folder, above)
        for entry in self._entries(folder):
            if entry.is_folder:
                if not _is_hidden_folder(entry.path.name):
                    yield from self._within(entry.path, above)
            elif entry.path.suffix == ".parquet" and not entry.path.name.startswith((".", "_")):
                yield entry.path

    def _matches(self, folder: Path, parts: Sequence[str], above: tuple[_Identity, ...] = ()) -> Iterator[_Entry]:
        """What the parts of a glob match in a folder; names that begin with a dot only where the part does, too."""
        part, rest = parts[0], parts[1:]
        if not self._is_folder(folder):
            return
        if part == "**":
            above = _entered(folder, above)
            if rest:
                yield from self._matches(folder, rest)
            else:
                yield _Entry(folder, True)
                return
        elif part == os.pardir and rest:
            yield from self._matches(folder / part, rest)
            return
        for entry in self._entries(folder, part):
            name = entry.path.name
            if part == "**":
                if entry.is_folder and not name.startswith("."):
                    yield from self._matches(entry.path, parts, above)
            elif fnmatchcase(name, part) and (part.startswith(".") or not name.startswith(".")):
                if rest:
                    yield from self._matches(entry.path, rest)
                else:
                    yield entry

    def _entries(self, folder: Path, pattern: str = "*") -> Iterator[_Entry]:
        """What is in a folder. A link that leads nowhere is an error if its name matches `pattern`, unless it is named
        as a Parquet file: its reader reports it."""
        names = set()
        if folder.is_dir():
            with os.scandir(folder) as entries:
                for entry in entries:
                    names.add(entry.name)
                    if entry.is_dir():
                        yield _Entry(folder / entry.name, True)
                    elif entry.is_file() or (entry.is_symlink() and entry.name.endswith(".parquet")):
                        yield _Entry(folder / entry.name, False)
                    elif entry.is_symlink() and _is_wanted(entry.name, pattern):
                        raise UserError(
                            f"'{folder / entry.name}' is a link to '{os.readlink(entry.path)}', which is not there: "
                            "files may be missing; restore what it leads to, or remove the link"
                        )
        inside = os.path.join(os.path.realpath(folder), "") if self.planted else ""
        for file in self.planted:
            if file.startswith(inside):
                name, _, below = file[len(inside) :].partition(os.sep)
                if name not in names:
                    names.add(name)
                    yield _Entry(folder / name, bool(below))

    def _is_folder(self, path: Path) -> bool:
        if path.is_dir() or not self.planted:
            return path.is_dir()
        inside = os.path.join(os.path.realpath(path), "")
        return any(file.startswith(inside) for file in self.planted)


def _is_wanted(name: str, pattern: str) -> bool:
    return not name.startswith((".", "_")) and fnmatchcase(name, pattern)


def _entered(folder: Path, above: tuple[_Identity, ...]) -> tuple[_Identity, ...]:
    identity = _identity(folder)
    if identity is None:
        return above
    if identity in above:
        raise UserError(
            f"'{folder}' is a link back to a folder that it lies in, '{os.path.realpath(folder)}': there is no end to "
            "its files; remove the link"
        )
    return (*above, identity)


def _identity(path: Path) -> _Identity | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino) if found.st_ino else None


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
