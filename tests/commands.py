"""Commands as they are typed, run in this process."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from mmoe_rec.cli.main import main
from mmoe_rec.report.report_files import read_report


def run(*words: object) -> None:
    """Runs `mmoe-rec WORDS`. Raises SystemExit with a code that is not 0."""
    main([str(word) for word in words])


def run_and_read(*words: object) -> str:
    """Runs `mmoe-rec WORDS`; gives what it prints, also where fixtures of a module need it."""
    with redirect_stdout(io.StringIO()) as printed:
        run(*words)
    return printed.getvalue()


def exit_code(*words: object) -> int:
    """The exit code of `mmoe-rec WORDS`."""
    try:
        run(*words)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def refuse(capsys: pytest.CaptureFixture, *words: object) -> str:
    """The one sentence with which `mmoe-rec WORDS` refuses, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(*words)
    message = capsys.readouterr().err
    assert ended.value.code == 2, message
    assert "Traceback" not in message
    (sentence,) = [line for line in message.splitlines() if line.startswith("error: ")]
    return sentence


def read_metrics(folder: Path) -> dict[str, Any]:
    """`metrics.json` of an evaluation, by the letter of the JSON standard."""

    def forbid(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads((folder / "metrics.json").read_text(), parse_constant=forbid)


def reported_by(folder: Path) -> list[str]:
    """The headline and the sentences of a folder's report."""
    report = read_report(folder)
    assert report is not None, f"{folder} has no report"
    return [report.headline, *(sentence.text for sentence in report.sentences)]
