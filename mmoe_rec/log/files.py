"""Where Parquet files are: local folders and globs, and what fsspec reaches (s3://, gs://, memory://, ...).

An address without `://` is a local path. Settings and credentials of remote places are fsspec's and the vendor's own,
such as AWS_PROFILE, AWS_ENDPOINT_URL or FSSPEC_S3_ANON.

Local folders are walked here, through links, so that no file is left out silently: Python's own `glob` and
`Path.rglob` skip folders that can't be read, and the latter also links to folders.
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
# From these, read only what is asked for: their libraries would fetch megabytes around a footer.
_READ_BY_RANGE = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "http", "https"}
_VERSIONS = ("ETag", "etag", "generation", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")


@dataclass(frozen=True)
class FileInfo:
    """A file that was found; `version` changes when it is written again."""

    uri: str
    bytes: int
    version: str


def is_remote(uri: str) -> bool:
    """Whether an address is not a local path."""
    return "://" in uri and _protocol(uri) not in ("file", "local")


def local_path(uri: str) -> str:
    """The path of a local address, which may begin with file://."""
    return uri.partition("://")[2] if "://" in uri else uri


def find_files(source: str, setting: str = "data.log") -> list[FileInfo]:
    """Parquet files of a folder (also nested), a glob or a single file, sorted by address.

    What writers leave behind is left out: `_temporary/...`, `.log.1a2b.tmp/...`, `_metadata.parquet`; a part of a glob
    that begins with a dot or underscore matches it. setting: that holds `source`, for messages.

    Raises UserError where nothing is there, a file is CSV, a folder can't be read, a link leads in a circle, or the
    place can't be reached.
    """
    if is_remote(source):
        files, is_folder = _find_remote(source)
    else:
        path = local_path(source)
        found, is_folder = find_local(path), os.path.isdir(path)
        tables = [each for each in found or find_local(f"{path}/**/*.csv") if each.suffix.lower() == ".csv"]
        if tables:
            csv = tables[0]
            raise UserError(
                f"'{csv}' is CSV, and `{setting}` takes Parquet. Convert it in Python with pyarrow: "
                f"`from pyarrow import csv, parquet; parquet.write_table(csv.read_csv({str(csv)!r}), "
                f"{str(csv.with_suffix('.parquet'))!r})`."
            )
        files = [_stat(file) for file in found]
    if not files:
        what = "holds no *.parquet file" if is_folder else "does not exist"
        raise UserError(f"the log '{source}' {what}; set `{setting}` to a folder, file or glob of Parquet files")
    return sorted(files, key=lambda file: file.uri)


def find_local(source: str) -> list[Path]:
    """What `find_files` finds at a local path; none where nothing is there. Raises UserError where a folder can't be
    read, a link leads back to a folder that it lies in, or two paths lead to the same file."""
    if os.path.isfile(source):
        return [Path(source)]
    folder, parts = split_glob(source)
    try:
        files = sorted(set(_walk(Path(folder), parts))) if os.path.isdir(folder) else []
    except OSError as error:
        raise UserError(
            f"'{error.filename or source}' may not be read ({error.strerror}), and there may be files of '{source}' in "
            "it; get permission to read it, or move it elsewhere"
        ) from None
    seen: dict[str, Path] = {}
    for file in files:
        if (other := seen.setdefault(os.path.realpath(file), file)) != file:
            raise UserError(f"'{other}' and '{file}' are the same file, by a link: its rows count twice; remove one")
    return files


def source_includes(source: str, files: Sequence[Path]) -> bool:
    """Whether a source would find any of these local files if they were there, by their paths."""
    if is_remote(source):
        return False
    folder, parts = split_glob(local_path(source))
    for resolve in (os.path.abspath, os.path.realpath):
        root = Path(resolve(folder))
        for file in (Path(resolve(each)) for each in files):
            if file.is_relative_to(root) and _matches(file.relative_to(root).parts, parts):
                return True
    return False


def split_glob(source: str) -> tuple[str, Sequence[str]]:
    """A path up to its first part with a wildcard, and the other parts: those of a folder take in all that it holds."""
    parts = Path(source).parts
    wild = [number for number, part in enumerate(parts) if _MAGIC & set(part)]
    if not wild or os.path.isdir(source):
        return source, ("**",)
    return str(Path(*parts[: wild[0]])), parts[wild[0] :]


