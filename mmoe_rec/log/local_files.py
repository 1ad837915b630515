"""Parquet files of local folders and globs, through links to folders; no file is left out silently.

Python's own `glob` and `Path.rglob` skip folders that can't be read, and the latter also links to folders.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePath

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
