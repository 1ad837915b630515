"""Find and open Parquet files in local folders and globs, and in fsspec file systems (s3://, gs://, memory://, ...).

A URI without `://` is a local path. fsspec and the vendor's library read their own settings and credentials, such as
AWS_PROFILE, AWS_ENDPOINT_URL or FSSPEC_S3_ANON.

This module walks local folders itself and follows links. Python's `glob` and `Path.rglob` would silently skip
unreadable folders, and `Path.rglob` also links to folders.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import unquote

import pyarrow as pa
from fsspec.config import conf  # type: ignore[import-untyped]
from fsspec.core import url_to_fs  # type: ignore[import-untyped]

from mmoe_rec.errors import UserError, first_line

_MAGIC = frozenset("*?[")
_READ_SECONDS = 15
# Read exact byte ranges over these protocols. Otherwise the libraries would fetch megabytes around a footer.
_READ_BY_RANGE = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "http", "https"}
_VERSIONS = ("ETag", "etag", "generation", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")


@dataclass(frozen=True)
class FileInfo:
    """A file of a log, with its size in bytes. The text `version` changes when the file is rewritten."""

    uri: str
    bytes: int
    version: str


def is_remote(uri: str) -> bool:
    """Return whether `uri` is not a local path."""
    return "://" in uri and _protocol(uri) not in ("file", "local")


def local_path(uri: str) -> str:
    """Return the path of a local `uri`, which may begin with file://."""
    return uri.partition("://")[2] if "://" in uri else uri


def find_files(source: str, setting: str = "data.log") -> list[FileInfo]:
    """Return the Parquet files of a folder (also nested), a glob or a single file, sorted by URI.

    Temporary files of writers are ignored, such as `_temporary/...`, `.log.1a2b.tmp/...` and `_metadata.parquet`. To
    read such files, write the dot or underscore in the glob, as in `log/_*.parquet`.

    Args:
        source: Folder, glob or file.
        setting: Name of the setting that contains `source`, for messages.

    Raises:
        UserError: There is no file, a file is CSV, a folder can't be read, a link leads in a circle, or a remote file
            system can't be reached.
    """
    if is_remote(source):
        files, is_folder = _find_remote(source)
    else:
        path = local_path(source)
        paths, is_folder = _find_local(path), os.path.isdir(path)
        csv_files = [file for file in paths or _find_local(f"{path}/**/*.csv") if file.suffix.lower() == ".csv"]
        if csv_files:
            csv = csv_files[0]
            raise UserError(
                f"'{csv}' is a CSV file, but {setting} needs Parquet. Convert it in Python with pyarrow: "
                f"`from pyarrow import csv, parquet; parquet.write_table(csv.read_csv({str(csv)!r}), "
                f"{str(csv.with_suffix('.parquet'))!r})`."
            )
        files = [_stat(file) for file in paths]
    if not files:
        problem = "contains no *.parquet file" if is_folder else "does not exist"
        raise UserError(f"the log '{source}' {problem}. Set {setting} to a folder, file or glob of Parquet files.")
    return sorted(files, key=lambda file: file.uri)


def _find_local(source: str) -> list[Path]:
    """Return the files of a local folder, glob or file. Raise UserError if two paths lead to the same file."""
    if os.path.isfile(source):
        return [Path(source)]
    folder, parts = split_glob(source)
    try:
        files = sorted(set(_walk(Path(folder), parts))) if os.path.isdir(folder) else []
    except OSError as error:
        raise UserError(
            f"'{error.filename or source}' can't be read ({error.strerror}) and may contain files of '{source}'. Get "
            "permission to read it, or move it elsewhere."
        ) from None
    seen: dict[str, Path] = {}
    for file in files:
        if (same := seen.setdefault(os.path.realpath(file), file)) != file:
            raise UserError(
                f"'{same}' and '{file}' are links to the same file, so its rows would count twice. Remove one of them."
            )
    return files


