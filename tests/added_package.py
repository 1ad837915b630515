"""A copy of the package with something added to it, as one adds it: a file, and a line in a list."""

import shutil
from pathlib import Path

import mmoe_rec
from tests.fork_server import run_command

ROOT = Path(mmoe_rec.__file__).parents[1]


class AddedPackage:
    """A copy of `mmoe_rec` in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT / "mmoe_rec", folder / "mmoe_rec", ignore=shutil.ignore_patterns("__pycache__"))

    def add(self, file: str, text: str, *, listed_in: str, after: str, line: str) -> None:
        """Writes `text` into a new file, or at the end of one; and a line below the line `after` of `listed_in`."""
        target = self.folder / "mmoe_rec" / file
        before = target.read_text(encoding="utf-8") if target.exists() else ""
        target.write_text(before + text, encoding="utf-8")
        self.replace(listed_in, after, f"{after}\n{line}")

    def replace(self, file: str, line: str, text: str) -> None:
        """Writes the text in place of the one line of a file that ends in `line`."""
        path = self.folder / "mmoe_rec" / file
        before = path.read_text(encoding="utf-8")
        assert before.count(f"{line}\n") == 1, f"{file} has not one line {line!r}"
        path.write_text(before.replace(f"{line}\n", f"{text}\n"), encoding="utf-8")

    def run(self, script: str) -> str:
        """What a script prints that imports this package."""
        file = self.folder / "script.py"
        file.write_text(script, encoding="utf-8")
        done = run_command(str(file), env={"PYTHONPATH": str(self.folder), "COLUMNS": "200"}, cwd=self.folder)
        assert done.returncode == 0, done.stderr
        return done.stdout