def _below(name: str, is_folder: bool, parts: Sequence[str]) -> Iterator[Sequence[str]]:
    """What a folder has to match that itself matches the parts of a glob; nothing more for a file that does. `**`
    matches all but what is hidden, and Parquet files alone."""
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
    """Files below a folder that the parts of a glob match, and the Parquet files of folders that they match."""
    for entry in list(os.scandir(folder)):
        path, is_folder = folder / entry.name, entry.is_dir()
        is_circle = is_folder and entry.is_symlink() and Path(os.path.realpath(folder)).is_relative_to(path.resolve())
        if is_circle and any(_below(entry.name, is_folder, parts)):
            raise UserError(f"'{path}' is a link back to a folder that it lies in; remove the link")
        for rest in _below(entry.name, is_folder, parts):
            yield from _walk(path, rest) if is_folder else (path,)


def _matches(names: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether `_walk` would find a file by the names of its path below the folder; one that is the folder matches."""
    return not names or any(_matches(names[1:], rest) for rest in _below(names[0], len(names) > 1, parts))


def _stat(path: Path) -> FileInfo:
    try:
        status = path.stat()
    except OSError:  # such as a broken link: whoever reads the file reports it
        return FileInfo(str(path), 0, "unknown")
    return FileInfo(str(path), status.st_size, str(status.st_mtime_ns))


def parse_path_columns(uri: str) -> dict[str, str | None]:
    """The columns in a Hive-partitioned folder's path: `day=7/brand=a%2Fb/` is {"day": "7", "brand": "a/b"}."""
    folders = uri.replace(os.sep, "/").split("/")[:-1]
    pairs = [folder.partition("=") for folder in folders if "=" in folder]
    null = "__HIVE_DEFAULT_PARTITION__"
    return {unquote(name): None if value == null else unquote(value) for name, _, value in pairs}


@contextmanager
def open_file(uri: str) -> Iterator[pa.NativeFile]:
    """A file as pyarrow reads it; local ones by pyarrow itself, without a memory map. Raises UserError where a remote
    place can't be reached, now or while it is read, and OSError for a file that can't be opened."""
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
    """What `compute_checksum` gives of each, several at a time."""
    with ThreadPoolExecutor(MAX_OPEN_FILES) as pool:
        return dict(zip(files, pool.map(compute_checksum, files), strict=True))


@lru_cache(4096)  # a command may ask several times whether features are of the log
def compute_checksum(file: FileInfo) -> str | None:
    """A fingerprint of a file's bytes, 32 hexadecimal digits; None for one that can't be read. Raises UserError where a
    remote place can't be reached."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open_file(file.uri) as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    except OSError:
        return None
    return digest.hexdigest()


def _find_remote(source: str) -> tuple[list[FileInfo], bool]:
    """The files, and whether the source is a folder."""
    if "::" in source:
        raise UserError(f"'{source}' is a chain of addresses; give the address of the log itself")
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
    """fsspec's file system of an address, and the path in it."""
    protocol = _protocol(uri)
    try:
        return url_to_fs(uri, **(_s3_defaults() if protocol in ("s3", "s3a") else {}))
    except ImportError as error:
        cause = first_line(error.__cause__ or error)
        raise UserError(
            f"'{uri}' needs a package that is missing: {first_line(error)} ({cause}); for s3:// and gs://, install "
            "mmoe-rec with its extra `s3` or `gs`"
        ) from None
    except ValueError as error:
        raise UserError(f"'{uri}' is not an address that can be read: {first_line(error)}") from None
    except Exception as error:
        _raise_unreachable(uri, error)


def _s3_defaults() -> dict[str, Any]:
    """Fewer and shorter tries than botocore's, which waits for minutes, where the user has set nothing."""
    users = any(conf.get(protocol, {}).get("config_kwargs") for protocol in ("s3", "s3a"))
    if users or {"AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"} & os.environ.keys():
        return {}
    retries = {"mode": "standard", "total_max_attempts": 3}
    return {"config_kwargs": {"connect_timeout": 3, "read_timeout": _READ_SECONDS, "retries": retries}}


class _RemoteFile:
    """A file whose reads fail with a UserError, to tell a place that fails from a damaged file."""

    def __init__(self, uri: str, handle: Any) -> None:
        self._address, self._handle = uri, handle
        self.seek, self.tell, self.close = handle.seek, handle.tell, handle.close

    @property
    def closed(self) -> bool:
        return self._handle.closed

    def read(self, size: int = -1) -> bytes:
        with _reaching(self._address):
            return self._handle.read(size)


@contextmanager
def _reaching(uri: str) -> Iterator[None]:
    """Errors in reaching a remote place become UserErrors; that a file is gone passes."""
    try:
        yield
    except (UserError, FileNotFoundError):
        raise
    except Exception as error:
        _raise_unreachable(uri, error)


def _raise_unreachable(uri: str, error: Exception) -> NoReturn:
    what = f"cannot be reached ({type(error).__name__}: {first_line(error)})"
    to_do = "check the address, the credentials, the network and the endpoint"
    raise UserError(f"'{uri}' {what}; {to_do}") from None