def source_includes(source: str, files: Sequence[Path]) -> bool:
    """Return whether a folder or glob would include any of the local `files`, judged by their paths.

    Args:
        source: Folder, glob or file.
        files: Local paths. The files need not exist.
    """
    if is_remote(source):
        return False
    folder, parts = split_glob(local_path(source))
    for resolve in (os.path.abspath, os.path.realpath):
        root = Path(resolve(folder))
        for file in (Path(resolve(file)) for file in files):
            if file.is_relative_to(root) and _matches(file.relative_to(root).parts, parts):
                return True
    return False


def split_glob(source: str) -> tuple[str, Sequence[str]]:
    """Split `source` into a folder without wildcards and the glob below it. Without any wildcard, the glob is `**`."""
    parts = Path(source).parts
    wild = [number for number, part in enumerate(parts) if _MAGIC & set(part)]
    if not wild or os.path.isdir(source):
        return source, ("**",)
    return str(Path(*parts[: wild[0]])), parts[wild[0] :]


def _below(name: str, is_folder: bool, parts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Match the name of a file or folder to the first of the `parts` of a glob.

    For a matching folder, yield the remaining parts, which its entries must match. For a matching file, yield (). The
    part `**` matches all visible folders and Parquet files.
    """
    part, rest = parts[0], parts[1:]
    if part == "**" and rest:
        yield from _below(name, is_folder, rest)
    hidden = name.startswith(".") or (name == "_temporary" if is_folder else name.startswith("_"))
    if (hidden and not part.startswith(name[0])) or not (part == "**" or fnmatchcase(name, part)):
        return
    if is_folder:
        yield parts if part == "**" else rest or ("**",)
    elif not rest and (part != "**" or name.endswith(".parquet")):
        yield ()


def _walk(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """Yield the files below a folder that match the `parts` of a glob, and all Parquet files in matching folders."""
    for entry in list(os.scandir(folder)):
        path, is_folder = folder / entry.name, entry.is_dir()
        is_cycle = is_folder and entry.is_symlink() and Path(os.path.realpath(folder)).is_relative_to(path.resolve())
        if is_cycle and any(_below(entry.name, is_folder, parts)):
            raise UserError(f"'{path}' is a link to a folder that contains it. Remove the link.")
        for rest in _below(entry.name, is_folder, parts):
            yield from _walk(path, rest) if is_folder else (path,)


def _matches(names: Sequence[str], parts: Sequence[str]) -> bool:
    """Return whether `_walk` would yield a file with these `names` (folders, then file). No names count as a match."""
    return not names or any(_matches(names[1:], rest) for rest in _below(names[0], len(names) > 1, parts))


def _stat(path: Path) -> FileInfo:
    try:
        status = path.stat()
    except OSError:  # such as a broken link, which is reported when the file is read
        return FileInfo(str(path), 0, "unknown")
    return FileInfo(str(path), status.st_size, str(status.st_mtime_ns))


def parse_path_columns(uri: str) -> dict[str, str | None]:
    """Return the columns in a Hive-partitioned `uri`: `day=7/brand=a%2Fb/` gives {"day": "7", "brand": "a/b"}."""
    folders = uri.replace(os.sep, "/").split("/")[:-1]
    pairs = [folder.partition("=") for folder in folders if "=" in folder]
    null = "__HIVE_DEFAULT_PARTITION__"
    return {unquote(name): None if value == null else unquote(value) for name, _, value in pairs}


@contextmanager
def open_file(uri: str) -> Iterator[pa.NativeFile]:
    """Open the file at `uri` for pyarrow. Local files are not memory-mapped.

    Raises:
        UserError: A remote file system can't be reached, now or while the file is read.
        OSError: The file can't be opened.
    """
    if not is_remote(uri):
        with pa.OSFile(local_path(uri), "rb") as file:
            yield file
        return
    system, path = file_system(uri)
    options = {"cache_type": "none"} if _protocol(uri) in _READ_BY_RANGE else {}
    with _reaching(uri):
        handle = system.open(path, "rb", **options)
    with pa.PythonFile(_RemoteFile(uri, handle), mode="r") as file:
        yield file


MAX_OPEN_FILES = 16
AnyFile = TypeVar("AnyFile", bound=FileInfo)


def compute_checksums(files: Sequence[AnyFile]) -> dict[AnyFile, str | None]:
    """Return a checksum of each file, 32 hexadecimal digits, or None if the file can't be read.

    Raises:
        UserError: A remote file system can't be reached.
    """
    with ThreadPoolExecutor(MAX_OPEN_FILES) as pool:
        return dict(zip(files, pool.map(_compute_checksum, files), strict=True))


@lru_cache(4096)  # a command may compare features with the log several times
def _compute_checksum(file: FileInfo) -> str | None:
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open_file(file.uri) as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    except OSError:
        return None
    return digest.hexdigest()


def _find_remote(source: str) -> tuple[list[FileInfo], bool]:
    """Return the files of a remote folder, glob or file, and whether `source` is a folder."""
    if "::" in source:
        raise UserError(f"'{source}' is a chain of URIs. Use the URI of the log itself.")
    system, path = file_system(source)
    names = path.split("/")
    wild = next((number for number, name in enumerate(names) if _MAGIC & set(name)), len(names))
    root, parts = "/".join(names[:wild]), names[wild:]
    with _reaching(source):
        system.invalidate_cache()
        try:
            top = system.info(root)
        except FileNotFoundError:
            return [], False
        if top["type"] != "directory":
            infos = [] if parts else [top]
        else:
            below = {name[len(root.rstrip("/")) + 1 :]: info for name, info in system.find(root, detail=True).items()}
            infos = [info for name, info in below.items() if _matches(name.split("/"), parts or ["**"])]
        files = []
        for info in infos:
            version = next((info[key] for key in _VERSIONS if info.get(key)), None) or system.ukey(info["name"])
            files.append(FileInfo(system.unstrip_protocol(info["name"]), int(info["size"] or 0), str(version)))
    return files, not parts and top["type"] == "directory"


def _protocol(uri: str) -> str:
    return uri.partition("://")[0].lower()


def file_system(uri: str) -> tuple[Any, str]:
    """Return the fsspec file system of `uri` and the path in it."""
    protocol = _protocol(uri)
    try:
        return url_to_fs(uri, **(_s3_defaults() if protocol in ("s3", "s3a") else {}))
    except ImportError as error:
        cause = first_line(error.__cause__ or error)
        raise UserError(
            f"'{uri}' needs a Python package that is not installed: {first_line(error)} ({cause}). For s3:// and "
            "gs://, install mmoe-rec with its extra `s3` or `gs`."
        ) from None
    except ValueError as error:
        raise UserError(f"'{uri}' is not a valid URI: {first_line(error)}") from None
    except Exception as error:
        _raise_unreachable(uri, error)


def _s3_defaults() -> dict[str, Any]:
    """Return S3 options that end botocore's retries within a minute, {} if the user has configured connections."""
    has_config = any(conf.get(protocol, {}).get("config_kwargs") for protocol in ("s3", "s3a"))
    if has_config or {"AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"} & os.environ.keys():
        return {}
    retries = {"mode": "standard", "total_max_attempts": 3}
    return {"config_kwargs": {"connect_timeout": 3, "read_timeout": _READ_SECONDS, "retries": retries}}


class _RemoteFile:
    """A remote file that raises UserError if a read fails, so that other errors mean a damaged file."""

    def __init__(self, uri: str, handle: Any) -> None:
        self._uri, self._handle = uri, handle
        self.seek, self.tell, self.close = handle.seek, handle.tell, handle.close

    @property
    def closed(self) -> bool:
        return self._handle.closed

    def read(self, size: int = -1) -> bytes:
        with _reaching(self._uri):
            return self._handle.read(size)


@contextmanager
def _reaching(uri: str) -> Iterator[None]:
    """Convert errors of a remote file system to UserError, except FileNotFoundError."""
    try:
        yield
    except (UserError, FileNotFoundError):
        raise
    except Exception as error:
        _raise_unreachable(uri, error)


def _raise_unreachable(uri: str, error: Exception) -> NoReturn:
    problem = f"can't be reached ({type(error).__name__}: {first_line(error)})"
    raise UserError(f"'{uri}' {problem}. Check the URI, the credentials, the network and the endpoint.") from None
